"""The decoder blocks that work with depth connections: one `BlockSpec` each.

A block of MaxText belongs here when its attention reads only `norm(x)` and its residual sum is `x + attention`. The
tests compare each with the block of MaxText at initial values, and with an independent reference at random weights.

No JAX and no MaxText here: command lines are checked before these are imported.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """What the package knows of one decoder block.

  Attributes:
    attention_norm: Name of the norm before attention, a submodule of the layer.
    feed_forward_norm: Path of the norm before the feed-forward block, from the layer; dots separate submodules.
    has_biases: The norms are LayerNorms with a bias, and every projection of attention and feed-forward block has one.
    takes_attention_bias: `attention_bias` adds a bias to the query, key and value projections. Other blocks ignore it.
    takes_qk_norm: `use_qk_norm` adds an RMSNorm to queries and one to keys. Other blocks ignore it.
    takes_chunked_prefill: Attention reads the cache of earlier chunks when a prompt is prefilled in chunks.
    scales_query_kernel: The query kernel starts smaller by 1/√head_dim, and scores are not scaled. Other blocks scale
      the scores.
    is_parallel: Attention and feed-forward block both read the input of the layer. In other blocks the feed-forward
      block reads the sum of that input and attention.
    is_rotary: Queries and keys are rotated by their positions.
    is_released: It is the block of the authors' PyTorch MUDDFormer, up to the factor of `scales_query_kernel`.
  """

  attention_norm: str = "pre_self_attention_layer_norm"
  feed_forward_norm: str = "post_self_attention_layer_norm"
  has_biases: bool = False
  takes_attention_bias: bool = False
  takes_qk_norm: bool = False
  takes_chunked_prefill: bool = True
  scales_query_kernel: bool = False
  is_parallel: bool = False
  is_rotary: bool = True
  is_released: bool = False


_PYTHIA = "pythia"

# By `decoder_block`, but for pythia.
BLOCKS = {
  "llama2": BlockSpec(scales_query_kernel=True, is_released=True),
  "mistral": BlockSpec(scales_query_kernel=True, is_released=True),
  "mixtral": BlockSpec(scales_query_kernel=True),
  "qwen2": BlockSpec(takes_attention_bias=True, takes_qk_norm=True),
  "qwen3": BlockSpec(takes_qk_norm=True, is_released=True),
  "qwen3_moe": BlockSpec(takes_qk_norm=True),
  "gemma": BlockSpec("pre_self_attention_norm", "pre_ffw_norm", scales_query_kernel=True),
  "gpt3": BlockSpec(
    "pre_self_attention_norm", "mlp.mlp_layer_norm", has_biases=True, takes_chunked_prefill=False, is_rotary=False
  ),
  _PYTHIA: BlockSpec("pre_self_attention_norm", "pre_mlp_norm", has_biases=True, takes_qk_norm=True, is_parallel=True),
}

# Values of `decoder_block` that have a row. Pythia's block is chosen by `mudd_decoder_layer`.
DECODER_BLOCKS = tuple(name for name in BLOCKS if name != _PYTHIA)


def spec(config) -> BlockSpec:
  """The row of the block that a configuration builds.

  Raises:
    ValueError: its `decoder_block` has no row.
  """
  name = _PYTHIA if config.mudd_decoder_layer == _PYTHIA else config.decoder_block.value
  if name not in BLOCKS:
    raise ValueError(f"decoder_block={name!r} is not supported; supported are {', '.join(DECODER_BLOCKS)}.")
  return BLOCKS[name]


def norm_parameters(config) -> int:
  """Parameters of one norm of the block."""
  return config.emb_dim * (2 if spec(config).has_biases else 1)
