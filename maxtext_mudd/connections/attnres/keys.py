"""The keys of Attention Residuals. Imports neither JAX nor MaxText."""

from maxtext_mudd.blocks import num_blocks
from maxtext_mudd.connections.family_keys import HistoryKeys
from maxtext_mudd.connections.keys import key


class AttnResKeys(HistoryKeys):
  """The keys of `depth_connection=attnres`."""

  mudd_attnres_block: int = key(
    1,
    "S: number of sublayers whose outputs are summed to one source, a block of Block AttnRes; 1 is Full AttnRes, in "
    "which every sublayer's output is a source. A Transformer block has two sublayers, attention and FFN.",
    ge=1,
  )
  mudd_attnres_heads: int = key(
    1,
    "H: heads of a query. Head h mixes the channels h·D/H up to (h+1)·D/H by a softmax of its own. With more than one, "
    "aggregation is plain JAX. Logits take sources × queries × H float32 numbers for each token.",
    ge=1,
  )
  mudd_attnres_value_route: bool = key(
    False,
    "The values of attention read an aggregate with a query of its own; queries and keys share the other. Attention "
    "then has a norm for each of q, k and v.",
  )


def sublayers(config) -> int:
  """Number of sublayers of the model."""
  return 2 * num_blocks(config)


def first_query(config, sublayer):
  """The number of the first query of a sublayer; with a value route, attention has a second one.

  Args:
    sublayer: as in `count_sources`.
  """
  return sublayer + (sublayer + 1) // 2 if config.mudd_attnres_value_route else sublayer


def count_queries(config) -> int:
  """M: the queries of all sublayers and of the final aggregate."""
  return first_query(config, sublayers(config)) + 1


def count_ways(config, sublayer: int) -> int:
  """How many streams the aggregate of a sublayer makes."""
  is_attention = sublayer % 2 == 0 and sublayer < sublayers(config)
  return 2 if config.mudd_attnres_value_route and is_attention else 1


def count_sources(config, sublayer):
  """How many sources a sublayer reads: the embedding, the finished sums of S sublayers, and the sum so far of its own
  S sublayers, which the first of them does not have.

  Args:
    sublayer: its number, from 0; an int or an array. The number of sublayers stands for the final aggregate.
  """
  return 1 + -(-sublayer // config.mudd_attnres_block)


def check_sizes(config) -> None:
  """Raises ValueError for blocks that are longer than the model, and for heads of unequal size."""
  if config.emb_dim % config.mudd_attnres_heads:
    raise ValueError(
      f"mudd_attnres_heads={config.mudd_attnres_heads} does not divide emb_dim={config.emb_dim}; use a divisor of it."
    )
  if config.mudd_attnres_block > sublayers(config):
    raise ValueError(
      f"mudd_attnres_block={config.mudd_attnres_block} is more than the {sublayers(config)} sublayers of "
      f"{num_blocks(config)} Transformer blocks; use at most {sublayers(config)}."
    )
