"""Reads the sizes of a model, from which its costs are counted, without importing JAX or MaxText's modules.

`read` returns None if only MaxText itself can tell the sizes.
"""

from collections.abc import Sequence
import enum
from typing import Any

import omegaconf
from pydantic import BaseModel, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from maxtext_mudd import blocks
from maxtext_mudd.config import files as config_files
from maxtext_mudd.config.keys import MuddKeys, check_sizes
from maxtext_mudd.runs import early_check

DecoderBlock = enum.Enum("DecoderBlock", {name: name for name in blocks.PLAIN_BLOCKS})
ShardMode = enum.Enum("ShardMode", {name: name for name in ("auto", "explicit")})


class Adapters(BaseModel):
  """The key of MaxText's group `lora` that pipelines refuse."""

  enable_lora: bool = False


class Sizes(MuddKeys):
  """The keys of a configuration that `counts`, `paper`, `pipeline` and `connections` read, with MaxText's names and
  values.

  The sizes that MaxText derives equal its base sizes, because `read` accepts global_parameter_scale=1 only.
  """

  decoder_block: DecoderBlock
  base_emb_dim: PositiveInt
  base_mlp_dim: PositiveInt
  base_moe_mlp_dim: int
  base_num_decoder_layers: PositiveInt
  base_num_query_heads: PositiveInt
  base_num_kv_heads: PositiveInt
  head_dim: PositiveInt
  mlp_activations: list[str]
  num_experts: PositiveInt
  num_experts_per_tok: PositiveInt
  vocab_size: PositiveInt
  max_target_length: PositiveInt
  trainable_position_size: int
  attention_bias: bool
  logits_via_embedding: bool
  use_qk_norm: bool
  scan_layers: bool
  mtp_num_layers: NonNegativeInt
  dtype: str
  per_device_batch_size: PositiveFloat
  pipeline_delay_activation_forwarding: bool
  record_internal_nn_metrics: int
  shard_mode: ShardMode
  opt_type: str
  load_balance_loss_weight: float
  eval_interval: int
  eval_per_device_batch_size: float
  lora: Adapters = Adapters()

  @property
  def emb_dim(self) -> int:
    return self.base_emb_dim

  @property
  def mlp_dim(self) -> int:
    return self.base_mlp_dim

  @property
  def moe_mlp_dim(self) -> int:
    return self.base_moe_mlp_dim

  @property
  def num_decoder_layers(self) -> int:
    return self.base_num_decoder_layers

  @property
  def num_query_heads(self) -> int:
    return self.base_num_query_heads

  @property
  def num_kv_heads(self) -> int:
    return self.base_num_kv_heads

  @model_validator(mode="after")
  def _check_connections(self):
    check_sizes(self)
    return self


def read(argv: Sequence[str], **overrides: Any) -> Sizes | None:
  """Reads the sizes of the model that a command line describes.

  Args:
    argv: arguments that `early_check.check` has accepted.
    overrides: keys that override those of the command line.

  Returns:
    The sizes, or None if only MaxText can derive them. It does so for scaling, `model_name`, environment variables,
    references between keys, a base file of MaxText other than base.yml, a decoder block that has no MUDD connections,
    and experts whose width is not base_mlp_dim.

  Raises:
    pydantic.ValidationError: a value has a wrong type, or MUDD connections do not work in a model of this size.
  """
  given = config_files.values(argv)
  stock = config_files.stock_file()
  values = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.load(stock), given, overrides)
  if given.get("base_config") not in (None, str(stock)) or early_check.is_changed_by_maxtext(values):
    return None
  keys = early_check.constructor_values(values)
  if keys["global_parameter_scale"] != 1 or keys["decoder_block"] not in blocks.PLAIN_BLOCKS:
    return None
  if keys["num_experts"] != 1 and keys["base_moe_mlp_dim"] != keys["base_mlp_dim"]:
    return None
  return Sizes(**{key: value for key, value in keys.items() if key in Sizes.model_fields})
