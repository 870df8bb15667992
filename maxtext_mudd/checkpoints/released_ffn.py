"""FFN widths of the authors' models: re-allocated over depth by their rule (paper, Eq. 9), or equal in all blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

from maxtext_mudd.blocks import ffn_widths


def for_blocks(base_width: int, num_blocks: int, reallocated: bool) -> tuple[int, ...]:
  """The FFN width of every block, from the configured width."""
  if not reallocated:
    return (base_width,) * num_blocks
  return ffn_widths.reallocated(base_width, num_blocks, **ffn_widths.RELEASED)


def from_keys(keys: Mapping[str, Any]) -> tuple[int, ...]:
  """The FFN width of every block of the model that MaxText's keys describe."""
  return for_blocks(keys["base_mlp_dim"], keys["base_num_decoder_layers"], keys["mudd_ffn_reallocation"])


def is_reallocated(base_width: int, block_widths: Sequence[int | None]) -> bool:
  """Whether the FFNs of a checkpoint are re-allocated, as those of all published models are.

  The FFNs count as equal under two conditions: more than half of the widths equal `base_width`, and more widths equal
  `base_width` than follow the rule. A missing FFN counts for neither.

  Args:
    block_widths: the FFN width of each block in the checkpoint; None if the FFN is missing or is not a matrix.
  """
  num_blocks = len(block_widths)
  if num_blocks < 2:
    return False
  equal, by_rule = (
    sum(found == expected for found, expected in zip(block_widths, for_blocks(base_width, num_blocks, reallocated)))
    for reallocated in (False, True)
  )
  return equal <= max(by_rule, num_blocks / 2)
