"""The MaxText decoder blocks whose stock `__call__` works decoupled, and the name of their attention norm.

A block belongs here when attention reads only `norm(x)` and the residual sum is `x + attention`; the tests hold each
to the stock block at the start and to an independent reference with random weights.
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
