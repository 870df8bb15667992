"""Released models in and out: golden logits, round trips to the bit, and what is refused."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

from flax import nnx, traverse_util
from maxtext.input_pipeline import tokenizer
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import maxtext_mudd
from maxtext_mudd import assets, convert, topology
from maxtext_mudd.checkpoints import folder, fork, hf, hf_config, hf_files, hf_names, tensors
from maxtext_mudd.checkpoints import layout as layouts
from maxtext_mudd.errors import ConfigError
from tests import models, runs
from tests.test_golden import LOGITS_TOLERANCE

RELEASED = ("muddformer_tiny", "muddpythia_tiny")
LAYOUTS = {"single": False, "scanned": True}


def each_layout(names, fast):
  """Every name in both layouts; fast: the pairs that are not left to the slow tests."""
  pairs = [(name, layout) for name in names for layout in LAYOUTS]
  return [pair if pair in fast else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


def hugging_face(path: pathlib.Path, name: str = "muddformer_tiny") -> pathlib.Path:
  """A folder as it is published."""
  path.mkdir()
  for file in ("config.json", "model.safetensors"):
    shutil.copyfile(models.DATA / name / file, path / file)
  return path


def check_logits(model, name: str, expected: str = "logits") -> None:
  golden = load_file(models.DATA / name / "golden.safetensors")
  found = maxtext_mudd.logits(model, golden["input_ids"])
  assert found.dtype == np.float32
  assert np.abs(found - golden[expected]).max() <= LOGITS_TOLERANCE


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
  hf.to_hf(target, back)
  assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
  check_same(load_file(back / "model.safetensors"), load_file(source / "model.safetensors"))
  assert not list(tmp_path.glob(".*.partial"))


def check_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
  assert found.keys() == expected.keys()
  for tensor, x in expected.items():
    assert found[tensor].dtype == x.dtype
    np.testing.assert_array_equal(found[tensor], x, err_msg=tensor)


@pytest.mark.slow
def test_fields_that_no_original_tells(tmp_path):
  """A model without `hf_config.json`, as one trained here, gets the same fields, but for what is the tokenizer's."""
  for name in RELEASED:
    source, target = hugging_face(tmp_path / name, name), tmp_path / f"{name}-maxtext"
    hf.from_hf(source, target, {})
    (target / hf.ORIGINAL).unlink()
    hf.to_hf(target, tmp_path / f"{name}-back")
    found, expected = (json.loads((x / "config.json").read_text()) for x in (tmp_path / f"{name}-back", source))
    own = {key: x for key, x in expected.items() if key not in ("bos_token_id", "eos_token_id", "transformers_version")}
    assert found == own


def test_half_precision_comes_back_as_it_was(tmp_path):
  source = hugging_face(tmp_path / "hf")
  fields = json.loads((source / "config.json").read_text()) | {"torch_dtype": "float16"}
  (source / "config.json").write_text(json.dumps(fields))
  halves = {key: x.astype(np.float16) for key, x in load_file(source / "model.safetensors").items()}
  save_file(halves, source / "model.safetensors")
  hf.from_hf(source, tmp_path / "maxtext", {})
  hf.to_hf(tmp_path / "maxtext", tmp_path / "back")
  check_same(load_file(tmp_path / "back" / "model.safetensors"), halves)


def in_shards(path: pathlib.Path, monkeypatch) -> dict[str, str]:
  """Rewrites a folder in shards; which file has which tensor."""
  values = load_file(path / "model.safetensors")
  (path / "model.safetensors").unlink()
  monkeypatch.setattr(tensors, "SHARD_BYTES", 400_000)
  tensors.write(path, {name: (x.shape, x.dtype, lambda x=x: x) for name, x in values.items()})
  return json.loads((path / tensors.INDEX).read_text())["weight_map"]


