"""Attention Residuals, AttnRes (arXiv 2603.15031): each sublayer reads a softmax-weighted sum of earlier outputs."""

from maxtext_mudd.connections.attnres import keys
from maxtext_mudd.connections.base import BaseFamily, Cost
from maxtext_mudd.connections.family_keys import kernel_refusals, sublayer_refusals


class AttentionResiduals(BaseFamily):
  """`depth_connection: attnres`: Full AttnRes, or Block AttnRes with `mudd_attnres_block` sublayers a block."""

  Keys = keys.AttnResKeys
  reads = "sublayer"
  start_modules = ("depth_queries",)

  @classmethod
  def check_sizes(cls, config) -> None:
    keys.check_sizes(config)

  @classmethod
  def refusals(cls, config):
    yield from kernel_refusals(config)
    yield from sublayer_refusals(config)

  @classmethod
  def cost(cls, config) -> Cost:
    """Counts a query and a key norm for each sublayer and for the final aggregate. FLOPs are those of the logits for
    all queries, which each sublayer makes of the newest sum, and of mixing. Kept are the gradients of all sources but
    one, and the sums of S sublayers that end with an attention: other sums are outputs of layers."""
    width, sublayers = config.emb_dim, keys.sublayers(config)
    queries = sublayers + 1
    mixed = sum(keys.count_sources(config, s) for s in range(queries))
    ends = range(config.mudd_attnres_block, sublayers, config.mudd_attnres_block)
    return Cost(
      parameters=2 * queries * width,
      flops=2 * queries * queries * width + 2 * mixed * width,
      activations=keys.count_sources(config, sublayers) - 1 + sum(s % 2 for s in ends),
    )

  @classmethod
  def build(cls, config, blocks, mesh, rngs, *, starts, finishes):
    from maxtext_mudd.connections.attnres.connection import AttnResConnection

    return AttnResConnection(config, blocks, mesh, starts=starts, finishes=finishes)
