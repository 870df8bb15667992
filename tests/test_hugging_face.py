"""Models in the format of Hugging Face: golden logits, round trips to the bit, and exports of models trained here."""

import json
import re
import shutil

import jax.numpy as jnp
from maxtext.input_pipeline import tokenizer
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import maxtext_mudd
from maxtext_mudd import convert
from maxtext_mudd.checkpoints import model_config, model_folder, staging, tensors
from maxtext_mudd.checkpoints.hugging_face import config_json as hf_config
from maxtext_mudd.checkpoints.hugging_face import files as hf_files
from maxtext_mudd.checkpoints.hugging_face import models as hf
from maxtext_mudd.config.errors import ConfigError
from tests import models, native_models
from tests.published import BYTES, LAYOUTS, RELEASED, check_logits, check_same, each_layout, hugging_face


@pytest.mark.parametrize(("name", "layout"), each_layout(RELEASED, [("muddpythia_tiny", "scanned")]))
def test_golden_logits(name, layout, tmp_path):
  model, config = maxtext_mudd.from_pretrained(hugging_face(tmp_path / name, name), scan_layers=LAYOUTS[layout])
  assert config.scan_layers == LAYOUTS[layout]
  check_logits(model, name)


@pytest.mark.parametrize(
  ("name", "table"),
  [
    ("muddformer_tiny", "bfloat16"),
    pytest.param("muddpythia_tiny", "float16", marks=pytest.mark.slow),
  ],
)
def test_half_precision_of_the_released_code(name, table):
  model, _ = maxtext_mudd.from_pretrained(models.DATA / name, mudd_rope_table=table)
  check_logits(model, name, "asis_logits")


@pytest.mark.parametrize(("name", "layout"), each_layout(RELEASED, [("muddformer_tiny", "single")]))
def test_round_trip(name, layout, tmp_path, capsys):
  """To a checkpoint of MaxText, whose logits are the golden ones, and back to the bit."""
  source, target, back = hugging_face(tmp_path / name, name), tmp_path / "maxtext", tmp_path / "back"
  layout = LAYOUTS[layout]
  convert.main(["from-hf", "--hf-dir", str(source), "--maxtext-dir", str(target), f"scan_layers={layout}"])
  assert f"load_parameters_path={target}/items" in capsys.readouterr().out
  model, config = maxtext_mudd.from_pretrained(target)
  assert config.scan_layers == layout
  check_logits(model, name)
  hf.to_hf(target, back, released=True)
  assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
  assert len({x.stat().st_mode for x in back.iterdir()}) == 1
  check_same(load_file(back / "model.safetensors"), load_file(source / "model.safetensors"))
  assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.slow
def test_fields_that_no_original_tells(tmp_path):
  """A model without `hf_config.json`, as one trained here, gets the same fields, but for what is the tokenizer's."""
  for name in RELEASED:
    source, target = hugging_face(tmp_path / name, name), tmp_path / f"{name}-maxtext"
    hf.from_hf(source, target, {})
    (target / hf.ORIGINAL).unlink()
    hf.to_hf(target, tmp_path / f"{name}-back", released=True)
    found, expected = (json.loads((x / "config.json").read_text()) for x in (tmp_path / f"{name}-back", source))
    own = {key: x for key, x in expected.items() if key not in ("bos_token_id", "eos_token_id", "transformers_version")}
    assert found == own


