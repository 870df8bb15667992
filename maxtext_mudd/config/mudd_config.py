"""The configuration: MaxText's, with the keys of MUDD connections."""

from collections.abc import Iterable
import difflib
import os

from maxtext.configs.types import MaxTextConfig
from maxtext.utils import accelerator_to_spec_map
from pydantic import model_validator

from maxtext_mudd import blocks, kernels
from maxtext_mudd.assets import BYTE_TOKENIZER, BYTE_TOKENIZER_FOLDER
from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.config import slices
from maxtext_mudd.config.keys import MuddKeys
from maxtext_mudd.kernels import ACTIVATIONS

# Those of MaxText's get_remat_policy, which asserts; it reads none as no policy.
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


def _refuse(settings: Iterable[tuple[bool, str, str]], condition: str) -> None:
  """Raises for the first (whether it is on, setting, why not and what would work) that is on."""
  for is_on, setting, reason in settings:
    if is_on:
      raise ValueError(f"{setting} does not work with {condition}: {reason}.")


def _at_least_one(value) -> bool:
  try:
    return int(value) >= 1
  except (TypeError, ValueError):
    return False


class MuddConfig(MuddKeys, MaxTextConfig):
  """MaxText's configuration with MUDD connections; every combination that cannot work is refused here."""

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
    if not _at_least_one(number):
      raise ValueError(f"compile_topology_num_slices={number} is not a number of slices; set it to 1 or more.")
    return values

  @model_validator(mode="before")
  @classmethod
  def _check_batch(cls, values: dict) -> dict:
    batch, length, tiles = map(values.get, ("per_device_batch_size", "max_target_length", "num_vocab_tiling"))
    if not all(isinstance(x, int | float) for x in (batch, length, tiles)) or tiles < 1:
      return values  # to be refused for it
    if batch <= 0:
      raise ValueError(f"per_device_batch_size={batch} is no batch; use 1 or more, or a share of 1, such as 0.5.")
    if batch * length % tiles:
      raise ValueError(
        f"per_device_batch_size={batch} with max_target_length={length} makes {batch * length:g} tokens for a device, "
        f"not a multiple of num_vocab_tiling={tiles}; use per_device_batch_size=1, say, or change the others."
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

  @model_validator(mode="after")
  def _check_model(self):
    policy = self.remat_policy
    if policy and policy not in REMAT_POLICIES:
      nearest = difflib.get_close_matches(policy, REMAT_POLICIES, n=1, cutoff=0.0)[0]
      raise ValueError(f"remat_policy={policy}: there is no such policy; the nearest is {nearest}.")
    if self.mudd_decoder_layer == "pythia":
      self._check_pythia()
    if self.mudd_init != "stock":
      self._check_init()
    if self.mudd:
      if self.mudd_ffn_parts > 1:
        self._check_parts()
      self._check_feed_forward()
      self._check_sources()
      self._check_stock_features()
    return self

  @model_validator(mode="after")
  def _check_lengths(self):
    if self.max_target_length < 1:
      raise ValueError(f"max_target_length={self.max_target_length} has no room for a token; set it to 1 or more.")
    if self.use_chunked_prefill and self.prefill_chunk_size < 1:
      raise ValueError(
        f"prefill_chunk_size={self.prefill_chunk_size} is no number of tokens; set it to 1 or more, or "
        "use_chunked_prefill=False."
      )
    block = self.decoder_block.value
    if self.use_chunked_prefill and block in blocks.DECODER_BLOCKS and not blocks.spec(self).takes_chunked_prefill:
      raise ValueError(
        f"use_chunked_prefill=True does not work with decoder_block={block!r}: MaxText's attends to one chunk alone; "
        "set it to False."
      )
    return self

  def _check_init(self):
    block = self.decoder_block.value
    refused = (
      (
        block not in blocks.DECODER_BLOCKS,
        f"decoder_block={block!r}",
        f"its rules are for {', '.join(blocks.DECODER_BLOCKS)}; use one of these, or mudd_init=stock",
      ),
      (
        self.inhomogeneous_layer_cycle_interval > 1,
        f"inhomogeneous_layer_cycle_interval={self.inhomogeneous_layer_cycle_interval}",
        "its rules are for layers that are alike; set it to 1, or mudd_init=stock",
      ),
      (
        self.mtp_num_layers > 0,
        f"mtp_num_layers={self.mtp_num_layers}",
        "MaxText starts the layers of MTP by its own rule; set it to 0, or mudd_init=stock",
      ),
    )
    _refuse(refused, f"mudd_init={self.mudd_init}")

  def _check_pythia(self):
    rotated = self.head_dim * self.mudd_rotary_fraction
    refused = (
      (
        self.decoder_block.value != "gpt3",
        f"decoder_block={self.decoder_block.value!r}",
        "its LayerNorms and counts are those of gpt3; set decoder_block=gpt3",
      ),
      (
        len(self.mlp_activations) != 1 or self.mlp_activations[0] not in ACTIVATIONS,
        f"mlp_activations={self.mlp_activations}",
        f"its MLP has one activation, {' or '.join(ACTIVATIONS)}; set mlp_activations=[gelu]",
      ),
      (
        rotated % 2 != 0,
        f"mudd_rotary_fraction={self.mudd_rotary_fraction}",
        f"{rotated:g} of head_dim={self.head_dim} would be rotated; an even number is needed",
      ),
      (self.num_experts > 1, f"num_experts={self.num_experts}", "it has one dense MLP; set it to 1"),
      (
        self.trainable_position_size > 0,
        f"trainable_position_size={self.trainable_position_size}",
        "its positions are rotary; leave it at -1",
      ),
      (
        self.mtp_num_layers > 0,
        f"mtp_num_layers={self.mtp_num_layers}",
        "MaxText's MTP knows no such layer; set it to 0",
      ),
    )
    _refuse(refused, "mudd_decoder_layer=pythia")

  def _check_parts(self):
    axes = [axis for name, axes in self.logical_axis_rules if name == "mlp" for axis in axes]
    divided = [f"{net}_{axis}_parallelism" for axis in axes for net in ("ici", "dcn")]
    divided = [f"{key}={getattr(self, key)}" for key in divided if getattr(self, key, 1) != 1]
    narrowest = min(ffn_widths.of_config(self))
    refused = (
      (self.num_experts > 1, f"num_experts={self.num_experts}", "experts are not computed in parts"),
      (bool(self.quantization.value), f"quantization={self.quantization.value}", "its scales are of whole kernels"),
      (bool(divided), ", ".join(divided), "devices share the width already"),
      (self.mudd_ffn_parts > narrowest, f"an FFN of width {narrowest}", "it has fewer columns"),
    )
    _refuse(
      ((is_on, setting, f"{reason}; set mudd_ffn_parts=1") for is_on, setting, reason in refused),
      f"mudd_ffn_parts={self.mudd_ffn_parts}",
    )

  def _check_stock_features(self):
    block = self.decoder_block.value
    if block not in blocks.DECODER_BLOCKS:
      raise ValueError(
        f"decoder_block={block!r} is not supported with mudd=True; supported are {', '.join(blocks.DECODER_BLOCKS)}."
      )
    refused = (
      (
        self.inhomogeneous_layer_cycle_interval > 1,
        f"inhomogeneous_layer_cycle_interval={self.inhomogeneous_layer_cycle_interval}",
        "an aggregate follows each single block; set it to 1",
      ),
      (
        self.mudd_rope_table != "stock" and self.rope_type.value != "default",
        f"mudd_rope_table={self.mudd_rope_table} with rope_type={self.rope_type.value}",
        "the released code has the default table; set mudd_rope_table=stock",
      ),
      (
        self.mudd_rope_table != "stock" and not blocks.spec(self).is_rotary,
        f"mudd_rope_table={self.mudd_rope_table} with decoder_block={block!r}",
        "its positions are not rotary; set mudd_rope_table=stock",
      ),
      (self.fused_qkv, "fused_qkv=True", "q, k and v have inputs of their own; set fused_qkv=False"),
      (self.share_kv_projections, "share_kv_projections=True", "k and v have inputs of their own; set it to False"),
      (self.attention_type == "mla", "attention_type='mla'", "its latent is made of one input; use 'global'"),
      (
        self.using_pipeline_parallelism,
        "ici_pipeline_parallelism or dcn_pipeline_parallelism above 1",
        "block outputs are not passed between stages; use fsdp or tensor parallelism",
      ),
      (
        self.mhc_expansion_rate > 1,
        f"mhc_expansion_rate={self.mhc_expansion_rate}",
        "it is another depth connection; set it to 1",
      ),
      (bool(self.engram_layers), "engram_layers", "only deepseek has them; leave it empty"),
      (
        self.shard_mode.value == "explicit",
        "shard_mode=explicit",
        "the aggregates leave sharding to the compiler; use shard_mode=auto",
      ),
      (
        self.opt_type.value == "muon",
        "opt_type=muon",
        "it would orthogonalise the static weights of the aggregates; use adamw",
      ),
      (self.use_multimodal, "use_multimodal=True", "visual features are added between layers; set it to False"),
    )
    _refuse(refused, "mudd=True")
    if self.scan_layers:
      self._check_scanned()
    kernel_refused = (
      (
        self.mudd_kernel == "pallas" and self.hardware != "tpu",
        f"hardware={self.hardware}",
        "it is compiled for TPUs; use mudd_kernel=auto",
      ),
      (
        self.mudd_kernel.startswith("pallas") and self.dtype.value not in kernels.DTYPES,
        f"dtype={self.dtype.value}",
        f"it takes {' or '.join(kernels.DTYPES)}; use one of these, or mudd_kernel=xla",
      ),
    )
    _refuse(kernel_refused, f"mudd_kernel={self.mudd_kernel}")
    if self.depth_connection == "hyper_connections":
      self._check_hyper_connections()

  def _check_scanned(self):
    refused = (
      (
        self.param_scan_axis not in (0, 1),
        f"param_scan_axis={self.param_scan_axis}",
        "norms have two dimensions where they are stacked; use 0 or 1",
      ),
      (
        self.parameter_memory_host_offload,
        "parameter_memory_host_offload=True",
        "all layers would be kept on the device for the backward pass; set scan_layers=False",
      ),
    )
    _refuse(refused, "mudd=True and scan_layers=True")

  def _check_hyper_connections(self):
    refused = (
      (
        blocks.spec(self).is_parallel,
        f"mudd_decoder_layer={self.mudd_decoder_layer}",
        "its attention and FFN read one input in parallel; use a sequential decoder_block",
      ),
      (
        self.enable_dropout and self.dropout_rate > 0,
        f"dropout_rate={self.dropout_rate}",
        "MaxText drops parts of the one residual stream, and there are several; set it to 0",
      ),
      (
        bool(self.record_internal_nn_metrics),
        f"record_internal_nn_metrics={self.record_internal_nn_metrics}",
        "MaxText measures the one residual stream, and there are several; set it to 0",
      ),
    )
    _refuse(refused, "depth_connection=hyper_connections")
