"""Set before anything imports JAX: CPU, no model hub, a compilation cache inside the repository."""

import logging
import os
import pathlib
import signal
import sys
import warnings

import pytest

from tests import shards

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

collect_ignore = ["hf"]  # needs PyTorch, which .venv does not have: make test-hf
MOST_MAPPINGS = 40_000  # after one test

# A shell ignores interrupts in what it starts in the background, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def processes_stay_talkative():
  """A launcher that refuses a run silences the rest of its process, which here is that of other tests."""
  hook = sys.unraisablehook
  with warnings.catch_warnings():
    yield
  sys.unraisablehook = hook
  logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def mappings_stay_few():
  """Linux allows a process 65,530 memory mappings. XLA's code for CPUs takes some hundreds for a compiled function and
  aborts when there are no more, as after 198 slow tests of test_mix.py."""
  yield
  mappings = pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
  if mappings > MOST_MAPPINGS:
    import jax

    jax.clear_caches()


def pytest_addoption(parser):
  parser.addoption(
    "--shard", metavar="K/N", help="run the K-th of N parts of the tests, chosen by a hash of their names"
  )


def pytest_configure(config):
  try:
    config.shard = shards.parse(config.getoption("shard") or "1/1")
  except ValueError as error:
    raise pytest.UsageError(str(error)) from None


def pytest_sessionstart(session):
  if session.config.getoption("dist", "no") != "no" and not hasattr(session.config, "workerinput"):
    return  # workers run the tests, and importing takes a while

  import jax
  import omegaconf

  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

  from maxtext_mudd import plugin

  plugin.install()
  # Most of the second that a configuration takes is OmegaConf copying what it merges. MaxText does not use the parts
  # again, except for `logical_axis_rules`, which no test overrides. Runs in processes of their own do without.
  omegaconf.OmegaConf.merge = staticmethod(omegaconf.OmegaConf.unsafe_merge)


def pytest_collection_modifyitems(config, items):
  """One part of the tests if one is wanted; the longest files first, so that no worker is left with one at the end."""
  left_out = [item for item in items if not shards.holds(config.shard, item.nodeid)]
  if left_out:
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if shards.holds(config.shard, item.nodeid)]
  longest = (
    "test_runs.py",
    "test_training.py",
    "test_scan.py",
    "test_scan_backward.py",
    "test_model_backward.py",
    "test_mix.py",
    "test_yaml.py",
  )
  items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
