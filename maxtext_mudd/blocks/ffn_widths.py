"""Widths of the feed-forward networks where the paper re-allocates parameters to deeper blocks. Pure Python."""

from maxtext_mudd import blocks

RELEASED = {"first": 0.5, "last": 1.5, "round_to": 128}  # arguments of `reallocated` for the released models


def reallocated(
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


def of_config(config) -> tuple[int, ...]:
  """The feed-forward width of each block, from the first."""
  num_blocks, width = blocks.num_blocks(config), config.mlp_dim
  if not (config.mudd and config.mudd_ffn_reallocation):
    return (width,) * num_blocks
  return reallocated(
    width,
    num_blocks,
    first=config.mudd_ffn_first,
    last=config.mudd_ffn_last,
    round_to=config.mudd_ffn_round_to,
    groups=config.mudd_ffn_groups,
  )


def groups(config) -> tuple[range, ...]:
  """Numbers of the blocks that are scanned together: those in a row that have one width."""
  widths = of_config(config)
  starts = [i for i, width in enumerate(widths) if i == 0 or width != widths[i - 1]]
  return tuple(range(start + 1, end + 1) for start, end in zip(starts, [*starts[1:], len(widths)]))
