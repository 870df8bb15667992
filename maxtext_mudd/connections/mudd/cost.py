"""What the aggregates of MUDD add to the plain model: exact counts. Pure Python."""

from maxtext_mudd import blocks
from maxtext_mudd.connections.base import Cost, Site
from maxtext_mudd.connections.mudd import sites


def cost(config) -> Cost:
  """Counts for a configuration."""
  plan = sites.plan(config)
  decoupled = [block for block in range(1, plan.num_blocks + 1) if plan.has_separate_norms(block)]
  norms = sum(blocks.separate_norm_parameters(config, block) for block in decoupled)
  weights = sum(site.hidden * (config.emb_dim + site.ways * len(site.sources)) for site in _mlps(plan))
  tables = plan.extra_embeddings * config.vocab_size * config.emb_dim
  return Cost(
    parameters=weights + tables + _other_parameters(config, plan) + norms,
    weight_parameters=weights,
    embedding_parameters=tables,
    flops=sum(_flops(site, config.emb_dim) for site in plan.sites.values()),
    activations=_activations(config, plan),
  )


def _mlps(plan) -> list[Site]:
  """A site with each weight MLP."""
  return list({site.mlp or site.block: site for site in plan.sites.values()}.values())


def _other_parameters(config, plan) -> int:
  """Static weights, and the scales of norms and of dynamic weights."""
  width, total = config.emb_dim, 0
  for site in plan.sites.values():
    if config.mudd_static:
      total += site.ways * len(site.sources)
    if config.mudd_post_norm:
      total += width * sum(sites.is_post_normed(config, stream) for stream in site.streams)
  for site in _mlps(plan):
    if config.mudd_dynamic and config.mudd_weight_norm_scale:
      total += width
    if config.mudd_weight_scale:
      total += site.ways * len(site.sources)
  sources = plan.num_blocks + 1 + len(plan.mtp_blocks) + plan.extra_embeddings
  return total + (sources * width if config.mudd_pre_norm else 0)


def _flops(site, width: int) -> int:
  """Forward FLOPs per token of one DA: W1, W2, and the sum over sources (Appendix C)."""
  weights = site.ways * len(site.sources)
  return 2 * width * weights + 2 * site.hidden * (width + weights)


def _activations(config, plan) -> int:
  """Gradients of the sources that are mixed, the streams of one block, the extra embeddings, and the normed sources
  where there is a pre-norm."""
  seen = {source for site in plan.sites.values() for source in site.sources}
  streams = max((site.ways for site in plan.sites.values()), default=1)
  extra = plan.extra_embeddings
  normed = plan.num_blocks + len(plan.mtp_blocks) + extra if config.mudd_pre_norm else 0
  return max(len(seen) - 1, 0) + streams - 1 + extra + normed
