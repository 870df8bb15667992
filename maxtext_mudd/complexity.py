"""What the connections cost: exact counts for a configuration."""

from maxtext_mudd import topology


def aggregate_flops(config) -> int:
  """Forward FLOPs per token of all depth-wise aggregates: W1, W2, and the sum over sources (paper, App. C)."""
  total = 0
  for aggregate in topology.from_config(config).aggregates.values():
    weights = aggregate.ways * len(aggregate.sources)
    total += 2 * config.emb_dim * weights
    total += 2 * aggregate.hidden * (config.emb_dim + weights)
  return total


def extra_ffn_width(config) -> int:
  """By how much the FFN widths of all blocks together exceed L·mlp_dim, which is what MaxText counts."""
  return sum(topology.from_config(config).ffn_widths) - config.num_decoder_layers * config.mlp_dim
