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

from maxtext_mudd import topology
from maxtext_mudd.checkpoints import folder, hf, layout, tensors
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
  """A `folder.Source`: `params.safetensors` with flax paths for names, or an Orbax tree of the same."""

  def __init__(self, path: pathlib.Path):
    """Raises ConfigError for what is missing, damaged or not such a model."""
    self.path = path
    self._values = tensors.of_file(path / FILE) if (path / FILE).exists() else _of_orbax(_items(path))
    fields = hf.read_fields(path / CONFIG) if (path / CONFIG).exists() else {}
    self.ffn_widths, self.keys = _keys({name: x.shape for name, x in self._values.items()}, fields, path)
    self.size = sum(x.size for x in self._values.values())

  def parameters(self, config, progress: Callable[[int], None] = lambda size: None) -> Iterator[tuple[str, np.ndarray]]:
    """Raises ConfigError for layers that are not alike and for what is not finite."""
    last = config.num_decoder_layers - 1
    makers = {path_of(name, last): functools.partial(self._read, name) for name in self._values}
    values = tensors.Lazy(makers, progress)
    try:
      yield from layout.stacking(values, config) if config.scan_layers else values.items()
    except ConfigError:
      raise
    except KeyError as error:
      raise ConfigError(f"{self.path} has no {error.args[0]}, which the other layers have.") from None
    except ValueError as error:
      raise ConfigError(f"{self.path} cannot be scanned: {error}.") from None

  def _read(self, name: str) -> np.ndarray:
    found = self._values[name]
    return tensors.cast(found.read(), found.dtype, f"{self.path}: {name}")


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
  """`folder.convert` of a folder of the fork."""
  folder.convert(Model(source), target, overrides, {})


def _keys(shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, Any], path: pathlib.Path):
  """FFN widths, and what the shapes and `config.json` tell."""

  def shape(name, rank):
    if len(shapes.get(name, ())) != rank:
      found = f"a {name} of {list(shapes[name])}" if name in shapes else f"no {name}"
      raise ConfigError(f"{path} has {found}; name a folder with a MUDD model of the fork.")
    return shapes[name]

  number = len({found[1] for name in shapes if (found := re.match(r"decoder/layers_(\d+)/", name))})
  vocabulary, width = shape("token_embedder/embedding", 2)
  _, heads, head_dim = shape("decoder/layers_0/self_attention/query/kernel", 3)
  widths = tuple(shape(f"decoder/layers_{i}/mlp/wi_0/kernel", 2)[1] for i in range(number))
  ffn = fields.get("mlp_dim", sum(widths) // number)
  if not isinstance(ffn, int) or ffn < 1:
    raise ConfigError(f"{path / CONFIG}: mlp_dim={ffn!r} is not a width.")
  reallocated = set(widths) != {ffn}
  if reallocated and (number < 2 or widths != topology.ffn_widths(ffn, number, **topology.RELEASED_FFN)):
    found = ", ".join(map(str, widths))
    raise ConfigError(
      f"{path}: FFNs of {found} are not what re-allocation makes of mlp_dim={ffn}; write it to {CONFIG}."
    )
  return widths, {
    **_FIXED,
    "base_num_decoder_layers": number,
    "base_emb_dim": width,
    "base_num_query_heads": heads,
    "base_num_kv_heads": shape("decoder/layers_0/self_attention/key/kernel", 3)[1],
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


def _items(path: pathlib.Path) -> pathlib.Path:
  """Where the tree of an Orbax folder is, in a checkpoint of a run or by itself."""
  return next((path / name for name in ("items", "default") if (path / name).is_dir()), path)


def _of_orbax(path: pathlib.Path) -> dict[str, tensors.Tensor]:
  tree = folder.numpy_tree(path)
  while isinstance(tree, dict) and isinstance(tree.get("params"), dict):
    tree = tree["params"]
  if not isinstance(tree, dict):
    raise ConfigError(f"{path} holds no parameters; name a folder with a MUDD model of the fork.")
  return {name: tensors.Tensor(path, x.shape, x.dtype, lambda x=x: x) for name, x in folder.by_path(tree).items()}
