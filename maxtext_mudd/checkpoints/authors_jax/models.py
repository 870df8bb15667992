"""Reads models of the authors' JAX code and converts them to model folders.

The parameters have the same shapes as MaxText's, and other names. The authors' attention divides the scores by
sqrt(head_dim), as MaxText's qwen3 block does. MaxText's llama2 block has this factor in the query kernel instead.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import pathlib
import re
from typing import Any

import numpy as np

from maxtext_mudd.checkpoints import layout, model_config, model_folder, orbax_folder, released_ffn, tensors
from maxtext_mudd.checkpoints.authors_jax import config_json
from maxtext_mudd.checkpoints.hugging_face import models as hf
from maxtext_mudd.config.errors import ConfigError

FILE = "params.safetensors"
_ORBAX_FILES = ("_METADATA", "checkpoint", "manifest.ocdbt")

_EMBEDDING_NORM = "decoder/mudd_prenorm/scale"
_AGGREGATE_PARAMETERS = {
  "dynamic_dense_conn1/kernel": "w1",
  "dynamic_dense_conn2/kernel": "w2",
  "dense_proj2.bias": "a",
  "pre_dense_proj1_norm/scale": "weight_norm_scale",
}


def is_folder(path: pathlib.Path) -> bool:
  return (path / FILE).exists() or any((_orbax_tree(path) / name).exists() for name in _ORBAX_FILES)


class Model:
  """A `model_folder.Source` that reads `params.safetensors`, or an Orbax tree with the same parameters."""

  def __init__(self, path: pathlib.Path):
    """Reads the headers of the parameters, and `config.json` if there is one.

    Raises:
      ConfigError: a file is missing or damaged, or is not of such a model.
    """
    self.path = path
    self._tensors = (
      tensors.of_file(path / FILE) if (path / FILE).exists() else orbax_folder.parameters(_orbax_tree(path))
    )
    config = path / config_json.CONFIG
    fields = hf.read_fields(config) if config.exists() else {}
    self.keys = config_json.keys({name: x.shape for name, x in self._tensors.items()}, fields, path)
    self.ffn_widths = released_ffn.from_keys(self.keys)
    self.size = sum(x.size for x in self._tensors.values())

  def parameters(self, config, progress: Callable[[int], None] = lambda size: None) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the parameters, as `model_folder.Source.parameters` says.

    Raises:
      ConfigError: a parameter is missing, is not one of this model, or has another shape. Then no values were read.
    """
    last = config.num_decoder_layers - 1
    self._check(config, last)
    readers = {path_of(name, last): functools.partial(self._read, name) for name in self._tensors}
    values = tensors.LazyArrays(readers, progress)
    return layout.stacking(values, config) if config.scan_layers else iter(values.items())

  def _check(self, config, last: int) -> None:
    if config.scan_layers:
      config = model_config.build(self.keys | model_config.local_keys() | {"scan_layers": False})
    missing = model_config.parameter_shapes(config)
    for name, tensor in self._tensors.items():
      expected = missing.pop(path_of(name, last), None)
      if expected is None:
        raise ConfigError(f"{self.path} has {name}, which the model that its other parameters describe does not have.")
      if tensor.shape != expected.shape:
        raise ConfigError(
          f"{self.path}: {name} is {list(tensor.shape)}, and the model that its other parameters describe needs "
          f"{list(expected.shape)}."
        )
    if missing:
      # The message has the parameter's name in the authors' code: its name in other blocks, with this block's number.
      likely = (re.sub(r"(layers|norm)_\d+/", rf"\1_{i}/", name) for name in self._tensors for i in range(last + 1))
      names = {path_of(name, last): name for name in (_EMBEDDING_NORM, *likely)}
      first = min(names.get(path, path) for path in missing)
      raise ConfigError(f"{self.path} has no {first}, which the model that its other parameters describe needs.")

  def _read(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    return tensors.cast(tensor.read(), tensor.dtype, f"{self.path}: {name}")


def path_of(name: str, last: int) -> str:
  """MaxText's path of a parameter that has this name in the authors' code.

  Args:
    last: number of the last block; blocks count from 0.
  """
  if name == _EMBEDDING_NORM:
    return "decoder/layers_0/connection/embedding_norm/scale"
  if match := re.fullmatch(r"decoder/mudd_(prenorm|postnorm)_(\d+)/scale", name):
    block = int(match[2])
    if match[1] == "prenorm":
      return f"decoder/layers_{block}/connection/output_norm/scale"
    return f"{_aggregate_path(block, last)}/post_norm_r/scale"
  if match := re.fullmatch(r"decoder/layers_(\d+)/(.+)", name):
    block, parameter = int(match[1]), match[2]
    if parameter in _AGGREGATE_PARAMETERS:
      return f"{_aggregate_path(block, last)}/{_AGGREGATE_PARAMETERS[parameter]}"
    return re.sub(r"/pre_self_attention_layer_norm_([qkv])/", r"/pre_self_attention_layer_norm/\1/", name)
  return name


def _aggregate_path(block: int, last: int) -> str:
  if block == last:
    return f"decoder/layers_{block}/connection/final_depth_aggregate"
  return f"decoder/layers_{block + 1}/connection/depth_aggregate"


def from_fork(source: pathlib.Path, target: pathlib.Path, overrides: Mapping[str, Any]) -> None:
  """Converts a folder of the authors' JAX code to a model folder, as `model_folder.convert` says."""
  model_folder.convert(Model(source), target, overrides, {})


def _orbax_tree(path: pathlib.Path) -> pathlib.Path:
  """The folder of the Orbax tree: a subfolder if `path` is a checkpoint of a run, else `path` itself."""
  return next((path / name for name in ("items", "default", "state") if (path / name).is_dir()), path)
