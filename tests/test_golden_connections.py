"""Other people's depth connections, computed by their code and by the families here. Data: tests/data/README.md.

MUDD_GOLDEN_PEERS names another folder of such data to check in place of tests/data/connections.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from tests import golden_connections, models, runs

ROOT = pathlib.Path(os.environ.get("MUDD_GOLDEN_PEERS", models.DATA / "connections"))
CASES = [(folder, name) for folder in golden_connections.folders(ROOT) for name in golden_connections.cases(folder)]
DOUBLE = 1e-10
# The reference codes' own float32 errors are up to 2e-5 in models and 2e-6 in single operations.
SINGLE = {"model": 1e-4, "op": 1e-5, "sinkhorn": 1e-5}


# Whole models that take long to compile, and whose family has another model among the fast tests.
SLOW_MODELS = {
  "attnres_block": ("model_l6_s2", "model_l6_s3", "model_l6_s8"),
  "dca": ("model_d4_k8",),
  "denseformer": ("model_l6_k2_p1", "model_l6_k2_p3", "model_l6_k1_p4"),
  "hyper_connections": ("model_static",),
  "mhc": ("model_megatron",),
}


def is_slow(folder, name):
  return name in SLOW_MODELS.get(folder.name, ())


@functools.cache
def double_errors(slow: bool):
  """In a process of its own, since 64-bit types are a setting of the process."""
  names = [f"{folder.name}/{name}" for folder, name in CASES if is_slow(folder, name) == slow]
  finished = subprocess.run(
    [sys.executable, "-m", "tests.golden_connections", str(ROOT), *names],
    cwd=runs.ROOT,
    env=os.environ | {"JAX_ENABLE_X64": "1"},
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr[-4000:]
  return json.loads(finished.stdout.splitlines()[-1])


DOUBLE_CASES = [pytest.param(*case, marks=[pytest.mark.slow] * is_slow(*case)) for case in CASES]


@pytest.mark.parametrize(("folder", "name"), DOUBLE_CASES, ids=lambda x: getattr(x, "name", x))
def test_in_float64(folder, name):
  errors = double_errors(is_slow(folder, name))[f"{folder.name}/{name}"]
  assert errors
  assert {key: error for key, error in errors.items() if not error <= DOUBLE} == {}


# Whole models in float32 are slow: in float64 they are all compared, to 1e-10.
SINGLE_CASES = [pytest.param(*case, marks=[pytest.mark.slow] * case[1].startswith("model")) for case in CASES]


@pytest.mark.parametrize(("folder", "name"), SINGLE_CASES, ids=lambda x: getattr(x, "name", x))
def test_in_float32(folder, name):
  with jax.default_matmul_precision("highest"):
    errors = golden_connections.errors(folder, name, "float32")
  tolerance = SINGLE[name.split("_")[0]]
  assert {key: error for key, error in errors.items() if not error <= tolerance} == {}


def test_no_data_are_left_out():
  assert len(CASES) >= 32
