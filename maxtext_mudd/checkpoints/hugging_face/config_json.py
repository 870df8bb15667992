"""Converts `config.json` of a released model to MaxText's keys, and a MaxText configuration to `config.json`.

The fields are those of the configuration classes of the authors' MUDDFormer and MUDDPythia (PyTorch).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import enum
import math
from typing import Any

from maxtext_mudd import connections
from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.checkpoints import released_ffn
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.config.mudd_config import MuddConfig
from maxtext_mudd.config.optimizer import OptimizerKeys

_COMMON_KEYS = {
  "mudd": True,
  "depth_connection": connections.DEFAULT,
  "logits_via_embedding": False,
  "enable_dropout": False,
}
# Fields with the only value that is supported.
_COMMON_FIELDS = {
  "dense": True,
  "dense_type": "qkvr",
  "dynamic_dense": True,
  "sepln": True,
  "tie_word_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One of the two published architectures.

  Attributes:
    name: name of the model class.
    keys: MaxText's keys of all its models.
    fields: fields of `config.json` with the only value that is supported.
    sizes: fields that state sizes and other numbers, by MaxText's key.
  """

  name: str
  keys: dict[str, Any]
  fields: dict[str, Any]
  sizes: dict[str, str]


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
FAMILIES = {  # by model_type
  "muddformer": Architecture(
    "MUDDFormer",
    _COMMON_KEYS | {"decoder_block": "qwen3", "mlp_activations": ["silu", "linear"]},
    _COMMON_FIELDS,
    _SIZES,
  ),
  "muddpythia": Architecture(
    "MUDDPythia",
    _COMMON_KEYS | {"decoder_block": "gpt3", "mudd_decoder_layer": "pythia", "mlp_activations": ["gelu"]},
    _COMMON_FIELDS | {"use_linear_bias": True, "use_parallel_residual": True},
    _SIZES | {"mudd_rotary_fraction": "rotary_pct"},
  ),
}
_AGGREGATE_FLAGS = ("round64", "expand_last")
_FLAGS = ("use_qk_norm", *_AGGREGATE_FLAGS)
_POSITIVE_NUMBERS = ("norm_eps", "rope_base", "rotary_pct")
# A field that the authors' code does not have is refused if its name has one of these parts.
_SUSPICIOUS = ("rope", "rotary", "scal", "window", "soft_cap", "softcap", "bias", "parallel", "hidden_act")
_SUSPICIOUS += ("activation", "expert", "moe", "quant")
# MaxText's keys that change the function of a model. The authors' code computes the models with their defaults only.
_DEFAULT_ONLY = ("attention_type", "attention_bias", "attention_sink", "attention_output_dim", "moba")
_DEFAULT_ONLY += ("temperature_tuning", "attn_logits_soft_cap", "final_logits_soft_cap", "qk_norm_with_scale")
_DEFAULT_ONLY += ("partial_rotary_factor", "local_rope_max_timescale", "nope_layer_interval")
_DEFAULT_ONLY += ("use_untrainable_positional_embedding", "trainable_position_size", "use_post_attn_norm")
_DEFAULT_ONLY += ("use_post_ffw_norm", "mlp_bias", "mlp_activations_limit", "num_experts", "mtp_num_layers")
_DEFAULT_ONLY += ("quantization", "global_parameter_scale")
_DEFAULT_ONLY += tuple(key for key in MuddConfig.model_fields if key.startswith("rope_") and key not in _SIZES)
# Keys of this project for which a model may have other values than the defaults: `config.json` states or implies their
# values, or they do not change the function.
_STATED_OR_FREE = {"mudd_kernel", "mudd_ffn_groups", "mudd_ffn_round_to", "mudd_ffn_first", "mudd_ffn_last"}
_STATED_OR_FREE |= {"mudd_init", "mudd_init_std", "mudd_rotary_fraction", "mudd_expansion_rate"}
_STATED_OR_FREE |= {"mudd_ffn_parts", "mudd_rope_table"}
_STATED_OR_FREE |= {*OptimizerKeys.model_fields}


