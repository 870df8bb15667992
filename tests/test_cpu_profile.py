"""benchmarks/cpu_profile.py: operations of a compiled program by kind."""

import sys

import jax
import jax.numpy as jnp

from tests import runs

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import cpu_profile


def test_operations_of_a_program_are_summed_by_kind(tmp_path):
  x = jnp.ones((1024, 1024))
  product = jax.jit(lambda x: x @ x).lower(x).compile()
  product(x).block_until_ready()
  with jax.profiler.trace(tmp_path):
    jax.block_until_ready([product(x) for _ in range(3)])
  seconds = cpu_profile.by_kind(cpu_profile.operations(tmp_path))
  assert seconds["matrix products"] > 0.9 * sum(seconds.values())


def test_names_of_fusions_say_their_kind():
  times = {"ynn_fusion.3": 1.0, "dot.7": 2.0, "copy_bitcast_fusion": 4.0, "add_rsqrt_fusion.1": 8.0}
  assert [*cpu_profile.by_kind(times).values()] == [3.0, 4.0, 8.0]
