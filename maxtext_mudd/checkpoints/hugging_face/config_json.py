"""What the `config.json` of a released model says, in MaxText's keys, and back.

Source: the configuration classes of the authors' MUDDFormer and MUDDPythia (PyTorch).
"""

from collections.abc import Mapping, Sequence
import enum
import math
from typing import Any

from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.checkpoints import ffn_widths as ffn
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.config.mudd_config import MuddConfig

_COMMON = {
  "mudd": True,
  "depth_connection": "dense",
  "logits_via_embedding": False,
  "enable_dropout": False,
}
_FIELDS = {
  "dense": True,
  "dense_type": "qkvr",
  "dynamic_dense": True,
  "sepln": True,
  "tie_word_embeddings": False,
}
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
}
_ROTARY = ("mudd_rotary_fraction", "rotary_pct")
_AGGREGATES = ("round64", "expand_last")
# Parts of names of fields that would change the function, were they any of the authors'.
_STRANGE = ("rope", "rotary", "scal", "window", "soft_cap", "softcap", "bias", "parallel", "hidden_act", "activation")
_STRANGE += ("expert", "moe", "quant")
# MaxText's keys that change the function, and of which the authors' code knows the defaults only.
_STOCK = ("attention_type", "attention_bias", "attention_sink", "attention_output_dim", "moba", "temperature_tuning")
_STOCK += ("attn_logits_soft_cap", "final_logits_soft_cap", "qk_norm_with_scale", "partial_rotary_factor")
_STOCK += ("local_rope_max_timescale", "nope_layer_interval", "use_untrainable_positional_embedding")
_STOCK += ("trainable_position_size", "use_post_attn_norm", "use_post_ffw_norm", "mlp_bias", "mlp_activations_limit")
_STOCK += ("num_experts", "mtp_num_layers", "quantization", "global_parameter_scale")
_STOCK += tuple(key for key in MuddConfig.model_fields if key.startswith("rope_") and key not in _SIZES)


def keys(fields: Mapping[str, Any], found_widths: Sequence[int | None], where: str) -> dict[str, Any]:
  """MaxText's keys for the model.

  Args:
    fields: of `config.json`.
    found_widths: of the blocks, in order, since no field says whether they are re-allocated; None where unknown.
    where: the file, for messages.

  Raises:
    ConfigError: not a model of these kinds, a field that is missing or has a value that cannot be had.
  """
  kind = fields.get("model_type")
  if not isinstance(kind, str) or kind not in KINDS:
    raise ConfigError(f"{where}: model_type={kind} is not known; {' and '.join(KINDS)} are.")
  own, fixed, name = KINDS[kind]
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
  known = {*sizes.values(), *_FIELDS, *fixed, *_AGGREGATES}
  for field, value in fields.items():
    if value and field not in known and any(part in field for part in _STRANGE):
      raise ConfigError(f"{where}: {field}={value!r} is no field of the authors' {name}, and would change the model.")
  blocks = made["base_num_decoder_layers"]
  if len(found_widths) != blocks:
    raise ConfigError(f"{where}: n_layer={blocks}, and the weights have {len(found_widths)} layers.")
  made["mudd_ffn_reallocation"] = ffn.is_reallocated(made["base_mlp_dim"], found_widths)
  return made


def _typed(fields: Mapping[str, Any], field: str, where: str, default: Any = None):
  value = fields.get(field, default)
  if field in ("use_qk_norm", *_AGGREGATES):
    fits, kind = isinstance(value, bool), "true or false"
  elif field in ("norm_eps", "rope_base", "rotary_pct"):
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    kind = "a finite number above 0"
  else:
    fits, kind = isinstance(value, int) and not isinstance(value, bool) and value > 0, "a whole number above 0"
  if not fits:
    raise ConfigError(f"{where}: {field}={value!r} is not {kind}.")
  return value


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
  widths = ffn_widths.of_config(config)
  released = _released_keys() | keys(told, widths, "this model") | _implied(config)
  block = block_spec(config)
  if block.is_released:
    released["decoder_block"] = config.decoder_block.value
    if not block.takes_qk_norm:
      released["use_qk_norm"] = False
  for key, value in released.items():
    found = _plain(getattr(config, key))
    if found != value:
      raise ConfigError(f"{key}={found} is not in the authors' {name}, which has {key}={value}.")
  if widths != ffn.widths(config.mlp_dim, config.num_decoder_layers, True):
    found = ", ".join(map(str, widths))
    raise ConfigError(
      f"FFNs of {found} are not in the authors' {name}, which re-allocates {config.mlp_dim} by its rule."
    )
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
  return {**(original or others), **told}


def _implied(config) -> dict[str, Any]:
  """Keys that their code makes of others, whatever the fields say: it repeats no heads, and re-allocates every FFN."""
  width, heads = config.emb_dim, config.num_query_heads
  head_dim = width / heads if width % heads else width // heads
  return {"mudd_ffn_reallocation": True, "base_num_kv_heads": heads, "head_dim": head_dim}


def _released_keys() -> dict[str, Any]:
  """Keys that no field tells, as the authors' code has them: their defaults."""
  told_otherwise = {"mudd_kernel", "mudd_ffn_groups", "mudd_ffn_round_to", "mudd_ffn_first", "mudd_ffn_last"}
  told_otherwise |= {"mudd_init", "mudd_init_std", "mudd_rotary_fraction", "mudd_expansion_rate"}
  told_otherwise |= {"mudd_ffn_parts", "mudd_rope_table"}
  own = [key for key in MuddConfig.model_fields if key.startswith("mudd_") and key not in told_otherwise]
  return {key: _plain(MuddConfig.model_fields[key].default) for key in (*own, *_STOCK)}


def _plain(value):
  """No soft cap is 0 or None."""
  return value.value if isinstance(value, enum.Enum) else 0 if value is None else value
