"""Released models in and out: golden logits, round trips to the bit, and what is refused."""

import contextlib
import json
import logging
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

from flax import nnx, traverse_util
import jax.numpy as jnp
import maxtext
from maxtext.configs import pyconfig
from maxtext.configs.types import MaxTextConfig, TokenizerType
from maxtext.input_pipeline import tokenizer
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file
import yaml

import maxtext_mudd
from maxtext_mudd import assets, convert
from maxtext_mudd.checkpoints import layout as layouts
from maxtext_mudd.checkpoints import model_config, model_folder, model_keys, run, staging, tensors, tokenizers
from maxtext_mudd.checkpoints import orbax_folder as saved
from maxtext_mudd.checkpoints.authors_jax import config_json as fork_config
from maxtext_mudd.checkpoints.authors_jax import models as fork
from maxtext_mudd.checkpoints.hugging_face import config_json as hf_config
from maxtext_mudd.checkpoints.hugging_face import files as hf_files
from maxtext_mudd.checkpoints.hugging_face import models as hf
from maxtext_mudd.checkpoints.hugging_face import names as hf_names
from maxtext_mudd.config import errors
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.connections.mudd import topology
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
  assert len({x.stat().st_mode for x in back.iterdir()}) == 1
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
  hf.to_hf(tmp_path / "maxtext", tmp_path / "back")
  back = hf_files.open_folder(tmp_path / "back")
  assert len({x.file for x in back.values()}) > 4
  check_same({name: x.read() for name, x in back.items()}, halves)


def in_shards(path: pathlib.Path, monkeypatch) -> dict[str, str]:
  """Rewrites a folder in shards; which file has which tensor."""
  values = load_file(path / "model.safetensors")
  (path / "model.safetensors").unlink()
  monkeypatch.setattr(tensors, "SHARD_BYTES", 400_000)
  tensors.write(path, {name: tensors.Output(x.shape, x.dtype, lambda x=x: x) for name, x in values.items()})
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


def test_shards_that_were_left_beside_one_file(tmp_path, monkeypatch):
  """Are not read, by transformers neither."""
  source = hugging_face(tmp_path / "hf")
  in_shards(source, monkeypatch)
  save_file({"new": np.zeros(3, np.float32)}, source / "model.safetensors")
  assert hf_files.open_folder(source).keys() == {"new"}


def test_values_that_do_not_fit_a_dtype_of_the_same_size():
  with pytest.raises(ConfigError, match=r"^w has entries too large for float16; convert to float32\.$"):
    tensors.cast(np.asarray([1e5], ml_dtypes.bfloat16), np.dtype("float16"), "w")


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


def test_bin_files_of_pytorch_s_older_format(tmp_path, monkeypatch):
  """Are no zip files, and PyTorch refuses to map them."""

  def load(file, map_location, mmap, weights_only):
    if mmap:
      raise RuntimeError("mmap can only be used with files saved with `torch.save(_use_new_zipfile_serialization=True)")
    return {}

  torch = types.SimpleNamespace(float32=0, float16=1, bfloat16=2, Tensor=np.ndarray, load=load)
  monkeypatch.setitem(sys.modules, "torch", torch)
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
  assert hf_files.open_folder(tmp_path) == {}


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
  assert model_folder.read_keys(target)["tokenizer_path"] == str(target / "tokenizer")
  target.rename(moved)
  assert model_folder.read_keys(moved)["tokenizer_path"] == str(moved / "tokenizer")
  hf.to_hf(moved, tmp_path / "back")
  for file in BYTES.iterdir():
    assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def changed(path: pathlib.Path, change) -> None:
  values = load_file(path / "model.safetensors")
  change(values)
  save_file(values, path / "model.safetensors")


def of_nan(values):
  values["layers.3.attention.wq.weight"][5, 7] = np.nan


def with_tensor(name, value):
  """A change of a folder: this value for one of its tensors, or what a function makes of its own."""

  def change(values):
    values[name] = value(values[name]).copy() if callable(value) else value

  return lambda path: changed(path, change)


def fields(**keys):
  def change(path):
    own = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: x for key, x in (own | keys).items() if x is not None}))

  return change


