"""The launcher of `train_compile`: ahead of time for a TPU, on any Linux host with libtpu."""

import re
import subprocess

import pytest

from tests import runs


def compile_for(topology: str, *overrides: str) -> subprocess.CompletedProcess:
  keys = [f"compile_topology={topology}", "compile_topology_num_slices=1", *overrides]
  return subprocess.run(
    runs.command(("MaxText/train_compile.py",), "yaml/mudd_tiny.yml", runs.ROOT / "runs", "x", *keys),
    cwd=runs.ROOT,
    env=runs.environment(),
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_compiles_for_v5p():
  finished = compile_for("v5p-8")
  assert finished.returncode == 0, finished.stderr[-4000:]
  assert "Jitting and compilation complete!" in finished.stdout + finished.stderr


@pytest.mark.slow
def test_a_batch_that_does_not_fit():
  finished = compile_for("v5p-8", "per_device_batch_size=65536")
  assert finished.returncode == 2
  sentence = finished.stderr.splitlines()[-1]
  assert sentence.startswith("maxtext-mudd: per_device_batch_size=65536 with max_target_length=")
  assert re.search(
    r"the step needs [\d.]+[GT] of the chip's 95\.\d+G, [\d.]+[GT] too much; use a smaller batch", sentence
  )
