"""Models of the authors' JAX code, a fork of an old MaxText.

Its parameters have the shapes that MaxText's have, under other names. Its attention divides scores by sqrt(head_dim),
as MaxText's qwen3 does; MaxText's llama2 keeps that factor in the query kernel.
"""

from collections.abc import Callable, Iterator, Mapping
import json
import pathlib
import re
from typing import Any

import numpy as np
import tqdm

from maxtext_mudd import topology
from maxtext_mudd.checkpoints import folder, layout, tensors
from maxtext_mudd.errors import ConfigError

FILE, CONFIG = "params.safetensors", "config.json"
_ORBAX = ("_METADATA", "checkpoint", "manifest.ocdbt")

_FIXED = {
  "mudd": True,
  "decoder_block": "qwen3",
  "use_qk_norm": False,
  "mlp_activations": ["silu", "linear"],
  "logits_via_embedding": False,
  "enable_dropout": False,
  "mudd_activation": "gelu_tanh",
  "mudd_first_block_norms": "separate",
}
# Of config.json, where there is one: no shape tells them.
_TOLD = {
  "normalization_layer_epsilon": 1e-6,
  "rope_max_timescale": 10000,
  "max_target_length": 2048,
}
_AGGREGATE = {
  "dynamic_dense_conn1/kernel": "w1",
  "dynamic_dense_conn2/kernel": "w2",
  "dense_proj2.bias": "a",
  "pre_dense_proj1_norm/scale": "weight_norm_scale",
}


def is_folder(path: pathlib.Path) -> bool:
  return (path / FILE).exists() or any((_items(path) / name).exists() for name in _ORBAX)


class Model:
  """A folder of the fork: `params.safetensors` with flax paths for names, or an Orbax tree of the same.

  Attributes:
    path: the folder.
    keys: MaxText's keys for the model, single layers.
  """

  def __init__(self, path: pathlib.Path):
    """Raises ConfigError for what is missing, damaged or not such a model."""
    self.path = path
    self._values = tensors.of_file(path / FILE) if (path / FILE).exists() else _of_orbax(_items(path))
    shapes = {name: x.shape for name, x in self._values.items()}
    try:
      self.keys = _keys(shapes, _fields(path / CONFIG), path)
    except KeyError as error:
      raise ConfigError(f"{path} has no {error.args[0]}; name a folder with a MUDD model of the fork.") from None

  @property
  def size(self) -> int:
    """Of all parameters, in bytes."""
    return sum(x.size for x in self._values.values())

  def parameters(self, config, progress: Callable[[int], None] = lambda size: None) -> Iterator[tuple[str, np.ndarray]]:
    """By MaxText's paths, in the layout of the configuration. Raises ConfigError for what is not finite."""
    last = config.num_decoder_layers - 1
    values = _Values({path_of(name, last): x for name, x in self._values.items()}, self.path, progress)
    try:
      yield from layout.stacking(values, config) if config.scan_layers else values.items()
    except KeyError as error:
      raise ConfigError(f"{self.path} has no {error.args[0]}, which the other layers have.") from None


class _Values(Mapping):
  def __init__(self, found: Mapping[str, tensors.Tensor], path: pathlib.Path, progress: Callable[[int], None]):
    self._found, self._path, self._progress = found, path, progress

  def __iter__(self):
    return iter(self._found)

  def __len__(self):
    return len(self._found)

  def __getitem__(self, path: str) -> np.ndarray:
    value = self._found[path].read()
    if not np.isfinite(value).all():
      raise ConfigError(f"{self._path}: {path} has entries that are NaN or infinite; the model is broken.")
    self._progress(value.nbytes)
    return value


def path_of(name: str, last: int) -> str:
  """MaxText's path of a parameter of the fork; `last`: number of the last block, from 0."""
  if name == "decoder/mudd_prenorm/scale":
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
  """Writes the folder `target` (see `folder`) with the model of a folder of the fork.

  Args:
    overrides: MaxText's keys, as `scan_layers` or `weight_dtype`; they go into the YAML.

  Raises:
    ConfigError: as `Model`; the target exists or cannot be written. Nothing is left behind then.
  """
  model = Model(source)
  keys = folder.layout_keys({**model.keys, "scan_layers": False, "weight_dtype": "float32", **overrides})
  config = folder.configuration(keys, folder.HERE)
  with folder.staged(target) as stage, tqdm.tqdm(total=model.size, unit="B", unit_scale=True, desc=source.name) as bar:
    folder.save(stage, config, folder.tree(config, model.parameters(config, bar.update), str(source)), keys)


def _keys(shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """What the shapes tell, and what `config.json` does."""
  blocks = {int(found[1]) for name in shapes if (found := re.match(r"decoder/layers_(\d+)/", name))}
  number = len(blocks)
  widths = tuple(shapes[f"decoder/layers_{i}/mlp/wi_0/kernel"][1] for i in range(max(number, 1)))
  heads, head_dim = shapes["decoder/layers_0/self_attention/query/kernel"][1:]
  vocabulary, width = shapes["token_embedder/embedding"]
  ffn = fields.get("mlp_dim", sum(widths) // number)
  reallocated = set(widths) != {ffn}
  if reallocated and (number < 2 or widths != topology.ffn_widths(ffn, number, **topology.RELEASED_FFN)):
    found = ", ".join(map(str, widths))
    raise ConfigError(
      f"{path}: FFNs of {found} are not what re-allocation makes of mlp_dim={ffn}; write it to {CONFIG}."
    )
  return {
    **_FIXED,
    "base_num_decoder_layers": number,
    "base_emb_dim": width,
    "base_num_query_heads": heads,
    "base_num_kv_heads": shapes["decoder/layers_0/self_attention/key/kernel"][1],
    "head_dim": head_dim,
    "base_mlp_dim": ffn,
    "vocab_size": vocabulary,
    **{key: fields.get(key, value) for key, value in _TOLD.items()},
    "mudd_dynamic": "decoder/layers_0/dynamic_dense_conn1/kernel" in shapes,
    "mudd_weight_norm_scale": "decoder/layers_0/pre_dense_proj1_norm/scale" in shapes,
    "mudd_pre_norm": "decoder/mudd_prenorm/scale" in shapes,
    "mudd_post_norm": any(name.startswith("decoder/mudd_postnorm_") for name in shapes),
    "mudd_ffn_reallocation": reallocated,
  }


def _fields(file: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(file.read_text()) if file.exists() else {}
  except ValueError as error:
    raise ConfigError(f"{file} is not JSON ({error}); copy it again.") from error


def _items(path: pathlib.Path) -> pathlib.Path:
  """Where the tree of an Orbax folder is, in a checkpoint of a run or by itself."""
  return next((path / name for name in ("items", "default") if (path / name).is_dir()), path)


def _of_orbax(path: pathlib.Path) -> dict[str, tensors.Tensor]:
  try:
    tree = folder.numpy_tree(path)
  except Exception as error:  # Orbax raises all kinds
    cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ConfigError(f"{path} cannot be read; it is damaged, or not a checkpoint ({cause}).") from error
  while isinstance(tree, dict) and isinstance(tree.get("params"), dict):
    tree = tree["params"]
  values = folder.by_path(tree)
  return {name: tensors.Tensor(path, x.shape, x.nbytes, lambda x=x: x) for name, x in values.items()}
