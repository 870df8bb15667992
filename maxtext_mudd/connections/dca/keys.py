"""The keys of DeepCrossAttention, and which sources it reads. Imports neither JAX nor MaxText."""

from typing import Literal

from maxtext_mudd.blocks import num_blocks
from maxtext_mudd.connections.base import Plan, Site
from maxtext_mudd.connections.family_keys import HistoryKeys
from maxtext_mudd.connections.keys import key


class DcaKeys(HistoryKeys):
  """The keys of `depth_connection=dca`."""

  mudd_dca_weights: Literal["v1", "v2", "v3"] = key(
    "v3",
    "The paper's GRN. v1: one static weight for each source; v2: one for each source and channel; v3: v2, plus one "
    "number for each source and token, computed from the source.",
  )
  mudd_dca_sources: Literal["all", "middle_sum", "first_and_last"] = key(
    "all",
    "Sources of a block: the embedding and the outputs of all blocks before; middle_sum: the embedding, the last k, "
    "and the sum of those between (k-DCA as descriptions of the paper have it); first_and_last: the first k and the "
    "last k (k-DCA of lucidrains' code).",
  )
  mudd_dca_k: int = key(
    2,
    "k: how many of the last sources are read; with first_and_last also how many of the first.",
    needs={"mudd_dca_sources": ("middle_sum", "first_and_last")},
    ge=1,
  )


def sources(config, block: int) -> tuple[int, ...]:
  """Numbers of the sources that are mixed after a block, 0 being the embedding. Where middle sources are summed, the
  newest of them stands for the sum."""
  number, k = block + 1, config.mudd_dca_k
  if config.mudd_dca_sources == "middle_sum":
    return (0, *range(max(1, number - k - 1), number))
  if config.mudd_dca_sources == "first_and_last" and number > 2 * k:
    return (*range(k), *range(number - k, number))
  return tuple(range(number))


def has_middle_sum(config, block: int) -> bool:
  """Whether what is mixed after a block has a sum of middle sources."""
  return config.mudd_dca_sources == "middle_sum" and block > config.mudd_dca_k


def plan(config) -> Plan:
  """One aggregate before each block, and one after the last."""
  last = num_blocks(config)
  sites = {block: Site(block, sources(config, block), "qkv" if block < last else "x") for block in range(last + 1)}
  return Plan(last, sites)


def count_queries(config) -> int:
  """M: a query for q, k and v of each block, and one for the hidden state; only GRN-v3 has them."""
  return 3 * num_blocks(config) + 1 if config.mudd_dca_weights == "v3" else 0


def check_sizes(config) -> None:
  """Raises ValueError for a k that leaves no source out."""
  blocks, form = num_blocks(config), config.mudd_dca_sources
  most = {"all": config.mudd_dca_k, "middle_sum": blocks - 2, "first_and_last": blocks // 2}[form]
  if config.mudd_dca_k > most:
    use = f"use at most {most}, or mudd_dca_sources=all" if most > 0 else "use mudd_dca_sources=all"
    raise ValueError(
      f"mudd_dca_k={config.mudd_dca_k} with mudd_dca_sources={form} reads all {blocks + 1} sources of {blocks} "
      f"block{'s' if blocks > 1 else ''}; "
      f"{use}."
    )