BROKEN = {
  "a missing tensor": (
    lambda path: changed(path, lambda values: values.pop("layers.4.ffn_norm.weight")),
    "has no tensor layers.4.ffn_norm.weight, which the model that config.json describes needs.",
  ),
  "an extra tensor": (
    lambda path: changed(path, lambda values: values.update(lm_head=np.zeros(3, np.float32))),
    "model.safetensors has lm_head, which the model that config.json describes does not have.",
  ),
  "a misshapen tensor": (
    with_tensor("dense_bs.2", lambda x: x[:, :-1]),
    "dense_bs.2 is [4, 3], and the model that config.json describes needs [4, 4].",
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
    with_tensor("layers.0.feed_forward.w1.weight", np.zeros((136, 64), np.float32)),
    "layers.0.feed_forward.w1.weight is [136, 64], and the model that config.json describes needs [128, 64].",
  ),
  "an FFN that is missing": (
    lambda path: changed(path, lambda values: values.pop("layers.3.feed_forward.w1.weight")),
    "has no tensor layers.3.feed_forward.w1.weight, which the model that config.json describes needs.",
  ),
  "a transposed FFN": (
    with_tensor("layers.3.feed_forward.w1.weight", np.transpose),
    "layers.3.feed_forward.w1.weight is [64, 256], and the model that config.json describes needs [256, 64].",
  ),
  "another width": (
    fields(intermediate_size=384),
    "layers.0.feed_forward.w1.weight is [128, 64], and the model that config.json describes needs [256, 64].",
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
    "config.json: n_layer=5, and the weights have 6 layers.",
  ),
  "integers": (
    with_tensor("norm.weight", np.zeros(64, np.int8)),
    "norm.weight is of I8; tensors of F32, F16, BF16 can be read.",
  ),
  "what would be rounded": (
    with_tensor("norm.weight", np.ones(64, np.float64)),
    "norm.weight is of F64; tensors of F32, F16, BF16 can be read.",
  ),
  "a size in words": (fields(dim="64"), "config.json: dim='64' is not a whole number above 0."),
  "half a layer": (fields(n_layer=6.0), "config.json: n_layer=6.0 is not a whole number above 0."),
  "a doubtful truth": (fields(round64="false"), "config.json: round64='false' is not true or false."),
  "no epsilon": (fields(norm_eps=0), "config.json: norm_eps=0 is not a finite number above 0."),
  "an infinite epsilon": (fields(norm_eps=np.inf), "config.json: norm_eps=inf is not a finite number above 0."),
  "an undefined base": (fields(rope_base=np.nan), "config.json: rope_base=nan is not a finite number above 0."),
  "another rotation": (
    fields(rope_scaling={"factor": 2}),
    "config.json: rope_scaling={'factor': 2} is not a field of the authors' MUDDFormer, and would change the model.",
  ),
  "static weights only": (
    fields(dynamic_dense=False),
    "config.json: dynamic_dense=False is not supported; dynamic_dense=True is.",
  ),
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
  del index["weight_map"]["norm.weight"]
  (source / tensors.INDEX).write_text(json.dumps(index))
  with pytest.raises(ConfigError, match=r"00005\.safetensors has norm\.weight, which \S+ does not name there"):
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
    f"{target} has no model.yml; name a folder that from-hf or from-run made.",
    f"{source} exists already; name a folder that does not.",
    f"head_dim=32: the model in {source} has head_dim=16; leave it out.",
    f"mudd_ffn_groups=2: the model in {source} has FFNs of other widths; leave it out, and each gets a group of its "
    "own.",
  ]
  assert not list(target.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_that_libraries_swallow(number, tmp_path):
  with pytest.raises(KeyboardInterrupt), staging.staged(tmp_path / "made"), contextlib.suppress(KeyboardInterrupt):
    signal.raise_signal(number)
  assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
  source = hugging_face(tmp_path / "hf")

  save = model_folder.save

  def stop(*arguments):
    save(*arguments)
    raise KeyboardInterrupt

  monkeypatch.setattr(model_folder, "save", stop)
  with pytest.raises(KeyboardInterrupt):
    hf.from_hf(source, tmp_path / "new" / "deep" / "maxtext", {})
  assert [x.name for x in tmp_path.iterdir()] == ["hf"]


def test_what_a_killed_conversion_left_is_removed(tmp_path):
  for name in (".m[1].partial", ".m1.partial"):
    (tmp_path / name / "made.orbax-checkpoint-tmp" / "items").mkdir(parents=True)
  (tmp_path / ".m[1].partial" / "made").mkdir()
  with staging.staged(tmp_path / "m[1]") as stage:
    assert sorted(x.name for x in tmp_path.iterdir()) == [".m1.partial", ".m[1].partial"]
    assert [x for x in stage.parent.iterdir() if not x.name.startswith(".")] == [stage]
    assert not list(stage.iterdir())
  assert sorted(x.name for x in tmp_path.iterdir()) == [".m1.partial", "m[1]"]


def test_two_conversions_to_one_folder(tmp_path):
  """The second is refused while the first lives, and touches nothing; targets with alike names are others."""
  with staging.staged(tmp_path / "m.partial2") as other, staging.staged(tmp_path / "m") as stage:
    (other / "a").write_text("")
    (stage / "b").write_text("")
    with (
      pytest.raises(ConfigError, match=r"/m is being written by another process; wait for it, or name another folder"),
      staging.staged(tmp_path / "m"),
    ):
      pass
    code = "import pathlib, sys; from maxtext_mudd.checkpoints import locks\n"
    code += "with locks.exclusive_folder(*map(pathlib.Path, sys.argv[1:])): pass"
    command = [sys.executable, "-c", code, str(tmp_path / ".m.partial"), str(tmp_path / "m")]
    finished = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True)
    assert "ConfigError" in finished.stderr and "is being written by another process" in finished.stderr
  assert [str(x.relative_to(tmp_path)) for x in sorted(tmp_path.rglob("*"))] == [
    "m",
    "m/b",
    "m.partial2",
    "m.partial2/a",
  ]


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (OSError(28, "No space left on device"), "made cannot be written (No space left on device); name a folder that"),
    (PermissionError(13, "Permission denied", "{}/made"), "made cannot be written (Permission denied); name a folder"),
    (PermissionError(13, "Permission denied", "/hf/merges.txt"), "/hf/merges.txt cannot be read (Permission denied)"),
  ],
)
def test_what_cannot_be_read_or_written_is_named(error, message, tmp_path):
  if error.filename:
    error.filename = error.filename.format(tmp_path)
  with pytest.raises(ConfigError, match=re.escape(message)), staging.staged(tmp_path / "made"):
    raise error
  assert not list(tmp_path.iterdir())


