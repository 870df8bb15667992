"""Adapters (LoRA) that are merged into a model and written for PEFT, from checkpoints of random values."""

import json
import pathlib

from flax import traverse_util
import numpy as np
from orbax import checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import maxtext_mudd
from maxtext_mudd.checkpoints import adapters, model_config, orbax_folder, parameters
from maxtext_mudd.checkpoints.hugging_face import native
from maxtext_mudd.config.errors import ConfigError
from tests import models

KEYS = {
  "mudd": True,
  "base_mlp_dim": 256,
  "mudd_ffn_reallocation": True,
  "base_num_decoder_layers": 2,
  "decoder_block": "llama2",
}
RANK, ALPHA = 3, 6.0
QUERY, DOWN = "decoder/layers_1/self_attention/query/kernel", "decoder/layers_0/mlp/wo/kernel"


def config(base: str = "", alpha: float = ALPHA, **keys):
  return models.config(**KEYS, load_parameters_path=base, lora={"lora_alpha": alpha, "lora_rank": 0, **keys})


def save(path: pathlib.Path, tree) -> pathlib.Path:
  ocp.PyTreeCheckpointer().save(path, tree)
  return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
  random = np.random.default_rng(0)
  shapes = model_config.parameter_shapes(config())
  values = {name: random.normal(size=x.shape).astype(np.float32) for name, x in shapes.items()}
  tree = traverse_util.unflatten_dict({tuple(name.split("/")): x for name, x in values.items()})
  return save(tmp_path_factory.mktemp("base") / "items", {"params": {"params": tree}}), values


def save_adapter(folder: pathlib.Path, names, values) -> dict[str, np.ndarray]:
  """Saves an adapter of these kernels in `folder`; A and B by the paths of its parameters."""
  random, arrays = np.random.default_rng(1), {}
  for name in names:
    inputs = np.prod(values[name].shape[:-1]) if name.endswith(("out/kernel", "wo/kernel")) else values[name].shape[0]
    outputs = values[name].size // inputs
    arrays[f"{name}_lora_a"] = random.normal(size=(inputs, RANK)).astype(np.float32)
    arrays[f"{name}_lora_b"] = random.normal(size=(RANK, outputs)).astype(np.float32)
  tree = traverse_util.unflatten_dict({(*name.split("/"), "value"): x for name, x in arrays.items()})
  save(folder / "model_params", tree)
  return arrays


def test_merged(base, tmp_path):
  path, values = base
  arrays = save_adapter(tmp_path / "4", [QUERY, DOWN], values)
  adapter = adapters.of(orbax_folder.parameters(tmp_path / "4" / "model_params"))
  merged = adapters.merged(adapter, config(str(path)), tmp_path)
  assert merged.keys() == values.keys()
  for name, value in values.items():
    expected = value
    if name in (QUERY, DOWN):
      update = ALPHA / RANK * arrays[f"{name}_lora_a"] @ arrays[f"{name}_lora_b"]
      expected = value + update.reshape(value.shape)
      assert np.abs(update).max() > 1
    np.testing.assert_allclose(merged[name].read(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("names", [[QUERY, DOWN], "all queries"], ids=["two layers", "all queries"])
def test_peft(names, base, tmp_path):
  """A PyTorch layer adds alpha / rank · B(A(x)) to its output; the tensors of W are [out, in]."""
  _, values = base
  if names == "all queries":
    names = [QUERY, QUERY.replace("layers_1", "layers_0")]
  save_adapter(tmp_path / "4", names, values)
  adapters.to_peft(tmp_path / "4", tmp_path / "peft", config(), "D")
  fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
  assert (fields["r"], fields["lora_alpha"], fields["base_model_name_or_path"]) == (RANK, ALPHA, "D")
  whole = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
  assert fields["target_modules"] == (whole if DOWN in names else ["q_proj"])
  tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
  assert len(tensors) == 2 * len(names)
  adapter = adapters.of(orbax_folder.parameters(tmp_path / "4" / "model_params"))
  of_path = {name.path: name for name in native.names(config())}
  for path, (a, b) in adapter.items():
    prefix = f"base_model.model.{of_path[path].tensor.removesuffix('.weight')}"
    product = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
    expected = of_path[path].to_hf((a.read() @ b.read()).reshape(of_path[path].shape))
    np.testing.assert_allclose(product, expected, atol=1e-5, rtol=0)


def test_refusals(base, tmp_path):
  path, values = base
  save_adapter(tmp_path / "4", [QUERY], values)
  folder = tmp_path / "4" / "model_params"
  adapter = adapters.of(orbax_folder.parameters(folder))
  for cfg, sentence in (
    (
      config(str(path), alpha=0.0),
      "has an adapter, whose alpha is not saved; add lora.lora_alpha=",
    ),
    (config(str(path), lora_rank=2), "lora.lora_rank=2: .* has an adapter of rank 3; set that."),
    (config(), "has an adapter alone; add load_parameters_path=..., the model that it was trained on."),
  ):
    with pytest.raises(ConfigError, match=sentence):
      adapters.merged(adapter, cfg, folder)
  with pytest.raises(ConfigError, match=r"has no adapter; name a checkpoint of a run with lora\.enable_lora=True"):
    adapters.to_peft(path.parent, tmp_path / "peft", config(), "")
  with pytest.raises(ConfigError, match=r"and .* has no such parameter; name its model."):
    adapters.merged({"decoder/other/kernel": adapter[QUERY]}, config(str(path)), folder)
  assert not (tmp_path / "peft").exists()


def test_an_adapter_is_no_model(base, tmp_path):
  """Evaluation, figures, decoding and training say what to do."""
  path, values = base
  save_adapter(tmp_path / "4", [QUERY], values)
  with pytest.raises(ConfigError, match=r"4/model_params has an adapter without its model; run .* from-run first"):
    parameters.check_path(str(parameters.items_folder(str(tmp_path / "4"))), config())
  with pytest.raises(ConfigError, match=r"load_parameters_path=\S+/items: the parameters are those of \S+/4; leave it"):
    maxtext_mudd.from_run(tmp_path / "4", models.BASE_YML, load_parameters_path=str(path))
