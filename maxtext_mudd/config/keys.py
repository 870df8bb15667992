"""The keys that MUDD connections add to MaxText's: one flat key for every hyperparameter of the paper.

Imports neither JAX nor MaxText, so that a command line is checked before these are imported.
"""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.connections.base import STREAMS
from maxtext_mudd.connections.mudd import sites

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


class MuddKeys(BaseModel):
  """The keys with their defaults, and the rules that read no other keys.

  The methods `_check_sources` and `_check_feed_forward` are for classes that have the sizes of the model, too.
  """

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
    "everything; full: MaxText's console and no log.txt, as always with several processes, or where "
    "base_output_directory is remote (gs://...).",
  )

  @model_validator(mode="after")
  def _check_keys(self):
    self._check_keys_that_do_nothing()
    if self.mudd:
      self._check_streams()
    return self

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
      if not value or len(set(value)) < len(value) or set(value) - set(STREAMS):
        raise ValueError(f"{key}={value!r} must be some of the letters q, k, v and r, each at most once.")
    if self.mudd_ways == 1 and self.mudd_dense_streams != STREAMS:
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
    aggregates = sites.plan(self).sites.values()
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
    widths = ffn_widths.of_config(self)
    if 0 in widths:
      raise ValueError(
        f"mudd_ffn_reallocation=True rounds the FFN of block {widths.index(0) + 1} to width 0 "
        f"(mlp_dim={self.mlp_dim}); lower mudd_ffn_round_to={self.mudd_ffn_round_to} or raise base_mlp_dim."
      )
