"""Exact counts for a configuration: parameters, FLOPs, activations. Pure Python, no arrays."""

from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.connections.mudd import topology

_GATED = 2  # matrices into a gated FFN


def aggregate_flops(config) -> int:
  """Forward FLOPs per token of all depth-wise aggregates: W1, W2, and the sum over sources (Appendix C)."""
  total = 0
  for aggregate in topology.from_config(config).aggregates.values():
    weights = aggregate.ways * len(aggregate.sources)
    total += 2 * config.emb_dim * weights
    total += 2 * aggregate.hidden * (config.emb_dim + weights)
  return total


def hyper_connection_flops(config) -> int:
  """Forward FLOPs per token of all hyper-connections: α and β, the mix, and the write after each sublayer."""
  n, width = config.mudd_expansion_rate, config.emb_dim
  made = 2 * n * (n + 2) * width if config.mudd_dynamic else 0
  return 2 * config.num_decoder_layers * (made + 2 * n * (n + 1) * width + 2 * n * width)


def connection_flops(config) -> int:
  """Forward FLOPs per token of the connections, whichever family they are."""
  if not config.mudd:
    return 0
  return hyper_connection_flops(config) if config.depth_connection == "hyper_connections" else aggregate_flops(config)


def extra_ffn_width(config) -> int:
  """By how much the FFN widths of all blocks together exceed L·mlp_dim, which is what MaxText counts."""
  return sum(topology.from_config(config).ffn_widths) - config.num_decoder_layers * config.mlp_dim


def weight_parameters(config) -> int:
  """W1 and W2 of all aggregates: what the paper counts as extra (Eq. 13)."""
  if not config.mudd:
    return 0
  aggregates = topology.from_config(config).aggregates.values()
  return sum(a.hidden * (config.emb_dim + a.ways * len(a.sources)) for a in aggregates)


def connection_parameters(config) -> int:
  """All parameters that a model has for its connections, and the plain one has not."""
  if not config.mudd:
    return 0
  width, blocks = config.emb_dim, config.num_decoder_layers
  if config.depth_connection == "hyper_connections":
    n = config.mudd_expansion_rate
    static = n * (n + 1) + n if config.mudd_static else 0
    dynamic = width * (n + 3) + 2 if config.mudd_dynamic else 0
    return 2 * blocks * (static + dynamic)
  total = weight_parameters(config)
  placed = topology.from_config(config)
  for aggregate in placed.aggregates.values():
    if config.mudd_static:
      total += aggregate.ways * len(aggregate.sources)
    if config.mudd_dynamic and config.mudd_weight_norm_scale:
      total += width
    if config.mudd_post_norm:
      total += width * sum(c == "x" or c in config.mudd_post_norm_streams for c in aggregate.streams)
  if config.mudd_pre_norm:
    total += (blocks + 1) * width
  return total + 2 * _norm(config) * len(decoupled_blocks(config))


def decoupled_blocks(config) -> list[int]:
  """Blocks with LN_q, LN_k and LN_v where the plain one has one attention norm."""
  placed = topology.from_config(config)
  fed = [block for block in range(2, placed.num_blocks + 1) if (da := placed.before(block)) and da.streams != "x"]
  return [1, *fed] if config.mudd_first_block_norms == "separate" else fed


def plain_parameters(config, *, embeddings: bool = True) -> int:
  """All parameters of the model without its connections, its FFNs as wide as they are with them."""
  width, blocks = config.emb_dim, config.num_decoder_layers
  widths = topology.from_config(config).ffn_widths if config.mudd else (config.mlp_dim,) * blocks
  total = blocks * (_attention(config) + 2 * _norm(config)) + sum(_feed_forward(config, ffn) for ffn in widths)
  if embeddings:
    total += config.vocab_size * width * (1 if config.logits_via_embedding else 2)
    total += max(config.trainable_position_size, 0) * width + _norm(config)
  return total


def parameters(config) -> int:
  """All parameters of the model."""
  return plain_parameters(config) + connection_parameters(config)


def _norm(config) -> int:
  return config.emb_dim * (2 if block_spec(config).has_biases else 1)


def _attention(config) -> int:
  heads, kv_heads, width = config.num_query_heads, config.num_kv_heads, config.head_dim
  total = 2 * config.emb_dim * width * (heads + kv_heads)
  block = block_spec(config)
  if block.has_biases or (block.takes_attention_bias and config.attention_bias):
    total += width * (heads + 2 * kv_heads)
  if block.has_biases:
    total += config.emb_dim
  return total + (2 * width if block.takes_qk_norm and config.use_qk_norm else 0)


def _feed_forward(config, ffn: int) -> int:
  width, inner = config.emb_dim, len(config.mlp_activations)
  if config.num_experts > 1:
    return config.num_experts * ((_GATED + 1) * width * ffn + width)
  return (inner + 1) * width * ffn + (inner * ffn + width if block_spec(config).has_biases else 0)


def plain_flops(config) -> int:
  """Forward FLOPs per token of the blocks without connections; attention over T/2 positions, no embeddings, as the
  paper counts them."""
  width, blocks = config.emb_dim, config.num_decoder_layers
  widths = topology.from_config(config).ffn_widths if config.mudd else (config.mlp_dim,) * blocks
  heads, kv_heads = config.num_query_heads, config.num_kv_heads
  attention = 2 * width * config.head_dim * (heads + kv_heads) + config.head_dim * heads * config.max_target_length
  matrices = len(config.mlp_activations) + 1
  active = config.num_experts_per_tok if config.num_experts > 1 else 1
  router = width * config.num_experts if config.num_experts > 1 else 0
  return 2 * (blocks * (attention + router) + matrices * active * width * sum(widths))


def extra_activations(config) -> int:
  """Activations kept beyond the plain model's at the peak, in arrays of [B,T,D] (Appendix E): gradients of the sources
  that aggregates see, the streams of one block, and the normed sources where there is a pre-norm. Hyper-connections:
  n-1 more streams into each block but the first, and in the block under way."""
  if not config.mudd:
    return 0
  if config.depth_connection == "hyper_connections":
    return config.num_decoder_layers * (config.mudd_expansion_rate - 1)
  aggregates = topology.from_config(config).aggregates.values()
  seen = {source for aggregate in aggregates for source in aggregate.sources}
  normed = config.num_decoder_layers if config.mudd_pre_norm else 0
  return max(len(seen) - 1, 0) + max((aggregate.ways - 1 for aggregate in aggregates), default=0) + normed