def keys(fields: Mapping[str, Any], block_widths: Sequence[int | None], file: str) -> dict[str, Any]:
  """MaxText's keys of the model.

  Args:
    fields: the fields of `config.json`.
    block_widths: the FFN width of each block, as its tensors show it; None where they do not. No field states whether
      FFNs are re-allocated.
    file: the path of `config.json`, for messages.

  Raises:
    ConfigError: the model is of neither family, or a field is missing or has a value that is not supported.
  """
  model_type = fields.get("model_type")
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise ConfigError(f"{file}: model_type={model_type} is not known; {' and '.join(FAMILIES)} are.")
  family = FAMILIES[model_type]
  for field, value in family.fields.items():
    if fields.get(field, value) != value:
      raise ConfigError(f"{file}: {field}={fields[field]} is not supported; {field}={value} is.")
  model_keys = dict(family.keys)
  for key, field in family.sizes.items():
    if field not in fields:
      raise ConfigError(f"{file} has no {field}.")
    model_keys[key] = _checked(fields, field, file)
  model_keys["mudd_hidden_round_to"] = 64 if _checked(fields, "round64", file, False) else 0
  model_keys["mudd_last_hidden_expansion"] = 4.0 if _checked(fields, "expand_last", file, False) else 1.0
  known = {*family.sizes.values(), *family.fields, *_AGGREGATE_FLAGS}
  for field, value in fields.items():
    if value and field not in known and any(part in field for part in _SUSPICIOUS):
      raise ConfigError(
        f"{file}: {field}={value!r} is not a field of the authors' {family.name}, and would change the model."
      )
  blocks = model_keys["base_num_decoder_layers"]
  if len(block_widths) != blocks:
    raise ConfigError(f"{file}: n_layer={blocks}, and the weights have {len(block_widths)} layers.")
  model_keys["mudd_ffn_reallocation"] = released_ffn.is_reallocated(model_keys["base_mlp_dim"], block_widths)
  return model_keys


def _checked(fields: Mapping[str, Any], field: str, file: str, default: Any = None):
  """The value of a field. Raises ConfigError if the value has a wrong type or is out of the field's range."""
  value = fields.get(field, default)
  if field in _FLAGS:
    is_valid, kind = isinstance(value, bool), "true or false"
  elif field in _POSITIVE_NUMBERS:
    is_valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    kind = "a finite number above 0"
  else:
    is_valid, kind = isinstance(value, int) and not isinstance(value, bool) and value > 0, "a whole number above 0"
  if not is_valid:
    raise ConfigError(f"{file}: {field}={value!r} is not {kind}.")
  return value


def fields(config, original: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.json` for a model.

  Args:
    config: MaxText's configuration of the model.
    original: the fields of the model's `config.json` before it was converted; empty if it was trained with MaxText.
      Fields that do not change the function are taken from it.

  Raises:
    ConfigError: the authors' code has no such model.
  """
  model_type = "muddpythia" if config.mudd_decoder_layer == "pythia" else "muddformer"
  family = FAMILIES[model_type]
  model_fields = {
    "model_type": model_type,
    **family.fields,
    **{field: _plain(getattr(config, key)) for key, field in family.sizes.items()},
    "round64": config.mudd_hidden_round_to == 64,
    "expand_last": config.mudd_last_hidden_expansion == 4.0,
  }
  _check_supported(config, family.name, model_fields)
  defaults = {
    "architectures": [family.name],
    "auto_map": {
      "AutoConfig": f"configuration_{model_type}.{family.name}Config",
      "AutoModelForCausalLM": f"modeling_{model_type}.{family.name}",
    },
    "stack_hidden": False,
    "is_training": False,
    "use_gradient_checkpointing": False,
    "use_layer_cache": True,
    "torch_dtype": str(config.weight_dtype),
  }
  return {**(original or defaults), **model_fields}


def _check_supported(config, name: str, model_fields: Mapping[str, Any]) -> None:
  """Raises ConfigError unless the authors' code computes the configuration's model from these fields."""
  widths = ffn_widths.of_config(config)
  released = _unstated_keys() | keys(model_fields, widths, "this model") | _implied_keys(config)
  block = block_spec(config)
  if block.is_released:  # the block differs from the authors' block at most by a factor, which `names` applies
    released["decoder_block"] = config.decoder_block.value
    if not block.takes_qk_norm:
      released["use_qk_norm"] = False
  for key, value in released.items():
    configured = _plain(getattr(config, key))
    if configured != value:
      raise ConfigError(f"{key}={configured} is not in the authors' {name}, which has {key}={value}.")
  if widths != released_ffn.for_blocks(config.mlp_dim, config.num_decoder_layers, True):
    raise ConfigError(
      f"FFN widths {', '.join(map(str, widths))} are not in the authors' {name}, which re-allocates {config.mlp_dim} "
      "by its rule."
    )


def _implied_keys(config) -> dict[str, Any]:
  """Values of the keys that the authors' code derives. It shares no key heads, and re-allocates all FFNs."""
  width, heads = config.emb_dim, config.num_query_heads
  head_dim = width / heads if width % heads else width // heads
  return {"mudd_ffn_reallocation": True, "base_num_kv_heads": heads, "head_dim": head_dim}


def _unstated_keys() -> dict[str, Any]:
  """Values of the keys that no field states. The authors' code has their default values."""
  mudd_keys = [key for key in MuddConfig.model_fields if key.startswith("mudd_") and key not in _STATED_OR_FREE]
  return {key: _plain(MuddConfig.model_fields[key].default) for key in (*mudd_keys, *_DEFAULT_ONLY)}


def _plain(value):
  """A value that can be compared and written to JSON; both 0 and None turn a soft cap off."""
  return value.value if isinstance(value, enum.Enum) else 0 if value is None else value