def test_shards(tmp_path, monkeypatch):
  source, single = hugging_face(tmp_path / "shards"), hugging_face(tmp_path / "single")
  where = in_shards(source, monkeypatch)
  assert (
    sorted(set(where.values()))[-1]
    == f"model-{len(set(where.values())):05}-of-{len(set(where.values())):05}.safetensors"
  )
  found, expected = (hf_files.open_folder(x) for x in (source, single))
  assert found.keys() == expected.keys()
  assert all(np.array_equal(found[name].read(), x.read()) for name, x in expected.items())
  assert {name: x.file.name for name, x in found.items()} == where
  assert sum(x.size for x in found.values()) == sum(x.read().nbytes for x in expected.values())


def as_bin(path: pathlib.Path) -> None:
  """The tensors as PyTorch's own files, in two shards."""
  torch = pytest.importorskip("torch", reason="PyTorch is not one of the requirements")
  values = {name: torch.from_numpy(x) for name, x in load_file(path / "model.safetensors").items()}
  values["norm.weight"] = values["norm.weight"].to(torch.bfloat16)
  values["output.weight"] = values["output.weight"].T.contiguous().T  # strides of its own
  names = sorted(values)
  where = {name: f"pytorch_model-0000{1 + (i > 9)}-of-00002.bin" for i, name in enumerate(names)}
  for file in set(where.values()):
    torch.save({name: values[name] for name in names if where[name] == file}, path / file)
  (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
  (path / "model.safetensors").unlink()


def test_bin_files(tmp_path):
  source, single = hugging_face(tmp_path / "bin"), hugging_face(tmp_path / "single")
  as_bin(source)
  found, expected = (hf_files.open_folder(x) for x in (source, single))
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    half = found[name].read()
    assert half.dtype == found[name].dtype == (ml_dtypes.bfloat16 if name == "norm.weight" else np.float32)
    np.testing.assert_array_equal(half, x.read().astype(half.dtype))
  maxtext_mudd.from_pretrained(source)
  file = source / "pytorch_model-00002-of-00002.bin"
  file.write_bytes(file.read_bytes()[:1000])
  with pytest.raises(ConfigError, match=r"00002\.bin cannot be read; it is cut off or damaged"):
    hf.from_hf(source, tmp_path / "made", {})
  assert not (tmp_path / "made").exists()


def test_bin_files_without_pytorch(tmp_path, monkeypatch):
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(
    ConfigError, match=r"model\.bin needs PyTorch to be read; install it \(pip install torch\), or save"
  ):
    hf_files.open_folder(tmp_path)


BYTES = assets.BYTE_TOKENIZER_FOLDER


@pytest.mark.slow
def test_tokenizers_go_with_the_model(tmp_path):
  source, target, moved = hugging_face(tmp_path / "hf"), tmp_path / "maxtext", tmp_path / "moved"
  shutil.copytree(BYTES, source, dirs_exist_ok=True)
  _, config = maxtext_mudd.from_pretrained(source)
  assert (config.tokenizer_type.value, config.tokenizer_path) == ("huggingface", str(source))
  words = tokenizer.build_tokenizer(config.tokenizer_path, "huggingface", False, False, "")
  assert words.decode(words.encode("MUDD")) == "MUDD"

  hf.from_hf(source, target, {})
  assert folder.keys(target)["tokenizer_path"] == str(target / "tokenizer")
  target.rename(moved)
  assert folder.keys(moved)["tokenizer_path"] == str(moved / "tokenizer")
  hf.to_hf(moved, tmp_path / "back")
  for file in BYTES.iterdir():
    assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def changed(path: pathlib.Path, change) -> None:
  values = load_file(path / "model.safetensors")
  change(values)
  save_file(values, path / "model.safetensors")


def of_nan(values):
  values["layers.3.attention.wq.weight"][5, 7] = np.nan


def misshapen(values):
  values["dense_bs.2"] = values["dense_bs.2"][:, :-1].copy()


def other_widths(values):
  values["layers.0.feed_forward.w1.weight"] = np.zeros((136, 64), np.float32)


def fields(**keys):
  def change(path):
    own = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: x for key, x in (own | keys).items() if x is not None}))

  return change


