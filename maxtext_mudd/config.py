"""The configuration: MaxText's, plus one flat key for every hyperparameter of the paper."""

from collections.abc import Iterable
import difflib
import os
from typing import Literal

from maxtext.configs.types import MaxTextConfig
from maxtext.utils import accelerator_to_spec_map
from pydantic import Field, model_validator

from maxtext_mudd import kernels, slices, topology
from maxtext_mudd.assets import BYTE_TOKENIZER, BYTE_TOKENIZER_FOLDER
from maxtext_mudd.blocks import ATTENTION_NORMS
from maxtext_mudd.kernels.reference import ACTIVATIONS

_WEIGHT_MLP = (
  "mudd_hidden_expansion",
  "mudd_last_hidden_expansion",
  "mudd_hidden_round_to",
  "mudd_activation",
  "mudd_weight_norm_scale",
)
_WEIGHTS = ("mudd_dynamic", "mudd_static")
_DENSE = (
  *_WEIGHT_MLP,
  "mudd_ways",
  "mudd_dense_streams",
  "mudd_source_dilation",
  "mudd_block_period",
  "mudd_depth_start",
  "mudd_window",
  "mudd_pre_norm",
  "mudd_post_norm",
  "mudd_post_norm_streams",
  "mudd_first_block_norms",
  "mudd_kernel",
)
# Keys that are read only where another has one of these values.
_READ_WITH = (
  *(
    (key, "mudd", (True,))
    for key in (
      "depth_connection",
      "mudd_ffn_reallocation",
      "mudd_ffn_parts",
      "mudd_rope_table",
      "mudd_expansion_rate",
      *_DENSE,
      *_WEIGHTS,
    )
  ),
  *((key, "depth_connection", ("dense",)) for key in _DENSE),
  *((key, "depth_connection", ("dense", "hyper_connections")) for key in _WEIGHTS),
  ("mudd_expansion_rate", "depth_connection", ("hyper_connections",)),
  *((key, "mudd_dynamic", (True,)) for key in _WEIGHT_MLP),
  ("mudd_post_norm_streams", "mudd_post_norm", (True,)),
  *((f"mudd_ffn_{key}", "mudd_ffn_reallocation", (True,)) for key in ("first", "last", "round_to", "groups")),
  ("mudd_rotary_fraction", "mudd_decoder_layer", ("pythia",)),
  ("mudd_init_std", "mudd_init", ("normal",)),
)

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