def test_hosts_that_jax_was_not_to_have(monkeypatch):
  def unknown(backend):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(model_folder.jax, "local_devices", unknown)
  with pytest.raises(ConfigError, match=r"JAX_PLATFORMS=\S+ leaves out cpu, .*; set JAX_PLATFORMS=\S+,cpu\."):
    model_folder.cpu_device()


INTERRUPT = """
import pathlib, signal, sys, threading, time
from maxtext_mudd import plugin
plugin.install()
from maxtext_mudd.checkpoints.hugging_face import models as hf

source, target = map(pathlib.Path, sys.argv[1:])

def watch():
  while not list(target.parent.glob(".*.partial/*.orbax-checkpoint-tmp*")):
    time.sleep(0.0005)
  signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

threading.Thread(target=watch, daemon=True).start()
hf.from_hf(source, target, {})
"""


@pytest.mark.slow
def test_an_interrupt_while_orbax_writes_leaves_nothing(tmp_path):
  command = [sys.executable, "-c", INTERRUPT, str(models.DATA / "muddformer_tiny"), str(tmp_path / "new" / "maxtext")]
  finished = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True)
  assert finished.stderr.rstrip().endswith("KeyboardInterrupt")
  assert finished.stderr.count("Traceback") == 1
  assert not list(tmp_path.iterdir())


class Changed:
  """A configuration with other values, unchecked."""

  def __init__(self, config, changes):
    self._config, self._changes = config, changes

  def __getattr__(self, key):
    return self._changes[key] if key in self._changes else getattr(self._config, key)


def test_models_that_the_authors_code_does_not_have():
  config = model_config.build(
    hf.Model(models.DATA / "muddformer_tiny").keys | model_config.local_keys() | {"scan_layers": False}
  )
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
  keys = {
    "mudd": True,
    "mudd_ffn_reallocation": True,
    "decoder_block": block,
    "base_mlp_dim": 256,
    "base_num_decoder_layers": 3,
    "base_emb_dim": 2 * head_dim,
    "base_num_query_heads": 2,
    "base_num_kv_heads": 2,
    "head_dim": head_dim,
    "vocab_size": 64,
    "max_target_length": 16,
    "normalization_layer_epsilon": 1e-6,
    "logits_via_embedding": False,
    "mlp_activations": ["silu", "linear"],
    "enable_dropout": False,
    "scan_layers": False,
    "weight_dtype": "float32",
  }
  config = model_config.build(keys | model_config.local_keys())
  model = models.build(
    model_config.build(keys | model_config.local_keys() | {"dtype": "float32", "attention": "dot_product"})
  )
  values = models.randomise(model)
  with staging.staged(tmp_path / "maxtext") as stage:
    model_folder.save(stage, config, {path: jnp.asarray(x) for path, x in values.items()}, keys)
  hf.to_hf(tmp_path / "maxtext", tmp_path / "hf")

  made, made_config = maxtext_mudd.from_pretrained(tmp_path / "hf")
  assert made_config.decoder_block.value == "qwen3"
  tokens = np.random.default_rng(1).integers(0, 64, (2, 16))
  found, expected = (maxtext_mudd.logits(x, tokens) for x in (made, model))
  assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
  tensor = load_file(tmp_path / "hf" / "model.safetensors")["layers.2.attention.wq.weight"]
  kernel = values["decoder/layers_2/self_attention/query/kernel"].reshape(2 * head_dim, -1).T
  np.testing.assert_array_equal(tensor, (kernel.astype(np.float64) * head_dim**0.5).astype(np.float32))


def test_exports_leave_no_parameter_behind(tmp_path):
  source, target = hugging_face(tmp_path / "hf"), tmp_path / "maxtext"
  hf.from_hf(source, target, {})
  (target / model_folder.CONFIG).write_text((target / model_folder.CONFIG).read_text() + "use_qk_norm: false\n")
  with pytest.raises(ConfigError, match=r"maxtext has decoder/layers_0/self_attention/key_norm/scale, which the model"):
    hf.to_hf(target, tmp_path / "back")
  assert sorted(x.name for x in tmp_path.iterdir()) == ["hf", "maxtext"]