BROKEN = {
  "a missing tensor": (
    lambda path: changed(path, lambda values: values.pop("layers.4.ffn_norm.weight")),
    "has no tensor layers.4.ffn_norm.weight, which config.json makes one expect.",
  ),
  "an extra tensor": (
    lambda path: changed(path, lambda values: values.update(lm_head=np.zeros(3, np.float32))),
    "model.safetensors has lm_head, which is no tensor of the model that config.json describes.",
  ),
  "a misshapen tensor": (
    lambda path: changed(path, misshapen),
    "dense_bs.2 is [4, 3], and config.json makes one expect [4, 4].",
  ),
  "NaN": (
    lambda path: changed(path, of_nan),
    "layers.3.attention.wq.weight has entries that are NaN or infinite; the model is broken.",
  ),
  "a truncated file": (
    lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9]),
    "model.safetensors cannot be read; it is cut off or damaged",
  ),
  "no tensors": (
    lambda path: (path / "model.safetensors").unlink(),
    "has none of model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json; ",
  ),
  "FFN widths of no rule": (
    lambda path: changed(path, other_widths),
    "config.json: intermediate_size=256 makes FFNs of 128, 128, 256, 256, 384, 384 where they are re-allocated, and "
    "the weights have 136, 128, 256, 256, 384, 384.",
  ),
  "an unknown kind": (
    fields(model_type="llama"),
    "config.json: model_type=llama is not known; muddformer and muddpythia are.",
  ),
  "other connections": (
    fields(dense_type="l"),
    "config.json: dense_type=l is not supported; dense_type=qkvr is.",
  ),
  "a missing field": (fields(n_head=None), "config.json has no n_head."),
  "fewer layers than tensors": (
    fields(n_layer=5),
    "config.json: n_layer=5, and the weights have the FFNs of 6 layers.",
  ),
  "integers": (
    lambda path: changed(path, lambda values: values.update({"norm.weight": np.zeros(64, np.int8)})),
    "norm.weight is of I8; tensors of F64, F32, F16, BF16 can be read.",
  ),
  "a size in words": (fields(dim="64"), "config.json: dim='64' is not a whole number above 0."),
  "half a layer": (fields(n_layer=6.0), "config.json: n_layer=6.0 is not a whole number above 0."),
  "a doubtful truth": (fields(round64="false"), "config.json: round64='false' is not true or false."),
  "no epsilon": (fields(norm_eps=0), "config.json: norm_eps=0 is not a number above 0."),
  "no JSON": (lambda path: (path / "config.json").write_text("{"), "config.json is not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refusals(case, tmp_path):
  source = hugging_face(tmp_path / "hf")
  breaks, message = BROKEN[case]
  breaks(source)
  with pytest.raises(ConfigError, match=re.escape(message)):
    hf.from_hf(source, tmp_path / "maxtext", {})
  assert [x.name for x in tmp_path.iterdir()] == ["hf"]


def test_shards_that_do_not_fit_their_index(tmp_path, monkeypatch):
  source = hugging_face(tmp_path / "hf")
  index = {"weight_map": in_shards(source, monkeypatch) | {"norm.weight": "model-00001-of-00005.safetensors"}}
  (source / tensors.INDEX).write_text(json.dumps(index))
  with pytest.raises(ConfigError, match=r"model-00001-of-00005\.safetensors has no norm\.weight, which model\.safe"):
    hf_files.open_folder(source)
  (source / tensors.INDEX).write_text('{"weight_map": ["a"]}')
  with pytest.raises(ConfigError, match=r"index\.json is not the index of a model"):
    hf_files.open_folder(source)


def test_a_missing_shard(tmp_path, monkeypatch):
  source = hugging_face(tmp_path / "hf")
  in_shards(source, monkeypatch)
  (source / "model-00002-of-00005.safetensors").unlink()
  with pytest.raises(
    ConfigError, match=r"model-00002-of-00005\.safetensors is missing, and model\.safetensors\.index\.json"
  ):
    hf_files.open_folder(source)


def test_targets_are_never_written_over(tmp_path, capsys):
  source, target, made = hugging_face(tmp_path / "hf"), tmp_path / "there", tmp_path / "made"
  target.mkdir()
  hf.from_hf(source, made, {})
  capsys.readouterr()
  for command in (
    ["from-hf", "--hf-dir", str(source), "--maxtext-dir", str(target)],
    ["from-hf", "--hf-dir", str(source), "--maxtext-dir", "gs://bucket/m"],
    ["from-hf", "--hf-dir", str(source), "--maxtext-dir", str(target), "scan_layers"],
    ["from-hf", "--hf-dir", str(source), "--maxtext-dir", str(target), "mudd_wayz=1"],
    ["to-hf", "--maxtext-dir", str(target), "--hf-dir", str(source)],
  del index["weight_map"]["norm.weight"]
  (source / tensors.INDEX).write_text(json.dumps(index))
  with pytest.raises(ConfigError, match=r"00005\.safetensors has norm\.weight, which \S+ does not name there"):
    hf_files.open_folder(source)
    ["to-hf", "--maxtext-dir", str(made), "--hf-dir", str(source)],
    ["from-hf", "--hf-dir", str(source), "--maxtext-dir", str(tmp_path / "new"), "head_dim=32"],
    [
      "from-hf",
      "--hf-dir",
      str(source),
      "--maxtext-dir",
      str(tmp_path / "new"),
      "scan_layers=true",
      "mudd_ffn_groups=2",
    ],
  ):
    with pytest.raises(SystemExit) as ended:
      convert.main(command)
    assert ended.value.code == 2
  said = [
    x.removeprefix("maxtext-mudd: ") for x in capsys.readouterr().err.splitlines() if x.startswith("maxtext-mudd")
  ]
  assert said == [
    f"{target} exists already; name a folder that does not.",
    "gs://bucket/m is not a local folder; copy it first.",
    "scan_layers is not key=value, as scan_layers=true is.",
    "mudd_wayz is not a configuration key; the nearest is mudd_ways.",
    f"{target} has no model.yml; name a folder that from-hf made.",
    f"{source} exists already; name a folder that does not.",
    f"head_dim=32: the model in {source} has head_dim=16; leave it out.",
    f"mudd_ffn_groups=2: the model in {source} has FFNs of other widths; leave it out, and each gets a group of its "
    "own.",
  ]
  assert not list(target.iterdir())


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
  source = hugging_face(tmp_path / "hf")

  save = folder.save

  def stop(*arguments):
    save(*arguments)
    raise KeyboardInterrupt

  monkeypatch.setattr(folder, "save", stop)
  with pytest.raises(KeyboardInterrupt):
    hf.from_hf(source, tmp_path / "maxtext", {})
  assert [x.name for x in tmp_path.iterdir()] == ["hf"]


def test_models_that_the_authors_code_does_not_have(tmp_path):
  source, target = hugging_face(tmp_path / "hf"), tmp_path / "maxtext"
  hf.from_hf(source, target, {})
  (target / folder.CONFIG).write_text((target / folder.CONFIG).read_text() + "mudd_window: 2\n")
  with pytest.raises(ConfigError, match=r"mudd_window=2 is not in the authors' MUDDFormer, which has mudd_window=0\."):
    hf.to_hf(target, tmp_path / "back")
  assert not (tmp_path / "back").exists()


def test_exports_say_what_the_checkpoint_is_now(tmp_path):
  """A longer context goes into config.json, whatever the original said."""
  source, target = hugging_face(tmp_path / "hf"), tmp_path / "maxtext"
  hf.from_hf(source, target, {"max_target_length": 4096})
  hf.to_hf(target, tmp_path / "back")
  found, expected = (json.loads((x / "config.json").read_text()) for x in (tmp_path / "back", source))
  assert found == expected | {"block_size": 4096}


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
  with pytest.raises(ConfigError, match=r"maxtext cannot be read; it is damaged"):
    maxtext_mudd.from_pretrained("maxtext")


def test_folders_that_hold_no_model(tmp_path):
  (tmp_path / "part").mkdir()
  shutil.copyfile(models.DATA / "muddformer_tiny" / "model.safetensors", tmp_path / "part" / "model.safetensors")
  with pytest.raises(ConfigError, match=r"part/config\.json cannot be read \(No such file"):
    maxtext_mudd.from_pretrained(tmp_path / "part")
  for path, message in (
    (tmp_path / "none", "is not a folder"),
    (tmp_path, "holds no model: neither model.yml, model.safetensors nor params"),
  ):
    with pytest.raises(ConfigError, match=message):
      maxtext_mudd.from_pretrained(path)


def test_overrides(tmp_path):
  model, config = maxtext_mudd.from_pretrained(hugging_face(tmp_path / "hf"), dtype="bfloat16", weight_dtype="bfloat16")
  assert config.dtype == "bfloat16"
  assert {x.get_value().dtype.name for _, x in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {"bfloat16"}
  with pytest.raises(ValueError, match=r"tokens are \[3\]; they have to be \[batch, length\]"):
    maxtext_mudd.logits(model, [1, 2, 3])


FORK = ("muddjax_plain", "muddjax_prepost")


@pytest.mark.parametrize(("name", "layout"), each_layout(FORK, [("muddjax_plain", "single")]))
def test_golden_logits_of_the_fork(name, layout):
  model, _ = maxtext_mudd.from_pretrained(models.DATA / name, scan_layers=LAYOUTS[layout])
  golden = load_file(models.DATA / name / "golden.safetensors")
  rows = {"positions": golden["inputs_position"], "segment_ids": golden["inputs_segmentation"]}
  assert np.abs(maxtext_mudd.logits(model, golden["inputs"], **rows) - golden["logits"]).max() <= LOGITS_TOLERANCE


@pytest.mark.slow
def test_the_fork_s_orbax_folders(tmp_path):
  """Of parameters alone, or of a whole train state, give what `params.safetensors` gives, to the bit."""
  source = models.DATA / "muddjax_prepost"
  values = load_file(source / fork.FILE)
  tree = {"params": traverse_util.unflatten_dict({tuple(name.split("/")): x for name, x in values.items()})}
  ocp.PyTreeCheckpointer().save(tmp_path / "params", tree)
  ocp.PyTreeCheckpointer().save(tmp_path / "run" / "items", {"params": tree, "step": np.zeros((), np.int32)})
  for name in ("params", "run"):
    shutil.copyfile(source / "config.json", tmp_path / name / "config.json")
  made = []
  for number, path in enumerate((source, tmp_path / "params", tmp_path / "run")):
    target = tmp_path / f"maxtext{number}"
    convert.main(["from-fork", "--fork-dir", str(path), "--maxtext-dir", str(target), f"scan_layers={number == 2}"])
    config = folder.configuration(folder.keys(target) | folder.here())
    values = folder.restore(target, config)
    made.append(layouts.unstack(values, config) if config.scan_layers else values)
  for found in made[1:]:
    check_same(found, made[0])


def edited(**changes):
  def edit(path, values):
    for name, x in changes.items():
      values.pop(name) if x is None else values.update({name: x})
    save_file(values, path / fork.FILE)

  return edit


OF_FORK = {
  "a missing parameter": (
    edited(**{"decoder/layers_2/mlp/wo/kernel": None}),
    "has no decoder/layers_2/mlp/wo/kernel, which this configuration needs.",
  ),
  "an extra parameter": (
    edited(**{"decoder/layers_2/mgate/kernel": np.zeros(3, np.float32)}),
    "has decoder/layers_2/mgate/kernel, for which this configuration has no place.",
  ),
  "a misshapen parameter": (
    edited(**{"decoder/layers_2/mlp/wo/kernel": np.zeros((3, 64), np.float32)}),
    "decoder/layers_2/mlp/wo/kernel is [3, 64], and this configuration needs [256, 64].",
  ),
  "infinity": (
    edited(**{"decoder/decoder_norm/scale": np.full(64, np.inf, np.float32)}),
    "decoder/decoder_norm/scale has entries that are NaN or infinite; the model is broken.",
  ),
  "another model": (edited(**{"token_embedder/embedding": None}), "has no token_embedder/embedding; name a folder"),
  "a flat kernel": (
    edited(**{"decoder/layers_0/self_attention/query/kernel": np.zeros((64, 64), np.float32)}),
    "has a decoder/layers_0/self_attention/query/kernel of [64, 64]; name a folder with a MUDD model of the fork.",
  ),
  "FFN widths of no rule": (
    edited(**{"decoder/layers_0/mlp/wi_0/kernel": np.zeros((64, 8), np.float32)}),
    "FFNs of 8, 128, 256, 256, 384, 384 are not what re-allocation makes of mlp_dim=256; write it to config.json.",
  ),
}


# Found when the layers are put together.
WHERE_SCANNED = {
  "a missing parameter": "has no decoder/layers_2/mlp/wo/kernel, which the other layers have.",
  "an extra parameter": "has no decoder/layers_3/mgate/kernel, which the other layers have.",
  "a misshapen parameter": "cannot be scanned: ",
}


@pytest.mark.parametrize("case", OF_FORK)
@pytest.mark.parametrize("scan", [False, True], ids=["single", "scanned"])
def test_refusals_of_the_fork(case, scan, tmp_path):
  source = tmp_path / "fork"
  source.mkdir()
  shutil.copyfile(models.DATA / "muddjax_plain" / "config.json", source / "config.json")
  edit, message = OF_FORK[case]
  edit(source, load_file(models.DATA / "muddjax_plain" / fork.FILE))
  message = WHERE_SCANNED.get(case, message) if scan else message
  with pytest.raises(ConfigError, match=re.escape(message)):
    fork.from_fork(source, tmp_path / "maxtext", {"scan_layers": scan})
  assert [x.name for x in tmp_path.iterdir()] == ["fork"]


MEASURE = """
import pathlib, sys, threading, time
from maxtext_mudd import plugin
plugin.install()
from maxtext_mudd.checkpoints import folder, hf

def resident():
  return int(open("/proc/self/statm").read().split()[1]) * 4096

def watch():
  global most
  while True:
    most = max(most, resident())
    time.sleep(0.005)

source, target = map(pathlib.Path, sys.argv[2:])
model = hf.Model(source) if sys.argv[1] == "from" else None
keys = model.keys | {"scan_layers": False} if model else folder.keys(source)
folder.parameter_shapes(folder.configuration(keys | folder.here()))  # what tracing takes is no part of it
before = most = resident()
threading.Thread(target=watch, daemon=True).start()
hf.from_hf(source, target, {"scan_layers": True}) if model else hf.to_hf(source, target)
print(most - before)
"""


@pytest.mark.slow
def test_memory(tmp_path, monkeypatch):
  """Of 1.1 GB: the model once and one shard, of two in, and of one out."""
  source = tmp_path / "hf"
  source.mkdir()
  sizes = {"n_layer": 8, "dim": 1536, "n_head": 12, "n_local_heads": 12, "head_dim": 128, "intermediate_size": 4096}
  fields = json.loads((models.DATA / "muddformer_tiny" / "config.json").read_text()) | sizes | {"vocab_size": 16384}
  widths = topology.ffn_widths(4096, 8, **topology.RELEASED_FFN)
  config = folder.configuration(hf_config.keys(fields, widths, "") | folder.here() | {"scan_layers": False})
  random = np.random.default_rng(0)

  def values(shape):
    return lambda: random.standard_normal(shape, dtype=np.float32)

  made = {x.tensor: (x.tensor_shape, np.float32, values(x.tensor_shape)) for x in hf_names.names(config)}
  monkeypatch.setattr(tensors, "SHARD_BYTES", 6 * 10**8)
  tensors.write(source, made)
  (source / "config.json").write_text(json.dumps(fields))
  size = hf.Model(source).size
  assert size > 10**9
  for way, start, end, shard in (
    ("from", source, tmp_path / "m", 6 * 10**8),
    ("to", tmp_path / "m", tmp_path / "b", size),
  ):
    command = [sys.executable, "-c", MEASURE, way, str(start), str(end)]
    finished = subprocess.run(
      command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, check=True
    )
    assert int(finished.stdout.splitlines()[-1]) <= size + shard, way
  check_same(
    load_file(tmp_path / "b" / "model.safetensors"),
    {name: x.read() for name, x in hf_files.open_folder(source).items()},
  )
