"""Derives MaxText's keys of a model of the authors' JAX code, from its `config.json` and the shapes of its parameters.

The meaning of the fields is taken from the layers of the authors' code that read them, and from the golden models.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
import pathlib
import re
from typing import Any

from maxtext_mudd.checkpoints import released_ffn
from maxtext_mudd.config.errors import ConfigError

CONFIG = "config.json"
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
# Fields that change the function of the model, with the only value that is supported. The authors' JAX "gelu" is the
# tanh approximation.
_SUPPORTED = {
  "decoder_block": "llama2",
  "mlp_activations": ["silu", "linear"],
  "dense_conn": True,
  "dynamic_dense_type": "qkvm",
  "dynamic_dense_act_cls": "gelu",
  "dynamic_dense_fix_last_layer": True,
  "dynamic_dense_scale_dw": False,
  "ddw_gen_pattern": "q,k,v,m",
  "logits_via_embedding": False,
  "window_size": None,
  "sliding_window_size": None,
  "num_layers_per_block": 1,
  "num_experts": 1,
  "fused_qkv": False,
  "fused_mlp": False,
  "mgate": False,
  "set_mask_by_eos": False,
  "use_untrainable_positional_embedding": False,
  "trainable_position_size": -1,
}
# Sizes by MaxText's key: the field with the size; and, for files without this field, a parameter whose shape shows the
# size, the rank of the parameter and the axis.
_SIZES = {
  "base_emb_dim": ("emb_dim", "token_embedder/embedding", 2, 1),
  "vocab_size": ("vocab_size", "token_embedder/embedding", 2, 0),
  "base_num_query_heads": ("num_query_heads", "decoder/layers_0/self_attention/query/kernel", 3, 1),
  "base_num_kv_heads": ("num_kv_heads", "decoder/layers_0/self_attention/key/kernel", 3, 1),
  "head_dim": ("head_dim", "decoder/layers_0/self_attention/query/kernel", 3, 2),
}
# Numbers that no shape shows, by MaxText's key: the field and its default value.
_NUMBERS = {
  "rope_min_timescale": ("rope_min_timescale", 1),
  "rope_max_timescale": ("rope_max_timescale", 10000),
  "max_target_length": ("max_target_length", 2048),
}


@dataclasses.dataclass(frozen=True)
class _Model:
  """What is known about a model before its parameters are read.

  Attributes:
    fields: the fields of `config.json`.
    shapes: the shapes of the parameters, by their names in the authors' code.
    folder: the folder of the model, for messages.
  """

  fields: Mapping[str, Any]
  shapes: Mapping[str, tuple[int, ...]]
  folder: pathlib.Path

  @property
  def file(self) -> pathlib.Path:
    return self.folder / CONFIG

  def number(self, field: str, default: int | None = None) -> int:
    return self._checked(field, default, lambda x: type(x) is int and x > 0, "a whole number above 0")

  def positive(self, field: str, default: float) -> float:
    return self._checked(field, default, _is_positive, "a finite number above 0")

  def flag(self, field: str, default: bool) -> bool:
    return self._checked(field, default, lambda x: isinstance(x, bool), "true or false")

  def _checked(self, field: str, default, is_valid: Callable[[Any], bool], kind: str):
    value = self.fields.get(field, default)
    if not is_valid(value):
      raise ConfigError(f"{self.file}: {field}={json.dumps(value)} is not {kind}.")
    return value

  def shape(self, name: str, rank: int) -> tuple[int, ...]:
    if len(self.shapes.get(name, ())) != rank:
      found = f"a {name} of {list(self.shapes[name])}" if name in self.shapes else f"no {name}"
      raise ConfigError(f"{self.folder} has {found}; name a folder with a MUDD model of the authors' JAX code.")
    return self.shapes[name]

  def size(self, field: str, name: str, rank: int, axis: int) -> int:
    return self.number(field) if field in self.fields else self.shape(name, rank)[axis]


def keys(shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """MaxText's keys of the model.

  A field takes precedence over shapes. A parameter whose shape does not fit is refused when the parameters are read.

  Args:
    shapes: the shapes of the parameters, by their names in the authors' code.
    fields: the fields of `config.json`; empty if there is no such file.
    folder: the folder of the model, for messages.

  Raises:
    ConfigError: this is not such a model, or a field has a value that is not supported.
  """
  model = _Model(fields, shapes, folder)
  for field, supported in _SUPPORTED.items():
    value = fields.get(field, supported)
    if type(value) is not type(supported) or value != supported:
      given, needed = json.dumps(value), json.dumps(supported)
      raise ConfigError(f"{model.file}: {field}={given} is not supported; {field}={needed} is.")
  sizes = {key: model.size(*size) for key, size in _SIZES.items()}
  numbers = {key: model.number(*field_and_default) for key, field_and_default in _NUMBERS.items()}
  num_blocks = len({match[1] for name in shapes if (match := re.match(r"decoder/layers_(\d+)/", name))})
  if model.number("num_decoder_layers", num_blocks) != num_blocks:
    stated = fields["num_decoder_layers"]
    raise ConfigError(f"{model.file}: num_decoder_layers={stated}, and the parameters have {num_blocks}.")
  base_width, reallocated = _ffn(model, num_blocks)
  expansion, last_expansion = _expansions(model, num_blocks)
  pre_norm = model.flag("mudd_prenorm", any(name.startswith("decoder/mudd_prenorm") for name in shapes))
  return {
    **_FIXED,
    **sizes,
    **numbers,
    "base_num_decoder_layers": num_blocks,
    "base_mlp_dim": base_width,
    "normalization_layer_epsilon": model.positive("normalization_layer_epsilon", 1e-6),
    "mudd_hidden_expansion": expansion,
    "mudd_last_hidden_expansion": last_expansion,
    "mudd_hidden_round_to": 64 if model.flag("dynamic_dense_hidden_round", True) else 0,
    "mudd_pre_norm": pre_norm,
    "mudd_weight_norm_scale": pre_norm,
    "mudd_post_norm": model.flag("mudd_postnorm", any(name.startswith("decoder/mudd_postnorm_") for name in shapes)),
    "mudd_ffn_reallocation": reallocated,
  }


def _is_positive(value) -> bool:
  return type(value) in (int, float) and 0 < value < math.inf


def _ffn(model: _Model, num_blocks: int) -> tuple[int, bool]:
  """The configured FFN width, and whether FFNs are re-allocated."""
  kernels = [f"decoder/layers_{i}/mlp/wi_0/kernel" for i in range(num_blocks)]
  if "mlp_dim" in model.fields:
    base_width, shapes = model.number("mlp_dim"), [model.shapes.get(name, ()) for name in kernels]
    reallocated = released_ffn.is_reallocated(base_width, [x[1] if len(x) == 2 else None for x in shapes])
    return base_width, model.flag("dynamic_mlp_dim", reallocated)
  widths = tuple(model.shape(name, 2)[1] for name in kernels)
  base_width, reallocated = sum(widths) // num_blocks, len(set(widths)) > 1
  if widths != released_ffn.for_blocks(base_width, num_blocks, reallocated):
    raise ConfigError(
      f"{model.folder}: FFN widths {', '.join(map(str, widths))} do not follow from re-allocating their mean, "
      f"{base_width}; write mlp_dim to {CONFIG}."
    )
  return base_width, reallocated


def _expansions(model: _Model, num_blocks: int) -> tuple[float, float]:
  """The hidden expansion of all aggregates but the last, and that of the last."""
  value = model.fields.get("dynamic_dense_hidden_expand", [1] * (num_blocks - 1) + [4])
  by_block = value if isinstance(value, list) else [value] * num_blocks
  if len(by_block) != num_blocks or not all(map(_is_positive, by_block)) or len(set(by_block[:-1])) > 1:
    raise ConfigError(
      f"{model.file}: dynamic_dense_hidden_expand={json.dumps(value)} is not supported; use one number for all "
      f"{num_blocks} layers but the last, and one for the last."
    )
  return float(by_block[0]), float(by_block[-1])
