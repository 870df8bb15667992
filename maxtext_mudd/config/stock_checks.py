"""Checks of MaxText's own keys: refuses values that MaxText accepts, and with which it fails later or unclearly."""

import os

from maxtext.utils import accelerator_to_spec_map
from pydantic import BaseModel, model_validator

from maxtext_mudd import blocks
from maxtext_mudd.assets import BYTE_TOKENIZER, BYTE_TOKENIZER_FOLDER
from maxtext_mudd.config import errors, slices

# The policies that MaxText's get_remat_policy knows, besides an empty one. It fails on others by an assertion.
REMAT_POLICIES = (
  "none",
  "minimal_with_context",
  "minimal_flash",
  "minimal",
  "minimal_with_quantization",
  "minimal_with_context_and_quantization",
  "save_dot_with_context_except_mlp",
  "save_dot_except_mlpwi",
  "save_dot_except_mlp",
  "save_qkv_proj",
  "qkv_proj_offloaded",
  "minimal_offloaded",
  "custom",
  "save_out_proj",
  "full",
)

# Among those that take connections.
_BLOCKS_OF_MUON = (
  "llama2",
  "qwen3",
  "qwen3_moe",
  "qwen3_custom_moe",
  "qwen3_next",
  "gemma3",
  "gpt_oss",
  "deepseek",
  "deepseek4",
)


class StockChecks(BaseModel):
  """Checks for a class that also inherits MaxText's configuration. This class adds no keys."""

  @model_validator(mode="before")
  @classmethod
  def _check_topology(cls, values: dict) -> dict:
    name, known = values.get("compile_topology"), accelerator_to_spec_map.UserFacingNameToSystemCharacteristics
    if not name or values.get("internal_compile"):
      return values
    if name not in known:
      nearest = slices.nearest(str(name), known)
      raise ValueError(f"compile_topology={name}: there is no such topology; the nearest is {nearest}.")
    number = values.get("compile_topology_num_slices")
    if not _is_at_least_one(number):
      raise ValueError(f"compile_topology_num_slices={number} is not a number of slices; set it to 1 or more.")
    return values

  @model_validator(mode="before")
  @classmethod
  def _check_batch(cls, values: dict) -> dict:
    batch, length, tiles = map(values.get, ("per_device_batch_size", "max_target_length", "num_vocab_tiling"))
    if not all(isinstance(x, int | float) for x in (batch, length, tiles)) or tiles < 1:
      return values  # refused later, by the check of types
    if batch <= 0:
      raise ValueError(f"per_device_batch_size={batch} is not a batch size; use 1 or more, or a fraction such as 0.5.")
    if batch * length % tiles:
      raise ValueError(
        f"per_device_batch_size={batch} with max_target_length={length} makes {batch * length:g} tokens per device, "
        f"which is not a multiple of num_vocab_tiling={tiles}; use per_device_batch_size=1, or change the others."
      )
    return values

  @model_validator(mode="before")
  @classmethod
  def _resolve_paths(cls, values: dict) -> dict:
    tokenizer = str(values.get("tokenizer_path"))
    if tokenizer == BYTE_TOKENIZER:
      values = values | {"tokenizer_path": str(BYTE_TOKENIZER_FOLDER)}
    elif tokenizer.startswith(f"{BYTE_TOKENIZER.split('/')[0]}/"):
      raise ValueError(f"tokenizer_path={tokenizer}: this package has one tokenizer, {BYTE_TOKENIZER}.")
    output = values.get("base_output_directory")
    if output and "://" not in output:  # Orbax takes absolute paths only
      values = values | {"base_output_directory": os.path.abspath(output)}
    return values

  @model_validator(mode="before")
  @classmethod
  def _check_muon(cls, values: dict) -> dict:
    """MaxText's sentence names a command that does not make its Muon take the block."""
    block = getattr(values.get("decoder_block"), "value", values.get("decoder_block"))
    if values.get("opt_type") == "muon" and block in blocks.DECODER_BLOCKS and block not in _BLOCKS_OF_MUON:
      raise ValueError(
        f"opt_type=muon does not work with decoder_block={block!r}: MaxText has Muon for {', '.join(_BLOCKS_OF_MUON)}; "
        "use one of these, or opt_type=adamw."
      )
    return values

  @model_validator(mode="after")
  def _check_policy(self):
    policy = self.remat_policy
    if policy and policy not in REMAT_POLICIES:
      nearest = errors.nearest(policy, REMAT_POLICIES)
      raise ValueError(f"remat_policy={policy}: there is no such policy; the nearest is {nearest}.")
    return self

  @model_validator(mode="after")
  def _check_lengths(self):
    if self.max_target_length < 1:
      raise ValueError(f"max_target_length={self.max_target_length} is less than one token; set it to 1 or more.")
    if self.use_chunked_prefill and self.prefill_chunk_size < 1:
      raise ValueError(
        f"prefill_chunk_size={self.prefill_chunk_size} is not a number of tokens; set it to 1 or more, or "
        "use_chunked_prefill=False."
      )
    return self


def _is_at_least_one(value) -> bool:
  try:
    return int(value) >= 1
  except (TypeError, ValueError):
    return False