def test_exports_say_what_the_checkpoint_is_now(tmp_path, capsys):
  """A longer context goes into config.json, whatever the original said; code goes along, and progress is shown."""
  source, target = hugging_face(tmp_path / "hf"), tmp_path / "maxtext"
  fields = json.loads((source / "config.json").read_text())
  del fields["stack_hidden"]  # as in the published models
  (source / "config.json").write_text(json.dumps(fields))
  code = ("configuration_muddformer.py", "modeling_muddformer.py", "generation_config.json")
  for name in code:
    (source / name).write_text(f"# {name}\n")
  hf.from_hf(source, target, {"max_target_length": 4096})
  capsys.readouterr()
  hf.to_hf(target, tmp_path / "back")
  assert re.search(r"maxtext: 100%.*1\.77M/1\.77M", capsys.readouterr().err)
  found, expected = (json.loads((x / "config.json").read_text()) for x in (tmp_path / "back", source))
  assert found == expected | {"block_size": 4096}
  for name in code:
    assert (tmp_path / "back" / name).read_text() == f"# {name}\n"


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
    (tmp_path, "holds no model: neither model.yml, model.safetensors nor params"),
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
    ([1, 2, 3], "tokens are [3]; they have to be [batch, length]."),
    ([[1, 2], [3]], "tokens are rows of different lengths; they have to be [batch, length]."),
    ([[1.5]], "tokens are float64; they have to be whole numbers."),
    ([[1] * 99], f"tokens are [1, 99], longer than the context, max_target_length={config.max_target_length}."),
    ([[1, size]], f"tokens hold {size}, and the model has vocab_size={size}."),
    (jnp.asarray([[1, -1]]), f"tokens hold -1, and the model has vocab_size={size}."),
  ):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
      maxtext_mudd.logits(model, tokens)
  for positions in ([[0, 1, 2]], [[0.5, 1]]):
    with pytest.raises(ValueError, match=r"positions are .+; they have to be whole numbers \[batch, length\]"):
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


FORK = ("muddjax_plain", "muddjax_prepost")


@pytest.mark.parametrize(("name", "layout"), each_layout(FORK, [("muddjax_plain", "single")]))
def test_golden_logits_of_the_fork(name, layout):
  model, _ = maxtext_mudd.from_pretrained(models.DATA / name, scan_layers=LAYOUTS[layout])
  golden = load_file(models.DATA / name / "golden.safetensors")
  rows = {"positions": golden["inputs_position"], "segment_ids": golden["inputs_segmentation"]}
  assert np.abs(maxtext_mudd.logits(model, golden["inputs"], **rows) - golden["logits"]).max() <= LOGITS_TOLERANCE


@pytest.mark.slow
def test_the_fork_s_orbax_folders(tmp_path):
  """Parameters alone, and a train state, as the authors save it, too: what `params.safetensors` gives, to the bit."""
  source = models.DATA / "muddjax_prepost"
  values = load_file(source / fork.FILE)
  tree = {"params": traverse_util.unflatten_dict({tuple(name.split("/")): x for name, x in values.items()})}
  ocp.PyTreeCheckpointer().save(tmp_path / "params", tree)
  state = {"params": tree, "step": np.zeros((), np.int32)}
  ocp.PyTreeCheckpointer().save(tmp_path / "run" / "items", state)
  # As the authors' code saves: a file for each array, under this name.
  ocp.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "100" / "state", state | {"opt_state": {"mu": tree}})
  for name in ("params", "run", "100"):
    shutil.copyfile(source / "config.json", tmp_path / name / "config.json")
  made = []
  for number, path in enumerate((source, tmp_path / "params", tmp_path / "run", tmp_path / "100")):
    target = tmp_path / f"maxtext{number}"
    convert.main(["from-fork", "--fork-dir", str(path), "--maxtext-dir", str(target), f"scan_layers={number == 2}"])
    config = model_config.build(model_folder.read_keys(target) | model_config.local_keys())
    values = {name: x.read() for name, x in saved.parameters(target / "items").items()}
    made.append(layouts.unstack(values, config) if config.scan_layers else values)
  for found in made[1:]:
    check_same(found, made[0])


def edited(**changes):
  def edit(path, values):
    for name, x in changes.items():
      values.pop(name) if x is None else values.update({name: x})
    save_file(values, path / fork.FILE)

  return edit


def with_parameter(name, change):
  """An edit: what a function makes of one parameter."""
  return lambda path, values: edited(**{name: np.ascontiguousarray(change(values[name]))})(path, values)


