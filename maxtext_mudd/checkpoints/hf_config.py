"""What the `config.json` of a released model says, in MaxText's keys, and back.

Source: the configuration classes of the authors' MUDDFormer and MUDDPythia (PyTorch).
"""

from collections.abc import Mapping, Sequence
import enum
from typing import Any

from maxtext_mudd import topology
from maxtext_mudd.config import MuddConfig
from maxtext_mudd.errors import ConfigError

_COMMON = {
  "mudd": True,
  "depth_connection": "dense",
  "logits_via_embedding": False,
  "enable_dropout": False,
}
_FIELDS = {"dense": True, "dense_type": "qkvr", "sepln": True, "tie_word_embeddings": False}
# By model_type: MaxText's keys, fields, the name of the class.
KINDS = {
  "muddformer": (
    {"decoder_block": "qwen3", "mlp_activations": ["silu", "linear"]},
    {},
    "MUDDFormer",
  ),
  "muddpythia": (
    {"decoder_block": "gpt3", "mudd_decoder_layer": "pythia", "mlp_activations": ["gelu"]},
    {"use_linear_bias": True, "use_parallel_residual": True},
    "MUDDPythia",
  ),
}
_SIZES = {
  "base_num_decoder_layers": "n_layer",
  "base_emb_dim": "dim",
  "base_num_query_heads": "n_head",
  "base_num_kv_heads": "n_local_heads",
  "head_dim": "head_dim",
  "base_mlp_dim": "intermediate_size",
  "vocab_size": "vocab_size",
  "max_target_length": "block_size",
  "normalization_layer_epsilon": "norm_eps",
  "rope_max_timescale": "rope_base",
  "use_qk_norm": "use_qk_norm",
  "mudd_dynamic": "dynamic_dense",
}
_ROTARY = ("mudd_rotary_fraction", "rotary_pct")


def keys(fields: Mapping[str, Any], ffn_widths: Sequence[int], where: str) -> dict[str, Any]:
  """MaxText's keys for the model.

  Args:
    fields: of `config.json`.
    ffn_widths: of the blocks, in order, for no field tells whether they are re-allocated.
    where: the file, for messages.

  Raises:
    ConfigError: not a model of these kinds, a field that is missing or has a value that cannot be had.
  """
  kind = fields.get("model_type")
  if not isinstance(kind, str) or kind not in KINDS:
    raise ConfigError(f"{where}: model_type={kind} is not known; {' and '.join(KINDS)} are.")
  own, fixed, _ = KINDS[kind]
  for field, value in (_FIELDS | fixed).items():
    if fields.get(field, value) != value:
      raise ConfigError(f"{where}: {field}={fields[field]} is not supported; {field}={value} is.")
  made = dict(_COMMON | own)
  sizes = _SIZES if kind == "muddformer" else _SIZES | dict([_ROTARY])
  for key, field in sizes.items():
    if field not in fields:
      raise ConfigError(f"{where} has no {field}.")
    made[key] = _typed(fields, field, where)
  made["mudd_hidden_round_to"] = 64 if _typed(fields, "round64", where, False) else 0
  made["mudd_last_hidden_expansion"] = 4.0 if _typed(fields, "expand_last", where, False) else 1.0
  made["mudd_ffn_reallocation"] = _is_reallocated(made, ffn_widths, where)
  return made


def _typed(fields: Mapping[str, Any], field: str, where: str, default: Any = None):
  value = fields.get(field, default)
  if field in ("use_qk_norm", "dynamic_dense", "round64", "expand_last"):
    fits, kind = isinstance(value, bool), "true or false"
  elif field in ("norm_eps", "rope_base", "rotary_pct"):
    fits, kind = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0, "a number above 0"
  else:
    fits, kind = isinstance(value, int) and not isinstance(value, bool) and value > 0, "a whole number above 0"
  if not fits:
    raise ConfigError(f"{where}: {field}={value!r} is not {kind}.")
  return value


def _is_reallocated(made: Mapping[str, Any], found: Sequence[int], where: str) -> bool:
  width, blocks = made["base_mlp_dim"], made["base_num_decoder_layers"]
  if len(found) != blocks:
    raise ConfigError(f"{where}: n_layer={blocks}, and the weights have the FFNs of {len(found)} layers.")
  if set(found) == {width}:
    return False
  reallocated = topology.ffn_widths(width, blocks, **topology.RELEASED_FFN) if blocks > 1 else ()
  if tuple(found) != reallocated:
    expected, widths = (", ".join(map(str, x)) for x in (reallocated, found))
    raise ConfigError(
      f"{where}: intermediate_size={width} makes FFNs of {expected} where they are re-allocated, and the weights have "
      f"{widths}."
    )
  return True


def fields(config, original: Mapping[str, Any]) -> dict[str, Any]:
  """`config.json` of a model.

  Args:
    original: what the model's was before it was converted, for what says nothing of its function.

  Raises:
    ConfigError: the authors' code has no such model.
  """
  kind = "muddpythia" if config.mudd_decoder_layer == "pythia" else "muddformer"
  _, fixed, name = KINDS[kind]
  sizes = _SIZES if kind == "muddformer" else _SIZES | dict([_ROTARY])
  told = {
    "model_type": kind,
    **_FIELDS,
    **fixed,
    **{field: _plain(getattr(config, key)) for key, field in sizes.items()},
    "round64": config.mudd_hidden_round_to == 64,
    "expand_last": config.mudd_last_hidden_expansion == 4.0,
  }
  widths = topology.from_config(config).ffn_widths
  for key, value in (_released_keys() | keys(told, widths, "this model")).items():
    if _plain(getattr(config, key)) != value:
      raise ConfigError(f"{key}={getattr(config, key)} is not in the authors' {name}, which has {key}={value}.")
  others = {
    "architectures": [name],
    "auto_map": {
      "AutoConfig": f"configuration_{kind}.{name}Config",
      "AutoModelForCausalLM": f"modeling_{kind}.{name}",
    },
    "stack_hidden": False,
    "is_training": False,
    "use_gradient_checkpointing": False,
    "use_layer_cache": True,
    "torch_dtype": str(config.weight_dtype),
  }
  return {**others, **original, **told}


def _released_keys() -> dict[str, Any]:
  """Keys of the connections that no field tells, as the authors' code has them: their defaults."""
  told_otherwise = {"mudd_kernel", "mudd_ffn_groups", "mudd_ffn_round_to", "mudd_ffn_first", "mudd_ffn_last"}
  told_otherwise |= {"mudd_init", "mudd_init_std", "mudd_rotary_fraction", "mudd_expansion_rate"}
  told_otherwise |= {"mudd_ffn_parts", "mudd_rope_table"}
  own = {key: field.default for key, field in MuddConfig.model_fields.items() if key.startswith("mudd_")}
  return {key: value for key, value in own.items() if key not in told_otherwise}


def _plain(value):
  return value.value if isinstance(value, enum.Enum) else value
