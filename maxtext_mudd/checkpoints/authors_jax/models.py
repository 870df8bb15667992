"""Models of the authors' JAX code, a fork of an old MaxText.

Its parameters have the shapes that MaxText's have, under other names. Its attention divides scores by sqrt(head_dim),
as MaxText's qwen3 does; MaxText's llama2 keeps that factor in the query kernel.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import pathlib
import re
from typing import Any

import numpy as np

from maxtext_mudd.checkpoints import ffn_widths as ffn
from maxtext_mudd.checkpoints import folder, layout, tensors
from maxtext_mudd.checkpoints import orbax_folder as saved
from maxtext_mudd.checkpoints.authors_jax import config_json as fork_config
from maxtext_mudd.checkpoints.hugging_face import models as hf
from maxtext_mudd.config.errors import ConfigError

FILE = "params.safetensors"
_ORBAX = ("_METADATA", "checkpoint", "manifest.ocdbt")

_EMBEDDING_NORM = "decoder/mudd_prenorm/scale"
_AGGREGATE = {
  "dynamic_dense_conn1/kernel": "w1",
  "dynamic_dense_conn2/kernel": "w2",
  "dense_proj2.bias": "a",
  "pre_dense_proj1_norm/scale": "weight_norm_scale",
}


def is_folder(path: pathlib.Path) -> bool:
  return (path / FILE).exists() or any((_items(path) / name).exists() for name in _ORBAX)


class Model:
  """A `folder.Source`: `params.safetensors` with flax paths for names, or an Orbax tree of the same."""

  def __init__(self, path: pathlib.Path):
    """Raises ConfigError for what is missing, damaged or not such a model."""
    self.path = path
    self._values = tensors.of_file(path / FILE) if (path / FILE).exists() else saved.parameters(_items(path))
    config = path / fork_config.CONFIG
    fields = hf.read_fields(config) if config.exists() else {}
    self.keys = fork_config.keys({name: x.shape for name, x in self._values.items()}, fields, path)
    self.ffn_widths = ffn.of_keys(self.keys)
    self.size = sum(x.size for x in self._values.values())

  def parameters(self, config, progress: Callable[[int], None] = lambda size: None) -> Iterator[tuple[str, np.ndarray]]:
    """Raises ConfigError where a parameter is missing, not of this model, or of another shape, before one is read."""
    last = config.num_decoder_layers - 1
    self._check(config, last)
    makers = {path_of(name, last): functools.partial(self._read, name) for name in self._values}
    values = tensors.Lazy(makers, progress)
    return layout.stacking(values, config) if config.scan_layers else iter(values.items())

  def _check(self, config, last: int) -> None:
    if config.scan_layers:
      config = folder.configuration(self.keys | folder.here() | {"scan_layers": False})
    wanted = folder.parameter_shapes(config)
    for name, found in self._values.items():
      like = wanted.pop(path_of(name, last), None)
      if like is None:
        raise ConfigError(f"{self.path} has {name}, for which the model that its other parameters make has no place.")
      if found.shape != like.shape:
        shapes = f"{list(found.shape)}, and the model that its other parameters make needs {list(like.shape)}"
        raise ConfigError(f"{self.path}: {name} is {shapes}.")
    if wanted:
      likely = (re.sub(r"(layers|norm)_\d+/", rf"\1_{i}/", name) for name in self._values for i in range(last + 1))
      names = {path_of(name, last): name for name in (_EMBEDDING_NORM, *likely)}
      missing = min(names.get(path, path) for path in wanted)
      raise ConfigError(f"{self.path} has no {missing}, which the model that its other parameters make needs.")

  def _read(self, name: str) -> np.ndarray:
    found = self._values[name]
    return tensors.cast(found.read(), found.dtype, f"{self.path}: {name}")


def path_of(name: str, last: int) -> str:
  """MaxText's path of a parameter of the fork; `last`: number of the last block, from 0."""
  if name == _EMBEDDING_NORM:
    return "decoder/layers_0/connection/embedding_norm/scale"
  if found := re.fullmatch(r"decoder/mudd_(prenorm|postnorm)_(\d+)/scale", name):
    block = int(found[2])
    if found[1] == "prenorm":
      return f"decoder/layers_{block}/connection/output_norm/scale"
    return f"{_aggregate_path(block, last)}/post_norm_r/scale"
  if found := re.fullmatch(r"decoder/layers_(\d+)/(.+)", name):
    block, rest = int(found[1]), found[2]
    if rest in _AGGREGATE:
      return f"{_aggregate_path(block, last)}/{_AGGREGATE[rest]}"
    return re.sub(r"/pre_self_attention_layer_norm_([qkv])/", r"/pre_self_attention_layer_norm/\1/", name)
  return name


def _aggregate_path(block: int, last: int) -> str:
  if block == last:
    return f"decoder/layers_{block}/connection/final_depth_aggregate"
  return f"decoder/layers_{block + 1}/connection/depth_aggregate"


def from_fork(source: pathlib.Path, target: pathlib.Path, overrides: Mapping[str, Any]) -> None:
  """`folder.convert` of a folder of the fork."""
  folder.convert(Model(source), target, overrides, {})


def _items(path: pathlib.Path) -> pathlib.Path:
  """Where the tree of an Orbax folder is, in a checkpoint of a run or by itself."""
  return next((path / name for name in ("items", "default", "state") if (path / name).is_dir()), path)
