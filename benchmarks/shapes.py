"""Shapes of depth-wise aggregates in the paper's models, by name, for tests and benchmarks."""

from typing import NamedTuple

from maxtext_mudd.connections.mudd import sites


class Shape(NamedTuple):
  """The shape of a model's last aggregate, which mixes the most sources.

  Attributes:
    layers: L; the sources are the L block outputs and the embedding.
    width: D.
    pre_norm: whether sources are normed. The weights are then computed from X_i before the norm, which is no source.
  """

  layers: int
  width: int
  pre_norm: bool = False

  @property
  def sources(self) -> int:
    return self.layers + 1


PAPER = {  # Tables 2 and 8, App. D
  "405m": Shape(24, 1024),
  "1p4b": Shape(24, 2048),
  "2p8b": Shape(32, 2560),
  "6p9b": Shape(32, 4096),
  "1p34b_deepnarrow": Shape(42, 1536, pre_norm=True),
}


def hidden_width(ways: int, sources: int) -> int:
  """K of an aggregate, by the default rule of configurations."""
  return sites.hidden_width(ways, sources, expansion=1, round_to=64)
