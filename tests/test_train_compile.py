"""The launcher of `train_compile`: ahead of time for a TPU, on any Linux host with libtpu."""

import subprocess

import pytest

from tests import runs


@pytest.mark.slow
def test_compiles_for_v5p():
  topology = ["compile_topology=v5p-8", "compile_topology_num_slices=1"]
  finished = subprocess.run(
    runs.command(("MaxText/train_compile.py",), "yaml/mudd_tiny.yml", runs.ROOT / "runs", "x", *topology),
    cwd=runs.ROOT,
    env=runs.environment(),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr[-4000:]
  assert "Jitting and compilation complete!" in finished.stdout + finished.stderr
