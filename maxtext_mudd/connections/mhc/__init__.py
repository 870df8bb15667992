"""Manifold-constrained Hyper-Connections, mHC (arXiv 2512.24880): n residual streams whose mixing keeps their sum."""

from typing import ClassVar

from maxtext_mudd.connections.base import Cost
from maxtext_mudd.connections.mhc import keys
from maxtext_mudd.connections.multi_stream import StreamsFamily, streams_cost


class ManifoldHyperConnections(StreamsFamily):
  """`depth_connection: mhc`, with `mudd_expansion_rate` streams."""

  Keys = keys.ManifoldKeys
  matrices: ClassVar = dict.fromkeys(("phi_pre", "phi_post", "phi_res", "phi"), ((0, -2), (-1,)))
  static_weights = ("b_pre", "b_post", "b_res", "b")
  finish_modules = ("head",)

  @classmethod
  def check_sizes(cls, config) -> None:
    keys.check_sizes(config)

  @classmethod
  def cost(cls, config) -> Cost:
    """Counts φ, α, b and the norm's scale of each sublayer, and the FLOPs of x̂ φ. Sinkhorn steps, on n×n numbers for
    each token, are left out."""
    n, width = config.mudd_expansion_rate, config.emb_dim
    columns = 2 * n + keys.mixing_logits(config)
    scale = n * width if keys.has_norm_scale(config) else 0
    weighted = config.mudd_mhc_end == "weighted"
    return streams_cost(
      config,
      n * width * columns + columns + 3 + scale,
      2 * n * width * columns,
      n * width * n + n + 1 if weighted else 0,
      2 * n * width * n + 2 * n * width if weighted else 0,
    )

  @classmethod
  def why_not_plain(cls, config) -> str:
    return (
      "depth_connection=mhc starts with weights that differ from token to token, and reads a multiple of the residual "
      "stream, which changes the logits; use dense or hyper_connections"
    )

  @classmethod
  def build(cls, config, blocks, mesh, rngs, *, starts, finishes):
    from maxtext_mudd.connections.mhc.connection import build

    return build(config, blocks, rngs, starts=starts, finishes=finishes)
