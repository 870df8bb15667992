"""Models of runs: `from-run`, its tokenizers, and the keys that go with a model."""

import pathlib
import shutil
import types

from flax import traverse_util
import maxtext
from maxtext.configs import pyconfig
from maxtext.configs.types import TokenizerType
from maxtext.input_pipeline import tokenizer
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from maxtext_mudd import convert
from maxtext_mudd.checkpoints import model_config, model_folder, model_keys, parameters, tokenizers
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.config.keys import MuddKeys
from maxtext_mudd.config.optimizer import OptimizerKeys
from tests import models, runs
from tests.blocks import config_of
from tests.published import BYTES


def saved_run(path: pathlib.Path, *keys: str) -> pathlib.Path:
  """A checkpoint of a run of tests/run.yml as MaxText saves it, less the moments."""
  config = pyconfig.initialize(["", runs.RUN_YML, *keys], **model_config.local_keys())
  random = np.random.default_rng(0)
  values = {
    tuple(name.split("/")): random.standard_normal(x.shape).astype(x.dtype)
    for name, x in model_config.parameter_shapes(config).items()
  }
  tree = {"params": {"params": traverse_util.unflatten_dict(values)}}
  ocp.PyTreeCheckpointer().save(path / "items", tree)
  return path


def from_run(path: pathlib.Path, target: pathlib.Path, *keys: str) -> None:
  convert.main(["from-run", "--checkpoint", str(path), "--maxtext-dir", str(target), runs.RUN_YML, *keys])


ONE_FILE = pathlib.Path(maxtext.__path__[0]) / "assets" / "tokenizers" / "tokenizer.default"


def test_a_run_of_bfloat16(tmp_path):
  """With a tokenizer of SentencePiece, which goes along wherever the folder goes."""
  keys = ("weight_dtype=bfloat16", "tokenizer_type=sentencepiece", f"tokenizer_path={ONE_FILE}")
  made, moved = tmp_path / "m", tmp_path / "moved"
  from_run(saved_run(tmp_path / "run", *keys), made, *keys)
  own = yaml.safe_load((made / "model.yml").read_text())
  assert own["weight_dtype"] == "bfloat16"
  assert own["tokenizer_path"] == str(made / "tokenizer" / ONE_FILE.name)
  made.rename(moved)
  config = model_config.build(model_folder.read_keys(moved) | model_config.local_keys())
  assert config.weight_dtype == "bfloat16"
  assert config.tokenizer_type.value == "sentencepiece"
  words = tokenizer.build_tokenizer(config.tokenizer_path, "sentencepiece", False, False, "")
  assert pathlib.Path(config.tokenizer_path).parent == moved / "tokenizer"
  assert words.decode(words.encode("MUDD")) == "MUDD"


def test_a_model_whose_layers_read_its_name(tmp_path, capsys):
  """A model folder leaves the name out, so it cannot hold such a model."""
  sizes = {"emb_dim": 32, "num_query_heads": 2, "num_kv_heads": 2, "mlp_dim": 64, "num_decoder_layers": 4}
  keys = ["model_name=olmo3-7b", "override_model_config=true", "head_dim=16", "vocab_size=264", "mudd_init=stock"]
  keys += ["mudd=false", "mudd_ffn_reallocation=false", *(f"base_{key}={size}" for key, size in sizes.items())]
  run = saved_run(tmp_path / "run", *keys)
  with pytest.raises(SystemExit):
    from_run(run, tmp_path / "m", *keys)
  assert capsys.readouterr().err.splitlines()[-1] == (
    "maxtext-mudd: model_name=olmo3-7b: its layers read this name, which a model folder cannot hold; use "
    f"load_parameters_path={run / 'items'} with the keys of the run instead."
  )
  assert not (tmp_path / "m").exists()


def test_a_key_that_maxtext_would_read_otherwise(tmp_path, capsys, monkeypatch):
  """As if MaxText derived one that the folder leaves out from a key that the folder has."""

  def build_otherwise(keys):
    derived = {"normalize_embedding_logits": False} if "enable_dropout" in keys else {}
    return build(keys | derived)

  run, build = saved_run(tmp_path / "run"), model_config.build
  monkeypatch.setattr(model_config, "build", build_otherwise)
  with pytest.raises(SystemExit):
    from_run(run, tmp_path / "m")
  assert capsys.readouterr().err.splitlines()[-1] == (
    "maxtext-mudd: normalize_embedding_logits=True cannot be kept in a model folder: MaxText would read False from it; "
    f"use load_parameters_path={run / 'items'} with the keys of the run instead."
  )
  assert not (tmp_path / "m").exists()


# What MaxText's files of models say that is no part of a model: of optimizers, meshes, data, checkpoints and precision.
OF_RUNS = {
  *("opt_type", "gradient_clipping_threshold", "adam_b1", "adam_b2", "adam_eps", "adam_weight_decay"),
  *("enable_dropout", "mesh_axes", "data_sharding", "logical_axis_rules", "override_logical_axis_rules", "shard_mode"),
  *("remove_size_one_mesh_axis_from_type", "dataset_path", "dataset_name", "eval_dataset_name"),
  *("eval_per_device_batch_size", "target_eval_loss", "checkpoint_period", "attention", "dtype", "base_config"),
}


