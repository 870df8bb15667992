"""The fused kernel, interpreted: values and gradients against the reference in float64, and no race.

Budgets are of the largest error over the largest value, for each stream and each gradient. Sources in bfloat16 are
compared with the reference of the same rounded inputs; the weights of both are rounded where the model rounds them.
"""

import functools

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # public only as a message that is printed
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_mudd import kernels

# B, T, D, N, C, K, dtype, has newest, dynamic, activation; B·T not in whole groups of eight, nor D in lanes, but once.
CASES = {
  "odd sizes": (2, 5, 24, 3, 4, 16, "float32", False, True, "gelu"),
  "one way, tanh, pre-normed": (3, 7, 40, 5, 1, 8, "float32", True, True, "gelu_tanh"),
  "static": (2, 13, 40, 5, 4, 0, "float32", False, False, "gelu"),
}
FAST = ("one way, tanh, pre-normed", "static")
BUDGETS = {"float32": (2e-6, 5e-6)}  # of values, of gradients


def operands(case):
  rows, length, width, sources, ways, hidden, dtype, has_newest, dynamic, _ = CASES[case]
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  xs = [normal(rows, length, width) for _ in range(sources)]
  newest = normal(rows, length, width) if has_newest else None
  w1 = normal(width, hidden) * width**-0.5 if dynamic else None
  w2 = normal(hidden, ways, sources) * hidden**-0.5 if dynamic else None
  return (xs, newest, w1, w2, normal(ways, sources)), [normal(rows, length, width) for _ in range(ways)]


def streams_and_gradients(case, args, cotangents, implementation):
  ways, activation = CASES[case][4], CASES[case][9]

  def call(xs, newest, w1, w2, a):
    settings = {"activation": activation, "implementation": implementation}
    return kernels.depth_aggregate(xs, w1, w2, a, ways=ways, newest=newest, **settings)

  streams, vjp = jax.vjp(call, *args)
  return streams, jax.tree.leaves(vjp(cotangents))


@pytest.mark.parametrize("case", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in CASES])
def test_values_and_gradients(case):
  args, cotangents = operands(case)
  found = streams_and_gradients(case, args, cotangents, "pallas_interpret")
  assert not interpret_pallas_call.races.races_found
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (args, cotangents))
    expected = streams_and_gradients(case, *wide, "xla")
  for mine, theirs, budget in zip(found, expected, BUDGETS[CASES[case][6]]):
    assert len(mine) == len(theirs)
    for x, y in zip(mine, theirs):
      y = np.asarray(y)
      assert np.abs(y).max() > 0
      assert np.abs(np.asarray(x, np.float64) - y).max() <= budget * np.abs(y).max()


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p:2x2x1", "v6e:2x2x1"])
def test_compiles_for(chip):
  """Ahead of time, at the shape of MUDDFormer-2.8B's last four-way aggregates: it fits VMEM, forward and backward."""
  topology = topologies.get_topology_desc(platform="tpu", topology_name=chip)
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
  one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  width, sources, ways, hidden = 2560, 32, 4, 192

  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one)

  row = array(1, 2048, width)
  args = ([row] * sources, array(width, hidden), array(hidden, ways, sources), array(ways, sources), [row] * ways)

  def step(xs, w1, w2, a, cotangents):
    call = functools.partial(kernels.depth_aggregate, ways=ways, implementation="pallas")
    streams, vjp = jax.vjp(call, xs, w1, w2, a)
    return streams, vjp(cotangents)

  compiled = jax.jit(step).lower(*args).compile()
  assert compiled.as_text().count("tpu_custom_call") >= 2
  unit = 2048 * width * 2
  assert compiled.memory_analysis().temp_size_in_bytes < unit  # no source is copied, stacked or padded


def test_dtypes_that_the_kernel_does_not_take():
  xs = [jnp.zeros((1, 8, 128), jnp.float16)]
  with pytest.raises(ValueError, match="the sources are float16"):
    kernels.depth_aggregate(xs, None, None, jnp.ones((4, 1)), ways=4, implementation="pallas")