NEEDS = "and the model that its other parameters describe needs"
OF_FORK = {
  "a missing parameter": (
    edited(**{"decoder/layers_2/mlp/wo/kernel": None}),
    "has no decoder/layers_2/mlp/wo/kernel, which the model that its other parameters describe needs.",
  ),
  "a missing aggregate": (
    edited(**{"decoder/layers_0/dynamic_dense_conn1/kernel": None}),
    "has no decoder/layers_0/dynamic_dense_conn1/kernel, which the model that its other parameters describe needs.",
  ),
  "a missing FFN": (
    edited(**{"decoder/layers_2/mlp/wi_0/kernel": None}),
    "has no decoder/layers_2/mlp/wi_0/kernel, which the model that its other parameters describe needs.",
  ),
  "an extra parameter": (
    edited(**{"decoder/layers_2/mgate/kernel": np.zeros(3, np.float32)}),
    "has decoder/layers_2/mgate/kernel, which the model that its other parameters describe does not have.",
  ),
  "a misshapen parameter": (
    edited(**{"decoder/layers_2/mlp/wo/kernel": np.zeros((3, 64), np.float32)}),
    f"decoder/layers_2/mlp/wo/kernel is [3, 64], {NEEDS} [256, 64].",
  ),
  "a narrower aggregate": (
    with_parameter("decoder/layers_2/dynamic_dense_conn1/kernel", lambda x: x[:, :57]),
    f"decoder/layers_2/dynamic_dense_conn1/kernel is [64, 57], {NEEDS} [64, 64].",
  ),
  "fewer hidden weights": (
    with_parameter("decoder/layers_2/dynamic_dense_conn2/kernel", lambda x: x[:57]),
    f"decoder/layers_2/dynamic_dense_conn2/kernel is [57, 4, 4], {NEEDS} [64, 4, 4].",
  ),
  "what would be broadcast": (
    with_parameter("decoder/layers_2/dense_proj2.bias", lambda x: x[:, :1]),
    f"decoder/layers_2/dense_proj2.bias is [4, 1], {NEEDS} [4, 4].",
  ),
  "infinity": (
    edited(**{"decoder/decoder_norm/scale": np.full(64, np.inf, np.float32)}),
    "decoder/decoder_norm/scale has entries that are NaN or infinite; the model is broken.",
  ),
  "64 bits": (
    edited(**{"decoder/decoder_norm/scale": np.ones(64)}),
    "decoder/decoder_norm/scale is of F64; tensors of F32, F16, BF16 can be read.",
  ),
  "a flat kernel": (
    edited(**{"decoder/layers_0/self_attention/query/kernel": np.zeros((64, 64), np.float32)}),
    f"decoder/layers_0/self_attention/query/kernel is [64, 64], {NEEDS} [64, 4, 16].",
  ),
  "FFN widths of no rule": (
    edited(**{"decoder/layers_0/mlp/wi_0/kernel": np.zeros((64, 8), np.float32)}),
    f"decoder/layers_0/mlp/wi_0/kernel is [64, 8], {NEEDS} [64, 128].",
  ),
}