def test_keys_of_maxtext_s_own_models_are_kept():
  files = list((pathlib.Path(maxtext.__path__[0]) / "configs" / "models").rglob("*.yml"))
  named = {key for file in files for key in yaml.safe_load(file.read_text()) or ()}
  assert {"base_emb_dim", "rope_max_timescale", "num_experts"} <= named & model_keys.KEYS
  assert named - model_keys.KEYS == OF_RUNS
  assert MuddKeys.model_fields.keys() - model_keys.KEYS == OptimizerKeys.model_fields.keys()


def with_tokenizer(path, kind):
  return types.SimpleNamespace(tokenizer_path=str(path), tokenizer_type=TokenizerType(kind))


def test_tokenizers_of_runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("vocab.txt").write_text("a")  # of something else
  pathlib.Path("words").write_text("YQ== 0")
  target = tmp_path / "tokenizer"
  for path, kind, expected, files in (
    ("", "sentencepiece", {}, 0),
    ("words", "sentencepiece", {"tokenizer_path": f"{target}/words", "tokenizer_type": "sentencepiece"}, 1),
    ("words", "tiktoken", {"tokenizer_path": f"{target}/words.tiktoken", "tokenizer_type": "tiktoken"}, 1),
    ("an/other", "huggingface", {}, 0),
    ("words", "huggingface", {"tokenizer_path": f"{tmp_path}/words"}, 0),
    (
      BYTES,
      "huggingface",
      {"tokenizer_path": str(target), "tokenizer_type": "huggingface"},
      len(list(BYTES.iterdir())),
    ),
  ):
    config = with_tokenizer(path, kind)
    assert tokenizers.run_keys(config, target) == expected
    tokenizers.copy_run_tokenizer(config, target)
    assert len(list(target.iterdir()) if target.exists() else []) == files
    shutil.rmtree(target, ignore_errors=True)


def test_a_run_s_keys_are_its_model_s(tmp_path):
  """None that makes its function is left out, whatever group of MaxText's it is in, and none of the run is in it."""
  given = {
    "routed_score_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "moba": True,
    "moba_chunk_size": 8,
    "moba_topk": 2,
    "capacity_factor": 1.5,
    "sparse_matmul": False,
    "megablox": False,
    "mlp_activations_limit": 7.0,
    "num_experts": 4,
    "base_moe_mlp_dim": 64,
    "decoder_block": "qwen3_moe",
    "attention_type": "local_sliding",
    "sliding_window_size": 16,
    "load_balance_loss_weight": 0.01,
    "scan_layers": True,
    "param_scan_axis": 0,
  }
  of_run = ("steps=7", "learning_rate=0.1", "per_device_batch_size=1", "remat_policy=full", "opt_type=adamw")
  words = {key: f"{x}".lower() if isinstance(x, bool) else x for key, x in given.items()}
  model = [*(f"{key}={x}" for key, x in words.items()), "mudd_ffn_reallocation=false", "tokenizer_path="]
  from_run(saved_run(tmp_path / "run", *model, *of_run), tmp_path / "m", *model, *of_run)
  found = model_folder.read_keys(tmp_path / "m")
  assert {key: found.get(key) for key in given} == given
  assert not {x.split("=")[0] for x in of_run} & found.keys()
  again = model_config.build(found | model_config.local_keys())
  own = {key: x for key, x in found.items() if key != "base_config"}  # of files alone
  assert {key: model_keys.plain(getattr(again, key)) for key in own} == own
  assert {"routed_score_func", "moba", "moba_topk", "capacity_factor"} <= model_keys.FUNCTION
  keys = {key: x for key, x in found.items() if key != "routed_score_func"}
  with pytest.raises(
    ConfigError, match="routed_score_func=sigmoid: the model in m has routed_score_func=; leave it out"
  ):
    model_config.with_overrides(keys, {"routed_score_func": "sigmoid"}, pathlib.Path("m"))


def test_state_that_is_no_parameter():
  """Router biases are, but in models of these names."""
  parameters.check_state(config_of("gpt_oss", mudd=True))
  keys = {"model_name": "deepseek3-tiny", "override_model_config": True, "routed_bias": True}
  with pytest.raises(
    ConfigError, match=r"^routed_bias=True and model_name=deepseek3-tiny: the biases of routers are not"
  ):
    parameters.check_state(config_of("deepseek", mudd=True, **keys))


def test_quantized_models_with_more_than_parameters():
  """A checkpoint is not read for a configuration that needs scales of it, or quantized parameters."""
  for keys, message in (
    (
      {"quantization": "int8", "checkpoint_is_quantized": True},
      "checkpoint_is_quantized=True: only float parameters are read; name a checkpoint of a run, and set it to False: "
      "quantization quantizes the parameters while the model runs.",
    ),
    (
      {"quantization": "fp8"},
      "quantization=fp8: its scales are not parameters, and only parameters are read of a checkpoint; leave it empty, "
      "or set quantization=fp8 and use_qwix_quantization=True, which computes scales anew.",
    ),
  ):
    with pytest.raises(ConfigError) as refused:
      parameters.load(models.config(mudd=True, load_parameters_path="nowhere", **keys))
    assert str(refused.value) == message
