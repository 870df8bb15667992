"""The decoder blocks that work with depth connections, and where their norms are.

A stock block belongs here when attention reads only `norm(x)` and the residual sum is `x + attention`; the tests hold
each to the stock block at the start and to an independent reference with random weights.
"""

ATTENTION_NORMS = {
  "llama2": "pre_self_attention_layer_norm",
  "mistral": "pre_self_attention_layer_norm",
  "mixtral": "pre_self_attention_layer_norm",
  "qwen2": "pre_self_attention_layer_norm",
  "qwen3": "pre_self_attention_layer_norm",
  "qwen3_moe": "pre_self_attention_layer_norm",
  "gemma": "pre_self_attention_norm",
  "gpt3": "pre_self_attention_norm",
}

# For connections that read before each sublayer; dotted where the norm is inside another module.
FEED_FORWARD_NORMS = {
  "llama2": "post_self_attention_layer_norm",
  "mistral": "post_self_attention_layer_norm",
  "mixtral": "post_self_attention_layer_norm",
  "qwen2": "post_self_attention_layer_norm",
  "qwen3": "post_self_attention_layer_norm",
  "qwen3_moe": "post_self_attention_layer_norm",
  "gemma": "pre_ffw_norm",
  "gpt3": "mlp.mlp_layer_norm",
}

# Scores are scaled by 1/sqrt(head_dim) in the query kernel from the start on, where others scale them as they are made.
SCALED_QUERY_KERNELS = ("llama2", "mistral")


def norm_parameters(config) -> int:
  """Parameters of one norm of the block."""
  return config.emb_dim * (2 if config.decoder_block.value == "gpt3" else 1)
