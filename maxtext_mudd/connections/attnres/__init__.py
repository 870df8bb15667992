"""Attention Residuals, AttnRes (arXiv 2603.15031): each sublayer reads a softmax-weighted sum of earlier outputs."""

from maxtext_mudd.blocks import num_blocks, separate_norm_parameters
from maxtext_mudd.connections.attnres import keys
from maxtext_mudd.connections.base import BaseFamily, Cost, Held, Plan, logits_arrays
from maxtext_mudd.connections.family_keys import kernel_refusals, sublayer_refusals
from maxtext_mudd.connections.keys import Refusal


class AttentionResiduals(BaseFamily):
  """`depth_connection: attnres`: Full AttnRes, or Block AttnRes with `mudd_attnres_block` sublayers a block; with
  several heads or a route of its own for values as options."""

  Keys = keys.AttnResKeys
  reads = "sublayer"
  takes_explicit_axes = True
  start_modules = ("depth_queries",)

  @classmethod
  def check_sizes(cls, config) -> None:
    keys.check_sizes(config)

  @classmethod
  def plan(cls, config) -> Plan:
    blocks = range(1, num_blocks(config) + 1)
    return Plan(len(blocks), separate_norms=blocks if config.mudd_attnres_value_route else ())

  @classmethod
  def refusals(cls, config):
    yield from kernel_refusals(config)
    yield from sublayer_refusals(config)
    yield Refusal(
      config.mudd_attnres_heads > 1 and config.mudd_kernel.startswith("pallas"),
      f"mudd_attnres_heads={config.mudd_attnres_heads}",
      f"mudd_kernel={config.mudd_kernel}",
      "the fused kernels mix with one head; use mudd_kernel=auto or xla",
    )
    yield Refusal(
      config.mudd_attnres_heads > 1 and config.shard_mode.value == "explicit",
      f"mudd_attnres_heads={config.mudd_attnres_heads}",
      "shard_mode=explicit",
      "the channels of a head would have to be gathered; use shard_mode=auto",
    )

  @classmethod
  def cost(cls, config) -> Cost:
    """Counts a query and a key norm for each sublayer and for the final aggregate; with a value route, two for each
    attention, and its three norms. FLOPs are those of the logits for all queries, which each sublayer makes of the
    newest sum (the method needs fewer, see `scored_sources`), and of mixing. Kept are the gradients of all sources but
    one, the logits and their gradients, the stream of values, and the sums of S sublayers that end with an attention:
    other sums are outputs of layers."""
    width, sublayers, queries = config.emb_dim, keys.sublayers(config), keys.count_queries(config)
    mixed = sum(keys.count_sources(config, s) * keys.count_ways(config, s) for s in range(sublayers + 1))
    ends = range(config.mudd_attnres_block, sublayers, config.mudd_attnres_block)
    has_route = config.mudd_attnres_value_route
    return Cost(
      parameters=2 * queries * width
      + (sum(separate_norm_parameters(config, block + 1) for block in range(num_blocks(config))) if has_route else 0),
      flops=2 * queries * (sublayers + 1) * width + 2 * mixed * width,
      activations=keys.count_sources(config, sublayers)
      - 1
      + has_route
      + sum(s % 2 for s in ends)
      + logits_arrays(config, keys.count_sources(config, sublayers) * queries * config.mudd_attnres_heads),
    )

  @classmethod
  def held(cls, config, block: int) -> Held:
    """All finished sums but the newest one, which is passed on beside them, finished or not."""
    number = keys.count_sources(config, 2 * block) - 1
    return Held(
      number,
      tuple(range(number)),
      whole=1,
      capacity=keys.count_sources(config, keys.sublayers(config)),
      bytes_per_token=4 * keys.count_queries(config) * config.mudd_attnres_heads,
    )

  @classmethod
  def why_not_plain(cls, config) -> str:
    return (
      "depth_connection=attnres starts with equal weights: sublayers read the residual stream divided by the number of "
      "sources, beside which the epsilon of norms weighs more, which changes the logits; use dense or hyper_connections"
    )

  @classmethod
  def build(cls, config, blocks, mesh, rngs, *, starts, finishes):
    from maxtext_mudd.connections.attnres.connection import AttnResConnection

    return AttnResConnection(config, blocks, mesh, starts=starts, finishes=finishes)
