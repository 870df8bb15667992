"""DeepCrossAttention, DCA (arXiv 2502.06785): queries, keys and values of a block read sums of earlier block outputs
whose weights depend on the channel, and on the source itself."""

from typing import ClassVar

from maxtext_mudd.blocks import num_blocks, separate_norm_parameters
from maxtext_mudd.connections.base import BaseFamily, Cost, Held, Plan, logits_arrays
from maxtext_mudd.connections.dca import keys
from maxtext_mudd.connections.family_keys import kernel_refusals, sublayer_refusals


class DeepCrossAttention(BaseFamily):
  """`depth_connection: dca`."""

  Keys = keys.DcaKeys
  reads = "sublayer"
  takes_explicit_axes = True
  depth_axes: ClassVar = {"b": (None, None, "sources")}
  static_weights = ("b",)
  start_modules = ("depth_queries",)
  finish_modules = ("final_depth_aggregate",)

  @classmethod
  def check_sizes(cls, config) -> None:
    keys.check_sizes(config)

  @classmethod
  def refusals(cls, config):
    yield from kernel_refusals(config)
    yield from sublayer_refusals(config)

  @classmethod
  def plan(cls, config) -> Plan:
    return keys.plan(config)

  @classmethod
  def cost(cls, config) -> Cost:
    """Counts b, and of GRN-v3 the queries and the scales of their norm; and that each block has three attention norms.
    FLOPs are those of each source's logits for all queries (the method needs fewer, see `scored_sources`), and of
    mixing, with the addition of both weights in v3. Kept are the gradients of the sources of one aggregate but one, the
    logits and their gradients, two more streams, and the sums of middle sources."""
    width, blocks, weights = config.emb_dim, num_blocks(config), config.mudd_dca_weights
    sites = keys.plan(config).sites
    mixed = sum(site.ways * len(site.sources) for site in sites.values())
    sums = blocks + 1 if config.mudd_dca_sources == "middle_sum" else 0  # zero ones, too, as single layers do
    parameters = mixed * (1 if weights == "v1" else width) + sum(
      separate_norm_parameters(config, block + 1) for block in range(blocks)
    )
    if weights == "v3":
      parameters += (keys.count_queries(config) + blocks + 1) * width
    return Cost(
      parameters=parameters,
      flops=2 * keys.count_queries(config) * (blocks + 1 + sums) * width
      + (3 if weights == "v3" else 2) * mixed * width,
      activations=max(len(site.sources) for site in sites.values())
      - 1
      + 2
      + sums
      + logits_arrays(config, keys.count_queries(config) * (blocks + 1 + bool(sums))),
    )

  @classmethod
  def held(cls, config, block: int) -> Held:
    """All sources but the newest one, which is passed on beside them, as is the sum of middle sources. Entry 0 is that
    sum, where there is one, and is written before it is read."""
    has_sum = config.mudd_dca_sources == "middle_sum"
    later = range(block, num_blocks(config) + 1)
    read = {source for after in later for source in keys.sources(config, after) if source < block}
    entries = tuple(source + has_sum for source in sorted(read))
    return Held(
      block + has_sum,
      entries,
      whole=1 + has_sum,
      capacity=num_blocks(config) + 1 + has_sum,
      bytes_per_token=4 * keys.count_queries(config),
    )

  @classmethod
  def why_not_plain(cls, config) -> str:
    if config.mudd_dca_sources == "first_and_last":
      return (
        "mudd_dca_sources=first_and_last leaves the outputs of middle blocks out, which changes the logits; use "
        "depth_connection=dense or hyper_connections"
      )
    return (
      "depth_connection=dca adds the outputs of blocks in another order than the plain model, which changes the logits "
      "by rounding; use dense or hyper_connections"
    )

  @classmethod
  def build(cls, config, blocks, mesh, rngs, *, starts, finishes):
    from maxtext_mudd.connections.dca.connection import DcaConnection

    return DcaConnection(config, blocks, mesh, starts=starts, finishes=finishes)
