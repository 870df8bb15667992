"""Files of tensors: safetensors in one file or in shards, and PyTorch's own."""

import json
import pathlib
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import maxtext_mudd
from maxtext_mudd.checkpoints import tensors
from maxtext_mudd.checkpoints.hugging_face import files as hf_files
from maxtext_mudd.checkpoints.hugging_face import models as hf
from maxtext_mudd.config.errors import ConfigError
from tests.published import hugging_face, in_shards


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
