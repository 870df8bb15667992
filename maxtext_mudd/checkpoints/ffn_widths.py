"""FFN widths of the authors' models: re-allocated by their rule, or all the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from maxtext_mudd.blocks import ffn_widths


def widths(width: int, blocks: int, reallocated: bool) -> tuple[int, ...]:
  """Of every block, from the configured width."""
  return ffn_widths.reallocated(width, blocks, **ffn_widths.RELEASED) if reallocated else (width,) * blocks


def of_keys(keys: Mapping[str, Any]) -> tuple[int, ...]:
  """The same, by MaxText's keys."""
  return widths(keys["base_mlp_dim"], keys["base_num_decoder_layers"], keys["mudd_ffn_reallocation"])


def is_reallocated(width: int, found: Sequence[int | None]) -> bool:
  """Whether the widths found in the weights (None: not to be found) are re-allocated, as all published ones are, unless
  most of them are the configured one."""
  if len(found) < 2:
    return False
  flat, grown = (
    sum(x == y for x, y in zip(found, widths(width, len(found), reallocated))) for reallocated in (False, True)
  )
  return flat <= max(grown, len(found) / 2)
