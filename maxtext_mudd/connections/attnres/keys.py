"""The keys of Attention Residuals. Imports neither JAX nor MaxText."""

from maxtext_mudd.connections.family_keys import HistoryKeys
from maxtext_mudd.keys import key


class AttnResKeys(HistoryKeys):
  """The keys of `depth_connection=attnres`."""

  mudd_attnres_block: int = key(
    1,
    "S: number of sublayers whose outputs are summed to one source, a block of Block AttnRes; 1 is Full AttnRes, in "
    "which every sublayer's output is a source. A Transformer block has two sublayers, attention and FFN.",
    ge=1,
  )


def sublayers(config) -> int:
  """Number of sublayers of the model."""
  return 2 * config.num_decoder_layers


def count_sources(config, sublayer):
  """How many sources a sublayer reads: the embedding, the finished sums of S sublayers, and the sum so far of its own
  S sublayers, which the first of them does not have.

  Args:
    sublayer: its number, from 0; an int or an array. The number of sublayers stands for the final aggregate.
  """
  return 1 + -(-sublayer // config.mudd_attnres_block)


def check_sizes(config) -> None:
  """Raises ValueError for blocks that are longer than the model."""
  if config.mudd_attnres_block > sublayers(config):
    raise ValueError(
      f"mudd_attnres_block={config.mudd_attnres_block} is more than the {sublayers(config)} sublayers of "
      f"{config.num_decoder_layers} Transformer blocks; use at most {sublayers(config)}."
    )
