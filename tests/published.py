"""Published models: their folders, their golden logits, and what `convert` says of them."""

import json
import logging
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import maxtext_mudd
from maxtext_mudd import assets, convert
from maxtext_mudd.checkpoints import tensors
from tests import models

LOGITS_TOLERANCE = 2e-4  # between two programs in float32, also of intermediates; the errors seen are up to 1.5e-4
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


def check_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
  assert found.keys() == expected.keys()
  for tensor, x in expected.items():
    assert found[tensor].dtype == x.dtype
    np.testing.assert_array_equal(found[tensor], x, err_msg=tensor)


def in_shards(path: pathlib.Path, monkeypatch) -> dict[str, str]:
  """Rewrites a folder in shards; which file has which tensor."""
  values = load_file(path / "model.safetensors")
  (path / "model.safetensors").unlink()
  monkeypatch.setattr(tensors, "SHARD_BYTES", 400_000)
  tensors.write(path, {name: tensors.Output(x.shape, x.dtype, lambda x=x: x) for name, x in values.items()})
  return json.loads((path / tensors.INDEX).read_text())["weight_map"]


BYTES = assets.BYTE_TOKENIZER_FOLDER


def fork_folder(path: pathlib.Path, **fields) -> pathlib.Path:
  path.mkdir()
  own = json.loads((models.DATA / "muddjax_plain" / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(own | fields))
  return path


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