def test_half_precision_comes_back_as_it_was(tmp_path, monkeypatch):
  """Of both kinds, in a checkpoint of float32 meanwhile, and in as many shards as one wants."""
  source = hugging_face(tmp_path / "hf")
  fields = json.loads((source / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
  (source / "config.json").write_text(json.dumps(fields))
  halves = {
    key: x.astype(np.float16 if "norm" in key else ml_dtypes.bfloat16)
    for key, x in load_file(source / "model.safetensors").items()
  }
  save_file(halves, source / "model.safetensors")
  hf.from_hf(source, tmp_path / "maxtext", {})
  monkeypatch.setattr(tensors, "SHARD_BYTES", 200_000)
  hf.to_hf(tmp_path / "maxtext", tmp_path / "back", released=True)
  back = hf_files.open_folder(tmp_path / "back")
  assert len({x.file for x in back.values()}) > 4
  check_same({name: x.read() for name, x in back.items()}, halves)


@pytest.mark.slow
def test_tokenizers_go_with_the_model(tmp_path):
  source, target, moved = hugging_face(tmp_path / "hf"), tmp_path / "maxtext", tmp_path / "moved"
  shutil.copytree(BYTES, source, dirs_exist_ok=True)
  _, config = maxtext_mudd.from_pretrained(source)
  assert (config.tokenizer_type.value, config.tokenizer_path) == ("huggingface", str(source))
  words = tokenizer.build_tokenizer(config.tokenizer_path, "huggingface", False, False, "")
  assert words.decode(words.encode("MUDD")) == "MUDD"

  hf.from_hf(source, target, {})
  assert model_folder.read_keys(target)["tokenizer_path"] == str(target / "tokenizer")
  target.rename(moved)
  assert model_folder.read_keys(moved)["tokenizer_path"] == str(moved / "tokenizer")
  hf.to_hf(moved, tmp_path / "back", released=True)
  for file in BYTES.iterdir():
    assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


class Changed:
  """A configuration with other values, unchecked."""

  def __init__(self, config, changes):
    self._config, self._changes = config, changes

  def __getattr__(self, key):
    return self._changes[key] if key in self._changes else getattr(self._config, key)


def test_models_that_the_authors_code_does_not_have():
  keys = hf.Model(models.DATA / "muddformer_tiny").keys | {"scan_layers": False}
  config = model_config.build(keys | model_config.local_keys())
  for changes, found, expected in (
    ({"mudd_window": 2}, "mudd_window=2", "mudd_window=0"),
    ({"mudd_dynamic": False}, "mudd_dynamic=False", "mudd_dynamic=True"),
    ({"mudd_ffn_reallocation": False}, "mudd_ffn_reallocation=False", "mudd_ffn_reallocation=True"),
    ({"mudd_ffn_round_to": 64}, "FFN widths 128, 192, 256, 256, 320, 384", "re-allocates 256 by its rule"),
    ({"base_num_kv_heads": 2}, "base_num_kv_heads=2", "base_num_kv_heads=4"),
    ({"head_dim": 32}, "head_dim=32", "head_dim=16"),
    ({"final_logits_soft_cap": 30.0}, "final_logits_soft_cap=30.0", "final_logits_soft_cap=0"),
    ({"attn_logits_soft_cap": 30.0}, "attn_logits_soft_cap=30.0", "attn_logits_soft_cap=0"),
    ({"rope_type": "yarn"}, "rope_type=yarn", "rope_type=default"),
    ({"rope_min_timescale": 2}, "rope_min_timescale=2", "rope_min_timescale=1"),
    ({"rope_linear_scaling_factor": 4.0}, "rope_linear_scaling_factor=4.0", "rope_linear_scaling_factor=1.0"),
    ({"attention_type": "local_sliding"}, "attention_type=local_sliding", "attention_type=global"),
  ):
    with pytest.raises(ConfigError, match=f"{found} (is|are) not in the authors' MUDDFormer, which .*{expected}"):
      hf_config.fields(Changed(config, changes), {})


@pytest.mark.parametrize(("block", "head_dim"), [("llama2", 16), pytest.param("mistral", 12, marks=pytest.mark.slow)])
def test_blocks_that_keep_the_scale_of_scores_in_the_query_kernel(block, head_dim, tmp_path):
  """What such models are in the authors' code, which scales scores: the same function, and to the bit where
  sqrt(head_dim) is a power of two."""
  heads = {"base_num_query_heads": 2, "base_num_kv_heads": 2, "head_dim": head_dim, "base_emb_dim": 2 * head_dim}
  keys = native_models.KEYS | heads | {"decoder_block": block, "base_num_decoder_layers": 3, "base_mlp_dim": 256}
  keys |= {"mudd_ffn_reallocation": True, "max_target_length": 16}
  local_keys = keys | model_config.local_keys()
  config = model_config.build(local_keys)
  model = models.build(model_config.build(local_keys | {"dtype": "float32", "attention": "dot_product"}))
  values = models.randomise(model)
  with staging.staged(tmp_path / "maxtext") as stage:
    model_folder.save(stage, config, {path: jnp.asarray(x) for path, x in values.items()}, keys)
  hf.to_hf(tmp_path / "maxtext", tmp_path / "hf", released=True)

  made, made_config = maxtext_mudd.from_pretrained(tmp_path / "hf")
  assert made_config.decoder_block.value == "qwen3"
  tokens = np.random.default_rng(1).integers(0, 64, (2, 16))
  found, expected = (maxtext_mudd.logits(x, tokens) for x in (made, model))
  # The export scales kernels of queries, which rounds; the error seen is 4e-6.
  assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
  tensor = load_file(tmp_path / "hf" / "model.safetensors")["layers.2.attention.wq.weight"]
  kernel = values["decoder/layers_2/self_attention/query/kernel"].reshape(2 * head_dim, -1).T
  np.testing.assert_array_equal(tensor, (kernel.astype(np.float64) * head_dim**0.5).astype(np.float32))


def test_exports_leave_no_parameter_behind(tmp_path):
  source, target = hugging_face(tmp_path / "hf"), tmp_path / "maxtext"
  hf.from_hf(source, target, {})
  (target / model_folder.CONFIG).write_text((target / model_folder.CONFIG).read_text() + "use_qk_norm: false\n")
  with pytest.raises(ConfigError, match=r"maxtext has decoder/layers_0/self_attention/key_norm/scale, which the model"):
    hf.to_hf(target, tmp_path / "back", released=True)
  assert sorted(x.name for x in tmp_path.iterdir()) == ["hf", "maxtext"]


def test_exports_say_what_the_checkpoint_is_now(tmp_path, capsys):
  """A longer context goes into config.json, whatever the original said; code goes along, and progress is shown. Keys of
  how a model is computed go into its folder, and are not in config.json."""
  source, target = hugging_face(tmp_path / "hf"), tmp_path / "maxtext"
  fields = json.loads((source / "config.json").read_text())
  del fields["stack_hidden"]  # as in the published models
  (source / "config.json").write_text(json.dumps(fields))
  code = ("configuration_muddformer.py", "modeling_muddformer.py", "generation_config.json")
  for name in code:
    (source / name).write_text(f"# {name}\n")
  computed = {"attention": "dot_product", "dtype": "bfloat16", "per_device_batch_size": 2, "enable_dropout": False}
  hf.from_hf(source, target, {"max_target_length": 4096, **computed})
  assert computed.items() <= model_folder.read_keys(target).items()
  capsys.readouterr()
  hf.to_hf(target, tmp_path / "back", released=True)
  assert re.search(r"maxtext: 100%.*1\.77M/1\.77M", capsys.readouterr().err)
  found, expected = (json.loads((x / "config.json").read_text()) for x in (tmp_path / "back", source))
  assert found == expected | {"block_size": 4096}
  for name in code:
    assert (tmp_path / "back" / name).read_text() == f"# {name}\n"
