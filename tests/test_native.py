"""Models in this project's format of Hugging Face: to the bit and back. `make test-hf` runs them in PyTorch."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import maxtext_mudd
from maxtext_mudd import convert
from maxtext_mudd.checkpoints import model_config, orbax_folder, staging
from maxtext_mudd.checkpoints import model_folder as folders
from maxtext_mudd.checkpoints.hugging_face import models as hf
from maxtext_mudd.checkpoints.hugging_face import native
from maxtext_mudd.config.errors import ConfigError
from tests import models, native_models, upcycling
from tests.published import BYTES, check_logits, check_same, hugging_face
from tests.test_from_run import from_run, saved_run

FAST = ("both norms", "mixtral, scanned")
FILES = {"config.json", "configuration_muddformer.py", "modeling_muddformer.py", "model.safetensors"}


@pytest.mark.parametrize(
  "form", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in native_models.FORMS]
)
def test_round_trip(form, tmp_path, capsys):
  """From a run's parameters to PyTorch's and back: the same bits, and the same configuration."""
  model = native_models.save(form, tmp_path / "m")
  convert.main(["to-hf", "--maxtext-dir", str(tmp_path / "m"), "--hf-dir", str(tmp_path / "d")])
  assert capsys.readouterr().out.strip() == f"{tmp_path}/d: loads with trust_remote_code"
  assert {x.name for x in (tmp_path / "d").iterdir()} == FILES
  convert.main(["from-hf", "--hf-dir", str(tmp_path / "d"), "--maxtext-dir", str(tmp_path / "back")])
  again, _ = maxtext_mudd.from_pretrained(tmp_path / "back")
  expected = {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}
  found = {path: np.asarray(x.get_value()) for path, x in models.parameters(again).items()}
  assert found.keys() == expected.keys()
  check_same(found, expected)
  before, after = (folders.read_keys(tmp_path / x) for x in ("m", "back"))
  assert after["scan_layers"] is False
  for key, value in before.items():
    assert after[key] == value or key == "scan_layers", key


@pytest.mark.parametrize("name", ["muddformer_tiny", pytest.param("muddpythia_tiny", marks=pytest.mark.slow)])
def test_published_models_can_be_exported_again(name, tmp_path):
  """The folder of the authors, as this project's format, as a checkpoint: golden logits, and the authors' tensors."""
  convert.main(["re-export", "--from", str(models.DATA / name), "--to", str(tmp_path / "native")])
  assert {x.name for x in tmp_path.iterdir()} == {"native"}
  assert {x.name for x in (tmp_path / "native").iterdir()} == FILES
  model, _ = maxtext_mudd.from_pretrained(tmp_path / "native")
  check_logits(model, name)
  hf.from_hf(tmp_path / "native", tmp_path / "again", {})
  hf.to_hf(tmp_path / "again", tmp_path / "released", released=True)
  check_same(
    load_file(tmp_path / "released" / "model.safetensors"), load_file(models.DATA / name / "model.safetensors")
  )


EXPERTS = {"decoder_block": "mixtral", **native_models.EXPERTS}
REFUSED = {
  "depth_connection": ({"depth_connection": "mhc"}, "depth_connection=mhc is not in the PyTorch model, which has "),
  "block": ({"decoder_block": "qwen2"}, "decoder_block=qwen2 has no PyTorch model here; those of llama2, mistral, "),
  "experts, of another block": (EXPERTS | {"decoder_block": "gpt_oss"}, "decoder_block=gpt_oss has no PyTorch model "),
  "experts, of none": (EXPERTS | {"decoder_block": "llama2"}, "num_experts=4 is not in the PyTorch model, which has "),
  "dropped tokens": (EXPERTS | {"capacity_factor": 1.5}, "capacity_factor=1.5 is not in the PyTorch model, which has "),
  "a router's bias": (EXPERTS | {"routed_bias": True}, "routed_bias=True is not in the PyTorch model, which has "),
  "a router's scores": (
    EXPERTS | {"routed_score_func": "sigmoid"},
    "routed_score_func=sigmoid is not in the PyTorch model, which has routed_score_func=''.",
  ),
  "fused experts": (EXPERTS | {"prefuse_moe_weights": True}, "prefuse_moe_weights=True is not in the PyTorch model, "),
  "MTP": ({"mtp_num_layers": 1}, "mtp_num_layers=1 is not in the PyTorch model, which has mtp_num_layers=0."),
  "positions": (
    {"use_untrainable_positional_embedding": True},
    "use_untrainable_positional_embedding=True is not in the PyTorch model, which has ",
  ),
  "soft cap": ({"final_logits_soft_cap": 30.0}, "final_logits_soft_cap=30.0 is not in the PyTorch model, which has "),
  "extra embeddings": ({"mudd_extra_embeddings": 1}, "mudd_extra_embeddings=1 is not in the PyTorch model, which has "),
  "a shared MLP": (
    {"mudd_placements": [{"block": i, "sources": "last:2", "streams": "r", "mlp": "a"} for i in (2, 4)]},
    "mudd_placements: DA_2 shares its MLP, a, and DAs of the PyTorch model do not.",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_pytorch_does_not_have(case):
  changes, sentence = REFUSED[case]
  keys = native_models.KEYS | changes
  config = model_config.build(keys | model_config.local_keys())
  with pytest.raises(ConfigError) as refused:
    native.fields(config, keys)
  assert str(refused.value).startswith(sentence)


def save_zeros(folder, **changes):
  keys = native_models.KEYS | {"base_num_decoder_layers": 2} | changes
  config = model_config.build(keys | model_config.local_keys())
  zeros = {path: jnp.zeros(x.shape, x.dtype) for path, x in model_config.parameter_shapes(config).items()}
  with staging.staged(folder) as stage:
    folders.save(stage, config, zeros, keys)
  return zeros


@pytest.mark.parametrize("is_scanned", [False, True])
def test_arrays_of_experts_are_read_once(is_scanned, tmp_path, monkeypatch):
  """Each has a tensor for each expert, and to-hf does not read it for each of these."""
  shapes = save_zeros(tmp_path / "m", **EXPERTS, scan_layers=is_scanned)
  reads, parameters = [], orbax_folder.parameters

  def counted(name, x):
    return dataclasses.replace(x, read=lambda: reads.append(name) or x.read())

  monkeypatch.setattr(
    orbax_folder, "parameters", lambda path: {name: counted(name, x) for name, x in parameters(path).items()}
  )
  hf.to_hf(tmp_path / "m", tmp_path / "d")
  assert sorted(reads) == sorted(shapes)


def test_folders_that_others_changed(tmp_path):
  save_zeros(tmp_path / "m")
  hf.to_hf(tmp_path / "m", tmp_path / "d")
  file = tmp_path / "d" / "config.json"
  fields = json.loads(file.read_text())
  kept = fields[native.MAXTEXT_KEYS]
  for changed, sentence in (
    ({native.MAXTEXT_KEYS: None}, "config.json has no maxtext_keys, which to-hf writes; convert the model again."),
    (
      {"weight_cap": 3.0},
      "config.json: weight_cap=3.0, and its maxtext_keys are of a model with 0.0; change both or none.",
    ),
    ({native.MAXTEXT_KEYS: kept | {"steps": 3}}, "config.json: maxtext_keys has steps, which is no key of a model; "),
  ):
    file.write_text(json.dumps(fields | changed))
    with pytest.raises(ConfigError, match=re.escape(sentence)):
      hf.from_hf(tmp_path / "d", tmp_path / "back", {})
    assert not (tmp_path / "back").exists()


@pytest.mark.slow
def test_special_tokens_are_those_of_the_tokenizer(tmp_path):
  source = hugging_face(tmp_path / "hf")
  shutil.copytree(BYTES, source, dirs_exist_ok=True)
  settings = source / "tokenizer_config.json"  # as transformers 5 saves it, with a name that 4 does not know
  settings.write_text(settings.read_text().replace("PreTrainedTokenizerFast", "TokenizersBackend"))
  hf.from_hf(source, tmp_path / "m", {})
  hf.to_hf(tmp_path / "m", tmp_path / "d")
  fields = json.loads((tmp_path / "d" / "config.json").read_text())
  assert [fields[name] for name in native.TOKENIZER_FIELDS] == [1, 2, 0, "PreTrainedTokenizerFast"]
  written = json.loads((tmp_path / "d" / "tokenizer_config.json").read_text())
  assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert (tmp_path / "d" / "tokenizer.json").exists()


def test_a_failed_export_leaves_nothing(tmp_path, capsys):
  source, target = hugging_face(tmp_path / "hf"), tmp_path / "new" / "d"
  fields = json.loads((source / "config.json").read_text())
  (source / "config.json").write_text(json.dumps(fields | {"n_head": 3}))
  for there in (target, source):
    with pytest.raises(SystemExit):
      convert.main(["re-export", "--from", str(source), "--to", str(there)])
  assert {x.name for x in tmp_path.iterdir()} == {"hf"}
  first, second = capsys.readouterr().err.strip().splitlines()[-2:]
  assert first.endswith("is [64, 64], and the model that config.json describes needs [48, 64].")
  assert second == f"maxtext-mudd: {source} exists already; name a folder that does not."


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "upcycled", "scanned run"])
def test_models_of_runs(kind, tmp_path):
  """A checkpoint of a run, and a plain model that got connections, have the same logits after to-hf."""
  keys = ["normalization_layer_epsilon=1e-6", "mlp_activations=[silu,linear]", "logits_via_embedding=false"]
  if kind == "upcycled":
    _, values = upcycling.trained()
    source = upcycling.save(tmp_path / "plain", values)
    upcycling.upcycle(source, tmp_path / "m", upcycling.config_file(tmp_path), "mudd=true")
  else:
    keys += ["scan_layers=true", "mudd_ffn_groups=2"] if kind == "scanned run" else []
    from_run(saved_run(tmp_path / "saved" / "9", *keys), tmp_path / "m", *keys)
  hf.to_hf(tmp_path / "m", tmp_path / "d")
  tokens = np.random.default_rng(0).integers(3, 64, (2, 8))
  expected, found = (
    np.asarray(maxtext_mudd.logits(maxtext_mudd.from_pretrained(tmp_path / x)[0], tokens)) for x in "md"
  )
  assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
