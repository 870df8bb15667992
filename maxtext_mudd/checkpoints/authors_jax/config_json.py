"""What the `config.json` of a model of the authors' JAX code says, in MaxText's keys; shapes tell what it does not.

Source: the golden models' files, and the layers that read these fields.
"""

from collections.abc import Mapping
import json
import math
import pathlib
import re
from typing import Any

from maxtext_mudd.checkpoints import ffn_widths as ffn
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
# Fields that change the function, with the value that can be had. The fork's gelu is the tanh approximation.
_FIELDS = {
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
# MaxText's key of a size: field, a parameter that has it, its axes, which of them.
_SIZES = {
  "base_emb_dim": ("emb_dim", "token_embedder/embedding", 2, 1),
  "vocab_size": ("vocab_size", "token_embedder/embedding", 2, 0),
  "base_num_query_heads": ("num_query_heads", "decoder/layers_0/self_attention/query/kernel", 3, 1),
  "base_num_kv_heads": ("num_kv_heads", "decoder/layers_0/self_attention/key/kernel", 3, 1),
  "head_dim": ("head_dim", "decoder/layers_0/self_attention/query/kernel", 3, 2),
}
# Of which no shape tells: field, default.
_TOLD = {
  "rope_min_timescale": ("rope_min_timescale", 1),
  "rope_max_timescale": ("rope_max_timescale", 10000),
  "max_target_length": ("max_target_length", 2048),
}


def keys(shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """MaxText's keys for the model. Fields go before shapes, so that a parameter that does not fit can be told.

  Args:
    shapes: of the parameters, by the fork's names.
    fields: of `config.json`, none where there is no such file.
    folder: for messages.

  Raises:
    ConfigError: not a model of the fork, or a field that has a value that cannot be had.
  """
  file = folder / CONFIG
  for field, value in _FIELDS.items():
    found = fields.get(field, value)
    if type(found) is not type(value) or found != value:
      raise ConfigError(f"{file}: {field}={json.dumps(found)} is not supported; {field}={json.dumps(value)} is.")

  def shape(name, rank):
    if len(shapes.get(name, ())) != rank:
      found = f"a {name} of {list(shapes[name])}" if name in shapes else f"no {name}"
      raise ConfigError(f"{folder} has {found}; name a folder with a MUDD model of the fork.")
    return shapes[name]

  def told(field, default, fits=lambda x: type(x) is int and x > 0, kind="a whole number above 0"):
    value = fields.get(field, default)
    if not fits(value):
      raise ConfigError(f"{file}: {field}={json.dumps(value)} is not {kind}.")
    return value

  def switch(field, default):
    return told(field, default, lambda x: isinstance(x, bool), "true or false")

  def size(field, name, rank, axis):
    return told(field, None) if field in fields else shape(name, rank)[axis]

  made = {key: size(*how) for key, how in _SIZES.items()}
  made |= {key: told(*how) for key, how in _TOLD.items()}
  number = len({found[1] for name in shapes if (found := re.match(r"decoder/layers_(\d+)/", name))})
  if told("num_decoder_layers", number) != number:
    raise ConfigError(f"{file}: num_decoder_layers={fields['num_decoder_layers']}, and the parameters have {number}.")
  kernels = [f"decoder/layers_{i}/mlp/wi_0/kernel" for i in range(number)]
  if "mlp_dim" in fields:
    width, shaped = told("mlp_dim", None), [shapes.get(name, ()) for name in kernels]
    reallocated = ffn.is_reallocated(width, [x[1] if len(x) == 2 else None for x in shaped])
    reallocated = switch("dynamic_mlp_dim", reallocated)
  else:
    widths = tuple(shape(name, 2)[1] for name in kernels)
    width, reallocated = sum(widths) // number, len(set(widths)) > 1
    if widths != ffn.widths(width, number, reallocated):
      found = ", ".join(map(str, widths))
      raise ConfigError(
        f"{folder}: FFNs of {found} are not what re-allocation makes of mlp_dim={width}; write it to {CONFIG}."
      )
  expansion, last_expansion = _expansions(
    fields.get("dynamic_dense_hidden_expand", [1] * (number - 1) + [4]), number, file
  )
  pre_norm = switch("mudd_prenorm", any(name.startswith("decoder/mudd_prenorm") for name in shapes))
  return {
    **_FIXED,
    **made,
    "base_num_decoder_layers": number,
    "base_mlp_dim": width,
    "normalization_layer_epsilon": told("normalization_layer_epsilon", 1e-6, _is_positive, "a finite number above 0"),
    "mudd_hidden_expansion": expansion,
    "mudd_last_hidden_expansion": last_expansion,
    "mudd_hidden_round_to": 64 if switch("dynamic_dense_hidden_round", True) else 0,
    "mudd_pre_norm": pre_norm,
    "mudd_weight_norm_scale": pre_norm,
    "mudd_post_norm": switch("mudd_postnorm", any(name.startswith("decoder/mudd_postnorm_") for name in shapes)),
    "mudd_ffn_reallocation": reallocated,
  }


def _is_positive(value) -> bool:
  return type(value) in (int, float) and 0 < value < math.inf


def _expansions(value, number: int, file: pathlib.Path) -> tuple[float, float]:
  """Of all aggregates but the last, and of the last."""
  by_layer = value if isinstance(value, list) else [value] * number
  if len(by_layer) != number or not all(map(_is_positive, by_layer)) or len(set(by_layer[:-1])) > 1:
    raise ConfigError(
      f"{file}: dynamic_dense_hidden_expand={json.dumps(value)} is not supported; one number for all {number} layers "
      "but the last, and one for the last, is."
    )
  return float(by_layer[0]), float(by_layer[-1])
