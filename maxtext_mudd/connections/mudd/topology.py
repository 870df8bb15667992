"""Where the depth-wise aggregates stand and what each one sees. Pure Python, no arrays.

Blocks count from 1, as in the paper: source 0 is the embedding, source i the output of block i.
"""

from collections.abc import Mapping
import dataclasses

RELEASED_FFN = {"first": 0.5, "last": 1.5, "round_to": 128}  # of `ffn_widths`
STREAMS = "qkvr"  # query, key, value and residual stream, in the order of the paper and of the released code


@dataclasses.dataclass(frozen=True)
class Aggregate:
  """One depth-wise aggregate (DA).

  Attributes:
    block: the block it follows, i of DA_i; the output of this block is its newest source.
    sources: the sources it mixes, oldest first, the newest last.
    streams: the streams it makes, a subset of "qkvr"; "x" for the single stream of a one-way aggregate.
    hidden: K, the hidden width of the weight MLP; 0 where the weights are static only.
  """

  block: int
  sources: tuple[int, ...]
  streams: str
  hidden: int

  @property
  def ways(self) -> int:
    return len(self.streams)


@dataclasses.dataclass(frozen=True)
class Topology:
  """The depth-wise connections of a whole model.

  Attributes:
    num_blocks: L.
    aggregates: DA_i by i; a block without one passes its output on to all streams.
    ffn_widths: the feed-forward width of each block, from the first.
  """

  num_blocks: int
  aggregates: Mapping[int, Aggregate]
  ffn_widths: tuple[int, ...]

  @property
  def groups(self) -> tuple[range, ...]:
    """Runs of blocks of equal feed-forward width."""
    starts = [i for i, width in enumerate(self.ffn_widths) if i == 0 or width != self.ffn_widths[i - 1]]
    return tuple(range(start + 1, end + 1) for start, end in zip(starts, [*starts[1:], self.num_blocks]))

  def before(self, block: int) -> Aggregate | None:
    """The aggregate that feeds `block`; None where the block reads the newest output as it is."""
    return self.aggregates.get(block - 1)


def visible_sources(block: int, *, dilation: int, window: int) -> tuple[int, ...]:
  """Sources of DA_block: every `dilation`-th output, newest first counted; of the last `window` blocks (0: of all) and
  the embedding (paper, section on sparse variants; DenseFormer for the meaning of k)."""
  every_kth = (j for j in range(block + 1) if (block - j) % dilation == 0)
  return tuple(j for j in every_kth if window == 0 or j == 0 or j > block - window)


def hidden_width(ways: int, sources: int, *, expansion: float, round_to: int) -> int:
  """K = C·N·expansion. Released rule: rounded up to the next multiple of `round_to`, exact multiples too; 0: exact."""
  width = int(ways * sources * expansion)
  return (width // round_to + 1) * round_to if round_to else width


def ffn_widths(
  width: int, num_blocks: int, *, first: float, last: float, round_to: int, groups: int = 0
) -> tuple[int, ...]:
  """Feed-forward widths that grow linearly from first·width to last·width (paper, Eq. 9), rounded half to even to a
  multiple of `round_to` (released). Groups of blocks, as equal in size as can be, share their mean; 0: no groups."""
  factors = [(last - first) * i / (num_blocks - 1) + first for i in range(num_blocks)]
  for group in range(groups):
    members = range(group * num_blocks // groups, (group + 1) * num_blocks // groups)
    mean = sum(factors[i] for i in members) / len(members)
    factors = [mean if i in members else factor for i, factor in enumerate(factors)]
  return tuple(round(width * factor / round_to) * round_to for factor in factors)


def dense(
  num_blocks: int,
  widths: tuple[int, ...],
  *,
  ways: int,
  dense_streams: str,
  dynamic: bool,
  dilation: int,
  period: int,
  window: int,
  depth_start: float,
  hidden_expansion: float,
  last_hidden_expansion: float,
  round_to: int,
) -> Topology:
  """The dense family: a DA after every `period`-th block beyond `depth_start` of the depth; the last one makes the
  residual stream only."""
  aggregates = {}
  for block in range(period, num_blocks + 1, period):
    if block <= depth_start * num_blocks:
      continue
    sources = visible_sources(block, dilation=dilation, window=window)
    is_last = block == num_blocks
    made = "r" if is_last else dense_streams
    streams = "x" if ways == 1 else "".join(c for c in STREAMS if c in made and c in dense_streams)
    if not streams:
      continue
    expansion = last_hidden_expansion if is_last else hidden_expansion
    hidden = hidden_width(len(streams), len(sources), expansion=expansion, round_to=round_to) if dynamic else 0
    aggregates[block] = Aggregate(block, sources, streams, hidden)
  return Topology(num_blocks, aggregates, widths)


def from_config(config) -> Topology:
  """The topology that the `mudd_*` keys of a configuration describe."""
  num_blocks, width = config.num_decoder_layers, config.mlp_dim
  widths = (width,) * num_blocks
  if config.mudd_ffn_reallocation:
    widths = ffn_widths(
      width,
      num_blocks,
      first=config.mudd_ffn_first,
      last=config.mudd_ffn_last,
      round_to=config.mudd_ffn_round_to,
      groups=config.mudd_ffn_groups,
    )
  if config.depth_connection != "dense":
    return Topology(num_blocks, {}, widths)
  return dense(
    num_blocks,
    widths,
    ways=config.mudd_ways,
    dense_streams=config.mudd_dense_streams,
    dynamic=config.mudd_dynamic,
    dilation=config.mudd_source_dilation,
    period=config.mudd_block_period,
    window=config.mudd_window,
    depth_start=config.mudd_depth_start,
    hidden_expansion=config.mudd_hidden_expansion,
    last_hidden_expansion=config.mudd_last_hidden_expansion,
    round_to=config.mudd_hidden_round_to,
  )