class MuddConfig(MaxTextConfig):
  """MaxText's configuration with MUDD connections; every combination that cannot work is refused here."""

  mudd: bool = Field(False, description="Depth connections on; off is stock MaxText.")
  depth_connection: Literal["dense", "hyper_connections", "residual"] = Field(
    "dense", description="Family of depth connections; residual: the plain one."
  )
  mudd_ways: Literal[1, 4] = Field(4, description="C: 4 for separate q, k, v and residual streams, 1 for one input.")
  mudd_dense_streams: str = Field("qkvr", description="Streams that are aggregated; others take X_i. Needs 4 ways.")
  mudd_dynamic: bool = Field(True, description="Weights made from the newest block output (Eq. 6).")
  mudd_static: bool = Field(True, description="Learned static weights a; off: a stays as it starts.")
  mudd_hidden_expansion: float = Field(1.0, gt=0, allow_inf_nan=False, description="Factor on K = C·N.")
  mudd_last_hidden_expansion: float = Field(4.0, gt=0, allow_inf_nan=False, description="The same for the last DA.")
  mudd_hidden_round_to: int = Field(64, ge=0, description="K becomes (K // n + 1) * n, as released; 0: K exactly.")
  mudd_activation: Literal["gelu", "gelu_tanh"] = Field("gelu", description="Between W1 and W2.")
  mudd_weight_norm_scale: bool = Field(False, description="Learned scale in the norm before W1.")
  mudd_source_dilation: int = Field(1, ge=1, description="k: a DA sees every k-th block output (Fig. 9).")
  mudd_block_period: int = Field(1, ge=1, description="p: a DA follows every p-th block (Fig. 9).")
  mudd_depth_start: float = Field(
    0.0, ge=0, lt=1, description="DAs stand only after blocks beyond this share of the depth; 0: after all."
  )
  mudd_window: int = Field(0, ge=0, description="n: a DA sees the last n block outputs and the embedding; 0: all.")
  mudd_pre_norm: bool = Field(False, description="RMSNorm on every source (Eq. 10).")
  mudd_post_norm: bool = Field(False, description="RMSNorm on the sum, and X_i added to every stream (Eq. 10).")
  mudd_post_norm_streams: str = Field("r", description="Streams with a post-norm: r as released, qkvr as in Eq. 10.")
  mudd_first_block_norms: Literal["shared", "separate"] = Field(
    "shared", description="Attention norms of block 1, whose streams are equal: one, or LN_q, LN_k and LN_v."
  )
  mudd_ffn_reallocation: bool = Field(False, description="FFN width grows with depth (Eq. 9).")
  mudd_ffn_first: float = Field(0.5, gt=0, allow_inf_nan=False, description="Width of the first FFN, as a factor.")
  mudd_ffn_last: float = Field(1.5, gt=0, allow_inf_nan=False, description="Width of the last FFN, as a factor.")
  mudd_ffn_round_to: int = Field(128, ge=1, description="FFN widths are multiples of this.")
  mudd_ffn_groups: int = Field(
    0, ge=0, description="Groups of blocks with one FFN width, the mean of Eq. 9; to scan layers. 0: each its own."
  )
  mudd_ffn_parts: int = Field(
    1, ge=1, description="Parts of its width in which an FFN is computed in training, to hold less at a time."
  )
  mudd_expansion_rate: int = Field(4, ge=1, description="n: residual streams of hyper_connections (DHC×n).")
  mudd_decoder_layer: Literal["stock", "pythia"] = Field(
    "stock", description="The decoder layer: MaxText's of `decoder_block`, or Pythia's. Also without connections."
  )
  mudd_rotary_fraction: float = Field(0.25, gt=0, le=1, description="Share of each head that pythia rotates.")
  mudd_init: Literal["stock", "xavier_normal", "normal", "pythia"] = Field(
    "stock", description="How embeddings and kernels start: as in MaxText, or by a rule. Also without connections."
  )
  mudd_init_std: float = Field(0.006, gt=0, allow_inf_nan=False, description="Deviation of mudd_init=normal.")
  mudd_rope_table: Literal["stock", "bfloat16", "float16"] = Field(
    "stock",
    description="Precision of the rotary table; half as in the released PyTorch models, or that of activations.",
  )
  mudd_kernel: Literal["auto", "xla", "pallas", "pallas_interpret"] = Field(
    "auto", description="Depth-wise aggregation: fused on TPU (pallas) and plain elsewhere (xla), or as named."
  )

  log_console: Literal["brief", "full"] = Field(
    "brief",
    description="brief: the console shows progress, results, warnings and errors, and log.txt in the run's folder gets "
    "everything; full: MaxText's console, as always where base_output_directory is remote (gs://...).",
  )

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
    self._check_keys_that_do_nothing()
    if self.mudd:
      self._check_streams()
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
    if self.use_chunked_prefill and self.decoder_block.value == "gpt3" and self.mudd_decoder_layer == "stock":
      raise ValueError(
        "use_chunked_prefill=True does not work with decoder_block='gpt3': MaxText's attends to one chunk alone; set "
        "it to False."
      )
    return self

  def _check_init(self):
    block = self.decoder_block.value
    refused = (
      (
        block not in ATTENTION_NORMS,
        f"decoder_block={block!r}",
        f"its rules are for {', '.join(ATTENTION_NORMS)}; use one of these, or mudd_init=stock",
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

  def _check_keys_that_do_nothing(self):
    """An ablation without its ablation would train without a word."""
    for key, condition, values in _READ_WITH:
      found, default = getattr(self, key), type(self).model_fields[key].default
      if found != default and getattr(self, condition) not in values:
        raise ValueError(
          f"{key}={found} does nothing with {condition}={getattr(self, condition)}; leave it at {default}, or set "
          f"{condition}={' or '.join(map(str, values))}."
        )

  def _check_streams(self):
    for key in ("mudd_dense_streams", "mudd_post_norm_streams"):
      value = getattr(self, key)
      if not value or len(set(value)) < len(value) or set(value) - set(topology.WAYS):
        raise ValueError(f"{key}={value!r} must be some of the letters q, k, v and r, each at most once.")
    if self.mudd_ways == 1 and self.mudd_dense_streams != topology.WAYS:
      raise ValueError(
        f"mudd_dense_streams={self.mudd_dense_streams!r} needs mudd_ways=4; with one way all streams are the same."
      )
    if not (self.mudd_dynamic or self.mudd_static):
      raise ValueError(
        "mudd_dynamic=False with mudd_static=False leaves nothing to learn; turn one on, or set mudd=False."
      )

  def _check_sources(self):
    if self.num_decoder_layers < 1:
      raise ValueError(f"base_num_decoder_layers={self.base_num_decoder_layers} makes no blocks; use at least 1.")
    if self.mudd_block_period > self.num_decoder_layers:
      raise ValueError(
        f"mudd_block_period={self.mudd_block_period} places no DA in a model of {self.num_decoder_layers} blocks; "
        f"use at most {self.num_decoder_layers}."
      )
    if self.mudd_source_dilation > 1 and 0 < self.mudd_window <= self.mudd_source_dilation:
      raise ValueError(
        f"mudd_window={self.mudd_window} with mudd_source_dilation={self.mudd_source_dilation} leaves a DA without "
        f"sources besides its own block; use mudd_window=0 or at least {self.mudd_source_dilation + 1}."
      )
    if self.mudd_source_dilation > self.num_decoder_layers:
      raise ValueError(
        f"mudd_source_dilation={self.mudd_source_dilation} leaves every DA without sources besides its own block in a "
        f"model of {self.num_decoder_layers} blocks; use at most {self.num_decoder_layers}."
      )
    if self.depth_connection != "dense":
      return
    aggregates = topology.from_config(self).aggregates.values()
    if not aggregates and self.mudd_depth_start:
      raise ValueError(
        f"mudd_depth_start={self.mudd_depth_start} leaves no DA in a model of {self.num_decoder_layers} blocks "
        f"(mudd_block_period={self.mudd_block_period}); lower it."
      )
    if not aggregates:
      raise ValueError(
        f"mudd_dense_streams={self.mudd_dense_streams!r} leaves no DA: the only one follows the last block, and makes "
        "the residual stream; add r."
      )
    if self.mudd_dynamic and not all(aggregate.hidden for aggregate in aggregates):
      raise ValueError(
        f"mudd_hidden_expansion={self.mudd_hidden_expansion} (mudd_last_hidden_expansion="
        f"{self.mudd_last_hidden_expansion}) makes a weight MLP of width 0; raise it, or set mudd_dynamic=False."
      )

  def _check_feed_forward(self):
    if self.mudd_ffn_parts > 1:
      self._check_parts()
    if not self.mudd_ffn_reallocation:
      return
    if self.num_experts > 1 and self.mlp_dim != self.moe_mlp_dim:
      raise ValueError(
        f"mudd_ffn_reallocation=True needs experts as wide as the FFN: base_moe_mlp_dim={self.base_moe_mlp_dim}, "
        f"base_mlp_dim={self.base_mlp_dim}; make them equal."
      )
    if self.num_decoder_layers == 1:
      raise ValueError(
        "mudd_ffn_reallocation=True needs at least two blocks, and base_num_decoder_layers=1; turn it off."
      )
    if self.mudd_ffn_groups > self.num_decoder_layers:
      raise ValueError(
        f"mudd_ffn_groups={self.mudd_ffn_groups} is more than the model has blocks; use at most "
        f"{self.num_decoder_layers}, or 0 for a width of its own in each."
      )
    if self.scan_layers and not self.mudd_ffn_groups:
      raise ValueError(
        "scan_layers=True does not work with mudd_ffn_reallocation=True: every FFN has a width of its own; scan groups "
        "of equal width with mudd_ffn_groups=4, say, or set scan_layers=False."
      )
    widths = topology.from_config(self).ffn_widths
    if 0 in widths:
      raise ValueError(
        f"mudd_ffn_reallocation=True rounds the FFN of block {widths.index(0) + 1} to width 0 "
        f"(mlp_dim={self.mlp_dim}); lower mudd_ffn_round_to={self.mudd_ffn_round_to} or raise base_mlp_dim."
      )

  def _check_parts(self):
    axes = [axis for name, axes in self.logical_axis_rules if name == "mlp" for axis in axes]
    divided = [f"{net}_{axis}_parallelism" for axis in axes for net in ("ici", "dcn")]
    divided = [f"{key}={getattr(self, key)}" for key in divided if getattr(self, key, 1) != 1]
    narrowest = min(topology.from_config(self).ffn_widths)
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
    if block not in ATTENTION_NORMS:
      raise ValueError(
        f"decoder_block={block!r} is not supported with mudd=True; supported are {', '.join(ATTENTION_NORMS)}."
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
        self.mudd_rope_table != "stock" and block == "gpt3" and self.mudd_decoder_layer == "stock",
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
      (
        bool(self.quantization) and self.use_qwix_quantization,
        "use_qwix_quantization=True",
        "the backward pass would make the streams again without quantization; set scan_layers=False",
      ),
    )
    _refuse(refused, "mudd=True and scan_layers=True")

  def _check_hyper_connections(self):
    refused = (
      (self.scan_layers, "scan_layers=True", "its blocks start differently; set scan_layers=False"),
      (
        self.mudd_decoder_layer != "stock",
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
