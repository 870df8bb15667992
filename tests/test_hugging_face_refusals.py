"""Folders of Hugging Face that cannot be converted, each refused in one sentence."""

import json
import pathlib
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maxtext_mudd.checkpoints.hugging_face import models as hf
from maxtext_mudd.config.errors import ConfigError
from tests.published import hugging_face


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
