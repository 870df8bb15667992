"""The decoder blocks that work with depth connections: one `BlockSpec` each.

A block of MaxText belongs here when it reads its input x in three ways only: by a norm and then the projections of
attention, by these projections without a norm, or in the residual sum `x + attention`. A block without attention reads
one stream, and belongs here, too. The tests compare each with the block of MaxText at initial values, and at random
weights with an independent reference or, where that would restate a whole block, with what each stream must change.

No JAX and no MaxText here: command lines are checked before these are imported.
"""

import dataclasses
import functools
import math


@dataclasses.dataclass(frozen=True)
class Cycle:
  """The cycles of different layers that MaxText scans.

  Attributes:
    member: What the names of the layers in a cycle begin with, as in `layers_0`. None: all but the last are a stack,
      `local_layers`, and the last is `global_layer`.
    length: Layers in a cycle; None: `inhomogeneous_layer_cycle_interval`.
    name: The attribute of the decoder that has the cycles.
    pattern: The kinds of layers come again after so many layers, or after the least common multiple of the values of
      these keys; the length of a cycle is a multiple of it.
    has_remainder: Layers after the last whole cycle are in `layers_remainder`. In other blocks MaxText leaves them out.
    sides: Suffixes of the modules of a layer of MaxText that computes several blocks, in the order in which they run:
      "local" and "global". That layer is a cycle, scanned or single. Empty: a layer is one block.
    singles_first: The key with the number of single layers before the first cycle. None: there are none.
  """

  member: str | None
  length: int | None = None
  name: str = "layers"
  pattern: int | tuple[str, ...] = 1
  has_remainder: bool = False
  sides: tuple[str, ...] = ()
  singles_first: str | None = None


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """What the package knows of one decoder block.

  Attributes:
    attention_norm: Name of the norm before attention, a submodule of the layer. None: attention reads the input itself.
    feed_forward_norm: Path of the norm before the feed-forward block, from the layer; dots separate submodules. None:
      no norm reads the sum of that input and attention, so that families which make an input for each sublayer cannot
      use the block.
    attention: Name of attention, a submodule of the layer. None: the layer has none, and reads one stream.
    has_biases: The norms are LayerNorms with a bias, and every projection of attention and feed-forward block has one.
    takes_attention_bias: `attention_bias` adds a bias to the query, key and value projections. Other plain blocks
      ignore it.
    takes_qk_norm: `use_qk_norm` adds an RMSNorm to queries and one to keys. Other plain blocks ignore it.
    takes_chunked_prefill: Attention reads the cache of earlier chunks when a prompt is prefilled in chunks.
    scales_query_kernel: The query kernel starts smaller by 1/√head_dim, and scores are not scaled. Other blocks scale
      the scores.
    is_parallel: Attention and feed-forward block both read the input of the layer. In other blocks the feed-forward
      block reads the sum of that input and attention.
    shares_norm: The feed-forward block of a parallel block has no norm for itself, but reads that of attention.
    is_rotary: Queries and keys are rotated by their positions.
    scales_output: The layer multiplies its output by a parameter.
    tied_every: Of every so many layers, the last takes `share_kv_projections`: its values are its keys. None: no layer
      takes it.
    is_tied: Every layer has one projection of keys and values.
    uses_earlier_kv: With `num_kv_shared_layers` n, the last n layers use keys and values of earlier ones. They have no
      projections of keys and values, and read q and r only.
    window: The key that limits what some layers attend to: to so many tokens, or to chunks of so many. None: there is
      no such key.
    takes_mtp: MaxText can build a single layer of it for multi-token prediction.
    takes_fused_qkv: `fused_qkv` makes one projection of queries, keys and values.
    is_released: It is the block of the authors' PyTorch MUDDFormer, up to the factor of `scales_query_kernel`.
    is_plain: All layers are alike, each with one attention over all positions and one feed-forward block. Then
      `complexity` counts its parameters and FLOPs, and the keys of Sect. 3.4 and of initial values know its matrices.
    layers: What the attributes of the decoder that hold its layers begin with. Of two, the first is that of
      `first_num_dense_layers` layers.
    cycle: How MaxText scans layers that differ. None: it scans single layers.
  """

  attention_norm: str | None = "pre_self_attention_layer_norm"
  feed_forward_norm: str | None = "post_self_attention_layer_norm"
  attention: str | None = "self_attention"
  has_biases: bool = False
  takes_attention_bias: bool = False
  takes_qk_norm: bool = False
  takes_chunked_prefill: bool = True
  scales_query_kernel: bool = False
  is_parallel: bool = False
  shares_norm: bool = False
  is_rotary: bool = True
  scales_output: bool = False
  tied_every: int | None = None
  uses_earlier_kv: bool = False
  is_tied: bool = False
  window: str | None = None
  takes_mtp: bool = True
  takes_fused_qkv: bool = True
  is_released: bool = False
  is_plain: bool = True
  layers: tuple[str, ...] = ("layers",)
  cycle: Cycle | None = None

  @property
  def sides(self) -> tuple[str, ...]:
    """`Cycle.sides`; empty for blocks without cycles."""
    return self.cycle.sides if self.cycle else ()


_PYTHIA = "pythia"

_SLIDING = "sliding_window_size"
_gemma = functools.partial(BlockSpec, "pre_self_attention_norm", "pre_ffw_norm", window=_SLIDING, is_plain=False)
_hybrid = functools.partial(
  BlockSpec,
  "input_layernorm",
  "post_attention_layernorm",
  attention="attention",
  takes_chunked_prefill=False,
  takes_mtp=False,
  takes_fused_qkv=False,
  is_plain=False,
)
_simple = BlockSpec(None, None, attention=None, takes_mtp=False, takes_fused_qkv=False, is_plain=False)
_in_cycles = functools.partial(BlockSpec, is_plain=False)

