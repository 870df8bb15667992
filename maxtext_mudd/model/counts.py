"""Exact counts for a configuration: parameters, FLOPs, activations. Pure Python, no arrays."""

from maxtext_mudd import connections
from maxtext_mudd.blocks import ffn_widths, num_blocks
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.connections.base import Cost

_GATED = 2  # matrices into a gated FFN


def connections_cost(config) -> Cost:
  """What the connections add to the plain model of these sizes."""
  return connections.family(config).cost(config) if config.mudd else Cost()


def extra_ffn_width(config) -> int:
  """By how much the FFN widths of all blocks together exceed L·mlp_dim, which is what MaxText counts."""
  return sum(ffn_widths.of_config(config)) - num_blocks(config) * config.mlp_dim


def plain_parameters(config, *, embeddings: bool = True) -> int:
  """The number of parameters of the model without its connections. FFNs keep their re-allocated widths."""
  width, blocks = config.emb_dim, num_blocks(config)
  widths = ffn_widths.of_config(config)
  total = blocks * (_attention(config) + 2 * _norm(config)) + sum(_feed_forward(config, ffn) for ffn in widths)
  if embeddings:
    total += config.vocab_size * width * (1 if config.logits_via_embedding else 2)
    total += max(config.trainable_position_size, 0) * width + _norm(config)
  return total


def parameters(config) -> int:
  """The number of parameters of the model."""
  return plain_parameters(config) + connections_cost(config).parameters


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
  """Forward FLOPs per token of the blocks without connections. As in the paper, each token attends to T/2 positions,
  and embeddings do not count."""
  width, blocks = config.emb_dim, num_blocks(config)
  widths = ffn_widths.of_config(config)
  heads, kv_heads = config.num_query_heads, config.num_kv_heads
  attention = 2 * width * config.head_dim * (heads + kv_heads) + config.head_dim * heads * config.max_target_length
  matrices = len(config.mlp_activations) + 1
  active = config.num_experts_per_tok if config.num_experts > 1 else 1
  router = width * config.num_experts if config.num_experts > 1 else 0
  return 2 * (blocks * (attention + router) + matrices * active * width * sum(widths))
