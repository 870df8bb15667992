"""Where MUDD's aggregates stand and which sources each one sees. Pure Python."""

import dataclasses

from maxtext_mudd import blocks
from maxtext_mudd.connections.base import STREAMS, Plan, Site
from maxtext_mudd.connections.mudd import placements
from maxtext_mudd.connections.mudd.placements import Placement


def visible_sources(block: int, *, dilation: int, window: int) -> tuple[int, ...]:
  """Sources of DA_block: every `dilation`-th output, counted back from the newest, of the last `window` blocks (0: of
  all) and the embedding (paper, section on sparse variants; DenseFormer for the meaning of k)."""
  every_kth = (j for j in range(block + 1) if (block - j) % dilation == 0)
  return tuple(j for j in every_kth if window == 0 or j == 0 or j > block - window)


def extra_embeddings(number: int, aggregates: int, *, tables: int, groups: int) -> tuple[int, ...]:
  """The extra embeddings that a DA mixes, oldest first: those of one group.

  Both the tables and the DAs are divided into `groups` runs, in order of their numbers and of depth, and the k-th run
  of DAs mixes the k-th run of tables. Where DAs are not divisible, runs differ by one DA.

  Args:
    number: of the DA among all, from 0 on.
    aggregates: the number of DAs.
    tables: m, a multiple of `groups`.
  """
  group, size = number * groups // aggregates, tables // groups
  return tuple(range(-(group + 1) * size, -group * size))


def hidden_width(ways: int, sources: int, *, expansion: float, round_to: int) -> int:
  """K = C·N·expansion. Released rule: rounded up to the next multiple of `round_to`, exact multiples too; 0: exact."""
  width = int(ways * sources * expansion)
  return (width // round_to + 1) * round_to if round_to else width


def is_post_normed(config, stream: str) -> bool:
  """Whether a DA with `mudd_post_norm` norms a stream: the one of a single way always, that of MTP like r."""
  return stream == "x" or ("r" if stream == "m" else stream) in config.mudd_post_norm_streams


def starts_at_zero(config) -> bool:
  """Whether static weights are zero at first, so that the streams are X_i, which `mudd_post_norm` adds."""
  return config.mudd_post_norm and (config.mudd_pre_norm or config.mudd_static_start == "zero")


def plan(config) -> Plan:
  """The DAs of `mudd_placements`, or of the keys that stand for such a table where it is empty.

  Raises:
    ValueError: the table does not fit the number of blocks.
  """
  num_blocks, table, extra = blocks.num_blocks(config), config.mudd_placements, config.mudd_extra_embeddings
  found = placements.expand(table, num_blocks, extra) if table else _from_keys(config)
  found = _checked(config, found) if table else _read(config, found)
  if config.mudd_mtp == "connected":
    found = _with_mtp(found, num_blocks, config.mtp_num_layers)
  sites = {placement.block: _site(config, placement) for placement in found}
  separate_norms = (1,) if config.mudd_first_block_norms == "separate" else ()
  return Plan(num_blocks, sites, separate_norms, extra)


def _from_keys(config) -> list[Placement]:
  """A DA after every `mudd_block_period`-th block beyond `mudd_depth_start` of the depth. The last one makes the
  residual stream only."""
  num_blocks, found = blocks.num_blocks(config), []
  for block in range(config.mudd_block_period, num_blocks + 1, config.mudd_block_period):
    streams = _streams(config, block == num_blocks)
    if streams and block > config.mudd_depth_start * num_blocks:
      sources = visible_sources(block, dilation=config.mudd_source_dilation, window=config.mudd_window)
      found.append(Placement(block, sources, streams))
  tables, groups = config.mudd_extra_embeddings, config.mudd_embedding_groups
  extra = [extra_embeddings(number, len(found), tables=tables, groups=groups) for number in range(len(found))]
  return [dataclasses.replace(x, sources=(*more, *x.sources)) for x, more in zip(found, extra)]


def _read(config, found: list[Placement]) -> list[Placement]:
  """The DAs without the streams that the next block does not read, of which nothing would train the parameters."""
  read = {x.block: set(blocks.streams_read(config, x.block + 1)) for x in found if x.block < blocks.num_blocks(config)}
  there = [
    dataclasses.replace(x, streams="".join(c for c in x.streams if c == "x" or c in read.get(x.block, x.streams)))
    for x in found
  ]
  return [x for x in there if x.streams]


def _checked(config, found: list[Placement]) -> list[Placement]:
  """The DAs of a table. Raises ValueError for a stream that the next block does not read."""
  for placement in found:
    reader = placement.block + 1
    read = f"{blocks.streams_read(config, reader)}x" if reader <= blocks.num_blocks(config) else placement.streams
    unread = "".join(stream for stream in placement.streams if stream not in read)
    if unread:
      of_earlier = blocks.spec(config).uses_earlier_kv
      reason = "it uses keys and values of an earlier one" if of_earlier else "its values are its keys"
      raise ValueError(
        f"mudd_placements gives DA_{placement.block} the stream {unread}, which block {reader} does not read: "
        f"{reason}; leave it out."
      )
  return found


def _with_mtp(found: list[Placement], num_blocks: int, mtp_blocks: int) -> list[Placement]:
  """DA_L also makes the stream of MTP. A DA follows each MTP block and makes one stream of all sources but extra
  embeddings."""
  found = [dataclasses.replace(x, streams=f"{x.streams}m") if x.block == num_blocks else x for x in found]
  after = range(num_blocks + 1, num_blocks + mtp_blocks + 1)
  return [*found, *(Placement(block, tuple(range(block + 1)), "m") for block in after)]


def _streams(config, is_last: bool) -> str:
  if config.mudd_ways == 1:
    return "x"
  dense = config.mudd_dense_streams
  return "".join(stream for stream in STREAMS if stream in dense and (stream == "r" or not is_last))


def _site(config, placement: Placement) -> Site:
  """The site of a DA, with the width of its weight MLP."""
  block, sources, streams, hidden = placement.block, placement.sources, placement.streams, placement.hidden
  if not config.mudd_dynamic:
    hidden = 0
  elif hidden is None:
    is_last = block >= blocks.num_blocks(config)
    expansion = config.mudd_last_hidden_expansion if is_last else config.mudd_hidden_expansion
    hidden = hidden_width(len(streams), len(sources), expansion=expansion, round_to=config.mudd_hidden_round_to)
  return Site(block, sources, streams, hidden, placement.mlp)
