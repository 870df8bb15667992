"""Hyper-Connections (Zhu et al., arXiv 2409.19606): several residual streams, mixed before each sublayer."""

from typing import ClassVar

from maxtext_mudd.connections.base import Cost
from maxtext_mudd.connections.hyper_connections.keys import HyperKeys
from maxtext_mudd.connections.multi_stream import StreamsFamily, streams_cost


class HyperConnections(StreamsFamily):
  """`depth_connection: hyper_connections`, with `mudd_expansion_rate` streams."""

  Keys = HyperKeys
  matrices: ClassVar = {"w_alpha": ((0,), (-1,))}
  static_weights = ("static_alpha", "static_beta")

  @classmethod
  def cost(cls, config) -> Cost:
    """Counts α, β and the norm's parameters of each sublayer, and the FLOPs of computing α and β."""
    n, width = config.mudd_expansion_rate, config.emb_dim
    static = n * (n + 1) + n if config.mudd_static else 0
    norm = width * (2 if config.mudd_hyper_norm == "layer" else 1)
    dynamic = norm + width * (n + 2) + 2 if config.mudd_dynamic else 0
    flops = 2 * n * (n + 2) * width if config.mudd_dynamic else 0
    return streams_cost(config, static + dynamic, flops)

  @classmethod
  def output_init_scale(cls, config) -> float:
    return config.mudd_expansion_rate**0.5 if config.mudd_hyper_scaled_init else 1.0

  @classmethod
  def why_not_plain(cls, config) -> str | None:
    if config.mudd_hyper_scaled_init:
      return (
        "mudd_hyper_scaled_init=True scales initial kernels, and those of a trained model are given; leave it at False"
      )
    if config.mudd_hyper_end == "sum":
      return (
        "mudd_hyper_end=sum: the epsilon of the final norm weighs less beside a sum of streams, which changes the "
        "logits; use mudd_hyper_end=mean"
      )
    return None

  @classmethod
  def build(cls, config, blocks, mesh, rngs, *, starts, finishes):
    from maxtext_mudd.connections.hyper_connections.connection import build

    return build(config, blocks, starts=starts, finishes=finishes)
