"""Tests of the PyTorch model, in an environment of PyTorch and transformers without JAX: make test-hf.

MODELS is a folder that tests/native_models.py wrote.
"""

import json
import os
import pathlib

from packaging import version
import pytest
import transformers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
MODELS = pathlib.Path(os.environ.get("MODELS", ""))
RELEASED = ("muddformer_tiny", "muddpythia_tiny")
EXPERTS = ("mixtral, scanned", "qwen3_moe, other widths")  # the first has a balance loss
FORMS = {json.loads((x / "form.json").read_text()): x for x in sorted(MODELS.glob("form_*"))}


def has_version(least: str) -> bool:
  """Whether transformers has this version or a later one."""
  return version.Version(transformers.__version__) >= version.Version(least)


def load(folder, **options):
  import torch
  from transformers import AutoModelForCausalLM

  options = {"torch_dtype": torch.float32} | options
  return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="session", autouse=True)
def models_are_there():
  assert FORMS, f"MODELS={MODELS} has no models; write them by tests/native_models.py"
