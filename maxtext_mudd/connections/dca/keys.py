"""The keys of DeepCrossAttention, and which sources it reads. Imports neither JAX nor MaxText."""

from typing import Literal

from maxtext_mudd.connections.base import Plan, Site
from maxtext_mudd.connections.family_keys import FamilyKeys
from maxtext_mudd.keys import key


class DcaKeys(FamilyKeys):
  """The keys of `depth_connection=dca`."""

  mudd_dca_weights: Literal["v1", "v2", "v3"] = key(
    "v3",
    "GRN-v1: one static weight for each source; v2: one for each source and channel; v3: that, and one computed from "
    "each source for each token.",
  )
  mudd_dca_sources: Literal["all", "middle_sum", "first_and_last"] = key(
    "all",
    "Sources of a block: the embedding and the outputs of all blocks before; middle_sum: the embedding, the last k, "
    "and the sum of those between (k-DCA of the paper); first_and_last: the first k and the last k (the public code).",
  )
  mudd_dca_last: int = key(2, "k.", needs={"mudd_dca_sources": ("middle_sum", "first_and_last")}, ge=1)


def sources(config, block: int) -> tuple[int, ...]:
  """Numbers of the sources that are mixed after a block, 0 being the embedding. Where middle sources are summed, the
  newest of them stands for the sum."""
  number, k = block + 1, config.mudd_dca_last
  if config.mudd_dca_sources == "middle_sum":
    return (*range(min(number, 1)), *range(max(1, number - k - 1), number))
  if config.mudd_dca_sources == "first_and_last" and number > 2 * k:
    return (*range(k), *range(number - k, number))
  return tuple(range(number))


def has_middle_sum(config, block: int) -> bool:
  """Whether what is mixed after a block has a sum of middle sources."""
  return config.mudd_dca_sources == "middle_sum" and block > config.mudd_dca_last


def plan(config) -> Plan:
  """One aggregate before each block, and one after the last."""
  last = config.num_decoder_layers
  sites = {block: Site(block, sources(config, block), "qkv" if block < last else "x") for block in range(last + 1)}
  return Plan(last, sites)


def queries(config) -> int:
  """M: a query for q, k and v of each block, and one for the hidden state; only GRN-v3 has them."""
  return 3 * config.num_decoder_layers + 1 if config.mudd_dca_weights == "v3" else 0


def check_sizes(config) -> None:
  """Raises ValueError for a k that is more than there are blocks."""
  if config.mudd_dca_sources != "all" and config.mudd_dca_last > config.num_decoder_layers:
    raise ValueError(
      f"mudd_dca_last={config.mudd_dca_last} is more than the {config.num_decoder_layers} blocks of the model; use at "
      "most that, or mudd_dca_sources=all."
    )