# By `decoder_block`, but for pythia.
BLOCKS = {
  "llama2": BlockSpec(scales_query_kernel=True, is_released=True),
  "mistral": BlockSpec(scales_query_kernel=True, is_released=True),
  "mixtral": BlockSpec(scales_query_kernel=True),
  "qwen2": BlockSpec(takes_attention_bias=True, takes_qk_norm=True, takes_mtp=False),
  "qwen3": BlockSpec(takes_qk_norm=True, takes_mtp=False, is_released=True),
  "qwen3_moe": BlockSpec(takes_qk_norm=True, takes_mtp=False),
  "gemma": _gemma(scales_query_kernel=True, window=None, is_plain=True),
  "gemma2": _gemma(cycle=Cycle("half", 2, sides=("local", "global"))),
  "gemma3": _gemma(cycle=Cycle("layers", 6, has_remainder=True)),
  "gemma4": _gemma(scales_output=True, tied_every=6, cycle=Cycle(None, 6, "scanned_blocks", has_remainder=True)),
  "gemma4_small": _gemma(scales_output=True, uses_earlier_kv=True, takes_fused_qkv=False),
  "gpt_oss": _in_cycles(
    attention="GptOssAttention", window=_SLIDING, takes_mtp=False, cycle=Cycle("layers", pattern=2)
  ),
  "llama4": _in_cycles(
    window="chunk_attn_window_size",
    cycle=Cycle("layers", pattern=("nope_layer_interval", "interleave_moe_layer_step")),
  ),
  "envy": _in_cycles(cycle=Cycle("layers", pattern=("interleave_moe_layer_step",))),
  "olmo3": _in_cycles(
    None, None, attention="attention", window=_SLIDING, takes_mtp=False, cycle=Cycle("layers", pattern=4)
  ),
  "qwen3_next": _hybrid(cycle=Cycle(None, has_remainder=True)),
  "qwen3_5": _hybrid(cycle=Cycle("layer")),
  "qwen3_custom_moe": BlockSpec(feed_forward_norm=None, takes_qk_norm=True, takes_mtp=False, is_plain=False),
  "deepseek": BlockSpec(takes_fused_qkv=False, is_plain=False, layers=("dense_layers", "moe_layers")),
  "deepseek4": BlockSpec(
    takes_chunked_prefill=False,
    is_tied=True,
    takes_mtp=False,
    takes_fused_qkv=False,
    is_plain=False,
    cycle=Cycle("layers", 2, "scanned_blocks", singles_first="first_num_hash_layers"),
  ),
  "default": BlockSpec(
    "pre_self_attention_norm", None, is_parallel=True, shares_norm=True, tied_every=1, is_plain=False
  ),
  "simple": _simple,
  "simple_mlp": _simple,
  "gpt3": BlockSpec(
    "pre_self_attention_norm", "mlp.mlp_layer_norm", has_biases=True, takes_chunked_prefill=False, is_rotary=False
  ),
  _PYTHIA: BlockSpec("pre_self_attention_norm", "pre_mlp_norm", has_biases=True, takes_qk_norm=True, is_parallel=True),
}

# Values of `decoder_block` that have a row, and those of plain blocks. Pythia's is chosen by `mudd_decoder_layer`.
DECODER_BLOCKS = tuple(name for name in BLOCKS if name != _PYTHIA)
PLAIN_BLOCKS = tuple(name for name in DECODER_BLOCKS if BLOCKS[name].is_plain)


def spec(config) -> BlockSpec:
  """The row of the block that a configuration builds. A configuration that is not MaxText's has it as `block_spec`.

  Raises:
    ValueError: its `decoder_block` has no row.
  """
  if of_config := getattr(config, "block_spec", None):
    return of_config
  name = _PYTHIA if config.mudd_decoder_layer == _PYTHIA else config.decoder_block.value
  if name not in BLOCKS:
    supported = ", ".join(DECODER_BLOCKS)
    raise ValueError(
      f"decoder_block={name!r} does not work with mudd=True: supported are {supported}; use one of these."
    )
  return BLOCKS[name]


def pattern(config) -> int:
  """The number of layers after which the kinds of layers in cycles come again."""
  cycle = spec(config).cycle
  if cycle is None or isinstance(cycle.pattern, int):
    return cycle.pattern if cycle else 1
  return math.lcm(*(max(getattr(config, key) or 1, 1) for key in cycle.pattern))


def num_blocks(config) -> int:
  """L, the number of blocks. MaxText's `num_decoder_layers` counts the layers that it builds, which may be two each."""
  return config.num_decoder_layers * max(len(spec(config).sides), 1)


def streams_read(config, block: int) -> str:
  """The streams that a block reads, letters of "qkvr"."""
  row = spec(config)
  if row.uses_earlier_kv and 0 < config.num_decoder_layers - config.num_kv_shared_layers < block:
    return "qr"
  is_shared = bool(row.tied_every) and config.share_kv_projections and block % row.tied_every == 0
  return "qkr" if row.is_tied or is_shared else "qkvr"


def normed_streams(config, block: int) -> str:
  """The streams that the norm before attention serves, letters of "qkvr"; none where there is no such norm."""
  row = spec(config)
  if row.attention_norm is None:
    return ""
  return "".join(c for c in streams_read(config, block) if c != "r" or row.shares_norm)


def separate_norm_parameters(config, block: int) -> int:
  """The parameters that a block gains when each stream that its attention norm serves has a norm for itself."""
  further = max(len(normed_streams(config, block)) - 1, 0)
  return further * config.emb_dim * (2 if spec(config).has_biases else 1)
