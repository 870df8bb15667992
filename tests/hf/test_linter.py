"""The linter of transformers' own model files, on ours."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.hf.conftest import FORMS

# Rules of transformers' own repository, and of its version 5: these files are neither, and load in version 4.51, too.
IGNORED = {
  "TRF010": "@strict of configurations",
  "TRF012": "initial values by transformers.initialization, which version 4 lacks",
  "TRF018": "_init_weights of the parent, which does not know W1, W2 and static weights",
  "TRF028": "the licence at the top of each file",
  "TRF034": "GradientCheckpointingLayer, which 4.51 lacks; checkpointing is tested in test_model.py",
  "TRF041": "notes beside branches on the configuration, with the checkpoints that take them",
  "TRF044": "cache_position, which static caches before 5.6 need",
  "TRF045": "arguments that decorators of version 5 add",
  "TRF051": "branches on the attention implementation, for masks before 4.53",
  "TRF057": "@auto_docstring, which transformers' documentation is made from",
}


@pytest.mark.skipif(importlib.util.find_spec("mlinter") is None, reason="it is installed beside version 5 only")
def test_linter(tmp_path):
  command = [sys.executable, "-m", "mlinter", "--no-progress", "--no-cache", "--output-json", tmp_path / "found.json"]
  subprocess.run([*command, FORMS["mudd"]], check=False, capture_output=True)
  found = json.loads((tmp_path / "found.json").read_text())
  assert {x["rule"] for x in found["findings"]} == IGNORED.keys()
