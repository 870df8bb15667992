"""Hyper-Connections (Zhu et al., arXiv 2409.19606): several residual streams, mixed before each sublayer."""

from maxtext_mudd.connections.base import BaseFamily, Cost
from maxtext_mudd.connections.hyper_connections import keys


class HyperConnections(BaseFamily):
  """`depth_connection: hyper_connections`, with `mudd_expansion_rate` streams."""

  Keys = keys.HyperConnectionKeys
  reads = "sublayer"

  @classmethod
  def refusals(cls, config):
    return keys.refusals(config)

  @classmethod
  def cost(cls, config) -> Cost:
    """Counts for two sublayers in each block: α, β and the norm's scale, the FLOPs of computing them, of mixing and of
    writing, and n - 1 more streams per block."""
    n, width, sublayers = config.mudd_expansion_rate, config.emb_dim, 2 * config.num_decoder_layers
    static = n * (n + 1) + n if config.mudd_static else 0
    dynamic = width * (n + 3) + 2 if config.mudd_dynamic else 0
    weights = 2 * n * (n + 2) * width if config.mudd_dynamic else 0
    return Cost(
      parameters=sublayers * (static + dynamic),
      flops=sublayers * (weights + 2 * n * (n + 1) * width + 2 * n * width),
      activations=config.num_decoder_layers * (n - 1),
    )

  @classmethod
  def build(cls, config, blocks, mesh, rngs, *, starts, finishes):
    from maxtext_mudd.connections.hyper_connections.connection import HyperConnection

    return HyperConnection(config, blocks, rngs, starts=starts, finishes=finishes)
