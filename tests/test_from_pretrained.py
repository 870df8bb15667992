"""`from_pretrained`: folders, overrides, and checkpoints that do not fit their keys."""

import re
import shutil

from flax import nnx
import jax.numpy as jnp
import pytest
import yaml

import maxtext_mudd
from maxtext_mudd import convert
from maxtext_mudd.checkpoints.hugging_face import models as hf
from maxtext_mudd.config.errors import ConfigError
from tests import models
from tests.published import hugging_face


@pytest.mark.slow
def test_relative_folders(tmp_path, monkeypatch):
  hugging_face(tmp_path / "hf")
  monkeypatch.chdir(tmp_path)
  convert.main(["from-hf", "--hf-dir", "hf", "--maxtext-dir", "maxtext"])
  convert.main(["to-hf", "--maxtext-dir", "maxtext", "--hf-dir", "back"])
  maxtext_mudd.from_pretrained("maxtext")
  with pytest.raises(ConfigError, match=r"scan_layers=True: the model in \S+ has scan_layers=False; leave it out"):
    maxtext_mudd.from_pretrained("maxtext", scan_layers=True)
  shutil.rmtree(tmp_path / "maxtext" / "items" / "d")
  with pytest.raises(ConfigError, match=r"maxtext/items has no parameters, or is damaged"):
    maxtext_mudd.from_pretrained("maxtext")


def test_folders_that_hold_no_model(tmp_path):
  (tmp_path / "part").mkdir()
  shutil.copyfile(models.DATA / "muddformer_tiny" / "model.safetensors", tmp_path / "part" / "model.safetensors")
  with pytest.raises(ConfigError, match=r"part/config\.json cannot be read \(No such file"):
    maxtext_mudd.from_pretrained(tmp_path / "part")
  for path, message in (
    (tmp_path / "none", "is not a folder"),
    (tmp_path / ("n" * 300), "cannot be reached: file name too long; name one that can"),
    (tmp_path, "holds no model: it has none of model.yml, model.safetensors and params"),
  ):
    with pytest.raises(ConfigError, match=message):
      maxtext_mudd.from_pretrained(path)


def test_a_published_folder_with_folders_of_other_names(tmp_path):
  (hugging_face(tmp_path / "hf") / "checkpoint").mkdir()
  maxtext_mudd.from_pretrained(tmp_path / "hf")


def test_overrides(tmp_path):
  dtypes = {"dtype": jnp.bfloat16, "weight_dtype": "bfloat16"}
  model, config = maxtext_mudd.from_pretrained(hugging_face(tmp_path / "hf"), **dtypes)
  assert config.dtype == "bfloat16"
  assert {x.get_value().dtype.name for _, x in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {"bfloat16"}
  size = config.vocab_size
  for tokens, message in (
    ([1, 2, 3], "tokens are [3]; pass an array [batch, length]."),
    ([[1, 2], [3]], "tokens are rows of different lengths; pass an array [batch, length]."),
    ([[1.5]], "tokens are float64; pass whole numbers."),
    ([[1] * 99], f"tokens are [1, 99], longer than the context, max_target_length={config.max_target_length}."),
    ([[1, size]], f"tokens hold {size}, and the model has vocab_size={size}."),
    (jnp.asarray([[1, -1]]), f"tokens hold -1, and the model has vocab_size={size}."),
  ):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
      maxtext_mudd.logits(model, tokens)
  for positions in ([[0, 1, 2]], [[0.5, 1]]):
    with pytest.raises(ValueError, match=r"positions are .+; pass whole numbers \[batch, length\]"):
      maxtext_mudd.logits(model, [[1, 2]], positions=positions)
  for key, value, own in (
    ("mudd_activation", "gelu_tanh", "gelu"),
    ("base_config", "other.yml", "base.yml"),
    ("rope_min_timescale", 50, 1),
    ("vocab_size", 64, 128),
  ):
    with pytest.raises(ConfigError, match=rf"{key}={value}: the model in \S+ has {key}={own}; leave it out"):
      maxtext_mudd.from_pretrained(tmp_path / "hf", **{key: value})


def test_checkpoints_of_other_keys(tmp_path):
  """MaxText's loader would repeat, cut or leave out parameters."""
  hf.from_hf(hugging_face(tmp_path / "hf"), tmp_path / "maxtext", {})
  file = tmp_path / "maxtext" / "model.yml"
  own = yaml.safe_load(file.read_text())
  for keys, message in (
    (
      {"vocab_size": own["vocab_size"] * 2},
      r"decoder/logits_dense/kernel is \[\d+, \d+\], and this configuration needs",
    ),
    ({"mudd_pre_norm": True}, r"has no \S+, which this configuration needs; name the keys that the model was"),
    ({"mudd_dynamic": False}, r"has decoder/layers_1/connection/\S+, which this configuration does not have"),
  ):
    file.write_text(yaml.safe_dump(own | keys))
    with pytest.raises(ConfigError, match=message):
      maxtext_mudd.from_pretrained(tmp_path / "maxtext")