def fork_folder(path: pathlib.Path, **fields) -> pathlib.Path:
  path.mkdir()
  own = json.loads((models.DATA / "muddjax_plain" / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(own | fields))
  return path


@pytest.mark.parametrize(
  ("case", "layout"),
  each_layout(
    OF_FORK,
    [
      ("a missing aggregate", "single"),
      ("an extra parameter", "single"),
      ("a misshapen parameter", "single"),
      ("a narrower aggregate", "scanned"),
      ("what would be broadcast", "scanned"),
    ],
  ),
)
def test_refusals_of_the_fork(case, layout, tmp_path):
  source = fork_folder(tmp_path / "fork")
  edit, message = OF_FORK[case]
  edit(source, load_file(models.DATA / "muddjax_plain" / fork.FILE))
  with pytest.raises(ConfigError, match=re.escape(message)):
    fork.from_fork(source, tmp_path / "maxtext", {"scan_layers": LAYOUTS[layout]})
  assert [x.name for x in tmp_path.iterdir()] == ["fork"]


OF_FORK_ALONE = {  # without config.json
  "another model": (edited(**{"token_embedder/embedding": None}), "has no token_embedder/embedding; name a folder"),
  "a flat kernel": (
    edited(**{"decoder/layers_0/self_attention/query/kernel": np.zeros((64, 64), np.float32)}),
    "has a decoder/layers_0/self_attention/query/kernel of [64, 64]; name a folder with a MUDD model",
  ),
  "FFN widths of no rule": (
    edited(**{"decoder/layers_0/mlp/wi_0/kernel": np.zeros((64, 8), np.float32)}),
    "FFN widths 8, 128, 256, 256, 384, 384 do not follow from re-allocating their mean, 236",
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder/mudd_prenorm/scale", "decoder/mudd_postnorm_3/scale"])
def test_missing_norms_of_the_fork_by_its_own_names(name, tmp_path):
  edited(**{name: None})(tmp_path, load_file(models.DATA / "muddjax_prepost" / fork.FILE))
  shutil.copyfile(models.DATA / "muddjax_prepost" / "config.json", tmp_path / "config.json")
  with pytest.raises(ConfigError, match=f"has no {name}, which the model"):
    maxtext_mudd.from_pretrained(tmp_path)


@pytest.mark.parametrize("case", OF_FORK_ALONE)
def test_parameters_of_the_fork_alone(case, tmp_path):
  edit, message = OF_FORK_ALONE[case]
  edit(tmp_path, load_file(models.DATA / "muddjax_plain" / fork.FILE))
  with pytest.raises(ConfigError, match=re.escape(message)):
    fork.Model(tmp_path)


def test_fields_of_the_fork(tmp_path):
  shapes = {name: x.shape for name, x in tensors.of_file(models.DATA / "muddjax_plain" / fork.FILE).items()}
  told = json.loads((models.DATA / "muddjax_plain" / "config.json").read_text())
  keys = fork_config.keys(shapes, told, tmp_path)
  assert keys == fork_config.keys(shapes, {"max_target_length": 32}, tmp_path)
  for field, value, message in (
    (
      "dynamic_dense_act_cls",
      "relu",
      'dynamic_dense_act_cls="relu" is not supported; dynamic_dense_act_cls="gelu"',
    ),
    (
      "mlp_activations",
      ["gelu", "linear"],
      'mlp_activations=["gelu", "linear"] is not supported; mlp_activations=["s',
    ),
    ("window_size", [4, 4], "window_size=[4, 4] is not supported; window_size=null is."),
    ("dense_conn", False, "dense_conn=false is not supported; dense_conn=true is."),
    ("dense_conn", 1, "dense_conn=1 is not supported; dense_conn=true is."),
    ("logits_via_embedding", True, "logits_via_embedding=true is not supported; logits_via_embedding=false is."),
    ("emb_dim", "64", 'emb_dim="64" is not a whole number above 0.'),
    ("mlp_dim", 256.0, "mlp_dim=256.0 is not a whole number above 0."),
    ("mudd_prenorm", "false", 'mudd_prenorm="false" is not true or false.'),
    ("normalization_layer_epsilon", np.inf, "normalization_layer_epsilon=Infinity is not a finite number above 0."),
    ("num_decoder_layers", 5, "num_decoder_layers=5, and the parameters have 6."),
    (
      "dynamic_dense_hidden_expand",
      [1, 2],
      "dynamic_dense_hidden_expand=[1, 2] is not supported; use one number for",
    ),
  ):
    with pytest.raises(ConfigError, match=re.escape(f"config.json: {message}")):
      fork_config.keys(shapes, told | {field: value}, tmp_path)
  found = fork_config.keys(shapes, told | {"rope_min_timescale": 2, "dynamic_dense_hidden_round": False}, tmp_path)
  assert found == keys | {"rope_min_timescale": 2, "mudd_hidden_round_to": 0}


MEASURE = """
import pathlib, sys, threading, time
from maxtext_mudd import plugin
plugin.install()
from maxtext_mudd.checkpoints import model_config, model_folder, tensors
from maxtext_mudd.checkpoints.authors_jax import models as fork
from maxtext_mudd.checkpoints.hugging_face import models as hf

tensors.SHARD_BYTES = int(sys.argv[4])

def resident():
  return int(open("/proc/self/statm").read().split()[1]) * 4096

def watch():
  global most
  while True:
    most = max(most, resident())
    time.sleep(0.005)

source, target = map(pathlib.Path, sys.argv[2:4])
kind = {"from-hf": hf, "from-fork": fork}.get(sys.argv[1])
keys = kind.Model(source).keys | {"scan_layers": False} if kind else model_folder.read_keys(source)
model_config.parameter_shapes(model_config.build(keys | model_config.local_keys()))  # tracing is not measured
before = most = resident()
threading.Thread(target=watch, daemon=True).start()
if kind:
  model = kind.Model(source)
  model_folder.convert(model, target, {"scan_layers": True}, {})
else:
  hf.to_hf(source, target)
print(most - before)
"""


def most_memory(*command: str | pathlib.Path, shard: int = tensors.SHARD_BYTES) -> int:
  """Of a conversion, in bytes; `shard`: size of those that it writes."""
  command = [sys.executable, "-c", MEASURE, *map(str, command), str(shard)]
  finished = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, check=True)
  return int(finished.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_of_the_fork_s_orbax_folders(tmp_path):
  """Of a train state with parameters of 0.9 GB: these once, no moments, and what is in flight."""
  golden = models.DATA / "muddjax_plain"
  sizes = {"emb_dim": 1536, "num_query_heads": 12, "num_kv_heads": 12, "head_dim": 128, "mlp_dim": 4096}
  source = fork_folder(tmp_path / "run", **sizes, vocab_size=16384)
  shapes = {name: x.shape for name, x in tensors.of_file(golden / fork.FILE).items()}
  keys = fork_config.keys(shapes, json.loads((source / "config.json").read_text()), source)
  wanted = model_config.parameter_shapes(model_config.build(keys | model_config.local_keys() | {"scan_layers": False}))
  random = np.random.default_rng(0)
  values = {
    tuple(name.split("/")): random.standard_normal(wanted[fork.path_of(name, 5)].shape, np.float32) for name in shapes
  }
  size = sum(x.nbytes for x in values.values())
  assert size > 8 * 10**8
  tree = {"params": traverse_util.unflatten_dict(values)}
  ocp.PyTreeCheckpointer().save(source / "items", {"params": tree, "opt_state": {"mu": tree}})
  assert most_memory("from-fork", source, tmp_path / "m") <= size + 6 * 10**8


@pytest.mark.slow
def test_memory(tmp_path, monkeypatch):
  """Of 1.1 GB: the model once and one shard of two in; out, a shard of many, and what is in flight."""
  source = tmp_path / "hf"
  source.mkdir()
  sizes = {"n_layer": 8, "dim": 1536, "n_head": 12, "n_local_heads": 12, "head_dim": 128, "intermediate_size": 4096}
  fields = json.loads((models.DATA / "muddformer_tiny" / "config.json").read_text()) | sizes | {"vocab_size": 16384}
  widths = topology.ffn_widths(4096, 8, **topology.RELEASED_FFN)
  config = model_config.build(hf_config.keys(fields, widths, "") | model_config.local_keys() | {"scan_layers": False})
  random = np.random.default_rng(0)

  def values(shape):
    return lambda: random.standard_normal(shape, dtype=np.float32)

  made = {x.tensor: tensors.Output(x.tensor_shape, np.float32, values(x.tensor_shape)) for x in hf_names.names(config)}
  monkeypatch.setattr(tensors, "SHARD_BYTES", 6 * 10**8)
  tensors.write(source, made)
  (source / "config.json").write_text(json.dumps(fields))
  size = hf.Model(source).size
  assert size > 10**9
  assert most_memory("from-hf", source, tmp_path / "m") <= size + 6 * 10**8
  shard = 10**8
  # Of the largest array, and so of a shard, there are some copies on the way from Orbax to the file.
  assert most_memory("to-hf", tmp_path / "m", tmp_path / "b", shard=shard) <= 7 * shard
  assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 10
  found, expected = (hf_files.open_folder(x) for x in (tmp_path / "b", source))
  assert found.keys() == expected.keys()
  assert all(np.array_equal(found[name].read(), x.read()) for name, x in expected.items())


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


def keys_of_run(*keys: str) -> dict:
  return run._keys(pyconfig.initialize(["", runs.RUN_YML, *keys], **model_config.local_keys()))


def test_a_run_s_keys_are_its_model_s():
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
  found = keys_of_run(*(f"{key}={x}" for key, x in words.items()), "mudd_ffn_reallocation=false", *of_run)
  assert {key: found.get(key) for key in given} == given
  assert not {x.split("=")[0] for x in of_run} & found.keys()
  again = model_config.build(found | model_config.local_keys())
  assert {key: model_keys.plain(getattr(again, key)) for key in found} == found
  assert {"routed_score_func", "moba", "moba_topk", "capacity_factor"} <= model_keys.FUNCTION
  keys = {key: x for key, x in found.items() if key != "routed_score_func"}
  with pytest.raises(
    ConfigError, match="routed_score_func=sigmoid: the model in m has routed_score_func=; leave it out"
  ):
    model_config.with_overrides(keys, {"routed_score_func": "sigmoid"}, pathlib.Path("m"))


OF_MACHINES = re.compile(
  r"(eval_)?(local_)?sa_.*|(ici|dcn)_.*|.*pipeline.*|.*splash.*|lti_.*|cost_.*|experimental_sa_.*"
)
OF_RUNS = """
  ar_cache_axis_order attention attn_module_name check_vma compute_axis_order context_parallel_load_balance
  context_parallel_strategy context_sharding custom_mesh_and_rule dataset_type debug_sharding
  dense_fsdp_use_two_stage_all_gather dq_reduction_steps dropout_rate dtype emb_dim enable_dp_attention enable_dropout
  hf_access_token logical_axis_rules matmul_precision max_prefill_predict_length max_segments_per_seq
  micro_batch_size_to_train_on mlp_dim model_call_mode model_name moe_mlp_dim num_decoder_layers num_kv_heads
  num_query_heads packing parameter_memory_host_offload per_device_batch_size prefill_cache_axis_order
  record_internal_nn_metrics remat_policy reshape_q scan_layers_per_stage shard_mode tensors_on_device
  tensors_to_offload ulysses_context_sharding use_chunked_prefill use_max_logit_estimate
"""


def test_keys_that_a_model_s_folder_does_not_have():
  """Of those that MaxText's layers read, which do not go with a model; a new one has to be judged."""
  root = pathlib.Path(maxtext.__path__[0])
  read = set()
  for file in (*root.glob("layers/*.py"), *root.glob("models/*.py")):
    read |= set(re.findall(r"\b(?:config|cfg)\.(\w+)", file.read_text()))
  left = {key for key in read & MaxTextConfig.model_fields.keys() - model_keys.KEYS if not OF_MACHINES.fullmatch(key)}
  assert left == set(OF_RUNS.split())


@pytest.mark.parametrize("error", [ConfigError("The configuration cannot be read."), AttributeError("'NoneType'")])
def test_interrupts_that_end_in_other_errors(error, tmp_path, monkeypatch, capsys):
  def convert_it(*_, **__):
    with contextlib.suppress(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    raise error

  monkeypatch.setattr(hf, "from_hf", convert_it)
  assert refusal(capsys, "from-hf", "--hf-dir", hugging_face(tmp_path / "hf"), "--maxtext-dir", tmp_path / "m") == (
    "interrupted; nothing was made."
  )
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def refusal(capsys, *command) -> str:
  """What a command says of itself, all in all."""
  capsys.readouterr()
  with pytest.raises(SystemExit) as ended:
    convert.main([str(x) for x in command])
  logging.disable(logging.NOTSET)
  assert ended.value.code == 2
  said = [x for x in capsys.readouterr().err.splitlines() if x]
  assert len(said) == 1, said
  return said[0].removeprefix("maxtext-mudd: ")


def test_folders_for_other_commands(tmp_path, capsys):
  source, run_folder = hugging_face(tmp_path / "hf"), tmp_path / "runs" / "r"
  for step in (7, 12):
    (run_folder / "checkpoints" / str(step) / "items").mkdir(parents=True)
  (tmp_path / "empty").mkdir()
  jax_code = models.DATA / "muddjax_plain"
  commands = {"from-hf": "--hf-dir", "from-fork": "--fork-dir", "from-run": "--checkpoint"}
  wanted = "name a checkpoint, as OUTPUT/RUN/checkpoints/STEP."
  newest = f"is the folder of a run; name one of its checkpoints, as {run_folder}/checkpoints/12."
  for command, path, message in (
    ("from-hf", tmp_path / ("n" * 300), "cannot be reached: file name too long; name one that can."),
    ("from-hf", jax_code, "is a folder of the authors' JAX code or of a run; convert it by from-fork or from-run."),
    ("from-fork", source, "is a Hugging Face folder; convert it by from-hf."),
    ("from-fork", tmp_path / "empty", "holds no parameters; name a folder with params.safetensors or an Orbax tree."),
    ("from-run", source, "is a Hugging Face folder; convert it by from-hf."),
    ("from-run", jax_code, "is a folder of the authors' JAX code; convert it by from-fork."),
    ("from-run", run_folder, newest),
    ("from-run", run_folder / "checkpoints", newest),
    ("from-run", tmp_path / "empty", f"holds no parameters; {wanted}"),
    ("from-run", tmp_path / "none", f": there is no such folder; {wanted}"),
  ):
    more = [runs.RUN_YML] if command == "from-run" else []
    said = refusal(capsys, command, commands[command], path, "--maxtext-dir", tmp_path / "m", *more)
    assert said == f"{path}{'' if message.startswith(':') else ' '}{message}"
  for folders in (("", tmp_path / "m"), (source, "")):
    said = refusal(capsys, "from-hf", "--hf-dir", folders[0], "--maxtext-dir", folders[1])
    assert said == f"--{'maxtext' if folders[0] else 'hf'}-dir '' names no folder; name one."


def test_keys_that_are_no_model_s(tmp_path, capsys):
  source, made = hugging_face(tmp_path / "hf"), tmp_path / "m"
  no_model = (
    "model.yml describes a model, to which {0} does not belong; leave it out, and set it where the model is used."
  )
  for key, message in (
    ("load_parameters_path=/x", f"load_parameters_path=/x: {no_model}"),
    ("run_name=a/b", f"run_name=a/b: {no_model}"),
    ("steps=0", f"steps=0: {no_model}"),
    ("tokenizer_path=nowhere", f"tokenizer_path=nowhere: {no_model}"),
    ("base_config=other.yml", f"base_config=other.yml: the model in {source} has base_config=base.yml; leave it out."),
    ("mudd_ffn_groups=2", f"mudd_ffn_groups=2: the model in {source} has FFNs of other widths; leave it out."),
    (
      "mudd_kernel=nope",
      "mudd_kernel='nope' is not valid: input should be 'auto', 'xla', 'pallas' or 'pallas_interpret'.",
    ),
  ):
    said = refusal(capsys, "from-hf", "--hf-dir", source, "--maxtext-dir", made, key)
    assert said == message.format(key.split("=")[0])
  keys = {"attention": "dot_product", "dtype": "bfloat16", "per_device_batch_size": 2, "enable_dropout": False}
  model_folder._check_overrides({key: x for key, x in keys.items() if key != "enable_dropout"})
  assert keys.items() <= model_folder.source_keys(hf.Model(source), keys).items()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_run_leaves_the_layout(layout, tmp_path, capsys):
  name = {"single": "layers_0", "scanned": "layers"}[layout]
  tree = {"params": {"params": {"decoder": {name: {"mlp": np.zeros(3, np.float32)}}}}}
  ocp.PyTreeCheckpointer().save(tmp_path / "r" / "items", tree)
  wanted = layout == "single"
  command = ["from-run", "--checkpoint", tmp_path / "r", "--maxtext-dir", tmp_path / "m", runs.RUN_YML]
  said = refusal(capsys, *command, *(["scan_layers=true"] if wanted else []))
  assert said == (
    f"scan_layers={wanted}: {tmp_path}/r/items has {layout} layers, and from-run keeps the layout; set scan_layers="
    f"{str(not wanted).lower()}, or convert the run first (layout)."
  )
  assert [x.name for x in tmp_path.iterdir()] == ["r"]


def test_brief_errors_have_no_tails():
  for tail in (
    ". See full TensorStore details: <bound method pybind11_detail_function",
    " [source locations='tensorstore/kvstore/x.cc:1']",
  ):
    assert errors.brief(ValueError(f"cannot read x{tail}")) == "ValueError: cannot read x"


def test_interrupts_while_maxtext_is_imported(tmp_path, monkeypatch, capsys):
  """Its modules cannot be imported once more."""
  calls = []

  def install(reading):
    calls.append(reading)
    signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(convert.plugin, "install", install)
  assert refusal(capsys, "to-hf", "--maxtext-dir", tmp_path, "--hf-dir", "b") == "interrupted; nothing was made."
  assert len(calls) == 1
