"""The keys that costs are counted from, read from configuration files without JAX or MaxText's modules."""

from collections.abc import Sequence
import enum
from typing import Any

import omegaconf
from pydantic import PositiveInt, model_validator

from maxtext_mudd import blocks
from maxtext_mudd.config import files as config_files
from maxtext_mudd.config.keys import MuddKeys, check_sizes
from maxtext_mudd.runs import early

DecoderBlock = enum.Enum("DecoderBlock", {name: name for name in blocks.DECODER_BLOCKS})


class Sizes(MuddKeys):
  """What `counts`, `paper` and `topology` read of a configuration: MaxText's keys of the same names.

  MaxText's derived sizes are its base sizes, as with global_parameter_scale=1.
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
  """The sizes of the model that a command line describes.

  Args:
    argv: as of `early.check`, which it has passed.
    overrides: keys that go before those of the command line.

  Returns:
    None where MaxText derives sizes by more rules than these: by scaling, `model_name`, variables of the environment,
    references between keys, a file of MaxText's besides base.yml, a decoder block that has no MUDD connections, or
    experts of another width than base_mlp_dim.

  Raises:
    pydantic.ValidationError: a value is of another type, or MUDD connections do not work in a model of this size.
  """
  given = config_files.values(argv)
  stock = config_files.stock_file()
  values = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.load(stock), given, overrides)
  if given.get("base_config") not in (None, str(stock)) or early.is_changed_later(values):
    return None
  keys = early.plain(values)
  if keys["global_parameter_scale"] != 1 or keys["decoder_block"] not in blocks.DECODER_BLOCKS:
    return None
  if keys["num_experts"] != 1 and keys["base_moe_mlp_dim"] != keys["base_mlp_dim"]:
    return None
  return Sizes(**{key: value for key, value in keys.items() if key in Sizes.model_fields})
