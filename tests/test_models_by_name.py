"""`model_name=NAME mudd=true`, for every model file of MaxText."""

import pathlib

import maxtext
from maxtext.configs import pyconfig
import pytest

from maxtext_mudd import connections
from maxtext_mudd.config.errors import ConfigError
from tests import models, runs

NAMES = sorted(path.stem for path in (pathlib.Path(maxtext.__path__[0]) / "configs" / "models").rglob("*.yml"))
# What the error begins with. docs/decoders.md names these files.
REFUSED = {
  "deepseek-custom": "engram_layers=",
  "deepseek3-671b-batchsplit": "use_batch_split_schedule=True",
  "llama3-405b": "model_name='llama3-405b' is not valid",  # MaxText has the file, and does not accept the name
}
WITH_DEEPSTACK = ("qwen3-omni-30b-a3b", "qwen3-vl-2b", "qwen3-vl-30b-a3b", "qwen3-vl-4b", "weaver-max", "weaver-mini")
REFUSED |= dict.fromkeys(WITH_DEEPSTACK, "deepstack_visual_indexes_for_vit=")
REFUSED |= dict.fromkeys(("qwen3.5-35b-a3b-fp8", "qwen3.5-397b-a17b-fp8"), "weight_dtype=float8_e4m3fn")
UNSCANNED = ("gemma4-e2b", "gemma4-e4b", *WITH_DEEPSTACK)  # MaxText does not scan their layers
FAST = ("llama3-8b", "gpt-oss-20b", "deepseek3-671b", "qwen3-vl-2b")


# Keys that MaxText asks for before it asks for anything else.
MORE = {"deepseek-custom": {"hf_access_token": "a", "tokenizer_path": "a"}}


def config_of(name: str, **keys):
  keys |= {"log_config": False, "skip_jax_distributed_system": True, "hardware": "cpu", "attention": "dot_product"}
  keys |= MORE.get(name, {})
  return pyconfig.initialize(["", models.BASE_YML], model_name=name, mudd=True, **keys)


@pytest.mark.parametrize("name", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in NAMES])
def test_a_model_file(name):
  if name in REFUSED:
    with pytest.raises(ConfigError) as refused:
      config_of(name, scan_layers=False)
    assert str(refused.value).startswith(REFUSED[name])
    return
  for scan in (False,) if name in UNSCANNED else (False, True):
    config = config_of(name, scan_layers=scan)
    plan = connections.plan(config)
    assert len(plan.sites) == plan.num_blocks
    assert plan.num_blocks in (config.num_decoder_layers, 2 * config.num_decoder_layers)  # two in a layer of Gemma 2


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_DEEPSTACK)
def test_text_alone(name):
  assert connections.plan(config_of(name, scan_layers=False, use_multimodal=False, override_model_config=True)).sites


def test_the_page_names_the_files_that_are_refused():
  page = (runs.ROOT / "docs" / "decoders.md").read_text()
  assert [name for name in (*REFUSED, *UNSCANNED) if f"`{name}`" not in page] == []
