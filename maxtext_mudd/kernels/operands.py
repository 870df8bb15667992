"""What goes into the passes of `mix` and what comes out of them, whichever implementation runs them."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from maxtext_mudd.kernels.weights import Weights


class Buffer(NamedTuple):
  """Sources of a loop over blocks that is traced once.

  Attributes:
    entries: S sources, oldest first.
    count: number of valid entries, from 1 to S. What the others hold is ignored, NaN included.
  """

  entries: Float[Array, "S B T D"]
  count: Int[Array, ""]

  @property
  def newest(self) -> Float[Array, "B T D"]:
    return jax.lax.dynamic_index_in_dim(self.entries, self.count - 1, keepdims=False)


Sources = list[Float[Array, "B T D"]] | Buffer


class Gradients(NamedTuple):
  """What the backward pass returns.

  Attributes:
    sources: gradients of the near sources, or of the entries of a buffer, added to what was there before.
    weights: gradient of the weights, in their form; float32 or wider, but for `WeightMLP.newest`.
    hidden: the hidden layer of a `WeightMLP`, for `push`; None: not asked for, or there is none.
    streams: recomputed streams of the aggregate before; None: not asked for.
  """

  sources: list[Float[Array, "B T D"]] | Float[Array, "S B T D"]
  weights: Weights
  hidden: Float[Array, "B T K"] | None = None
  streams: list[Float[Array, "B T D"]] | None = None


class Pending(NamedTuple):
  """One of the aggregates whose gradients `push` adds to older sources.

  Attributes:
    gradients: of its C streams.
    weights: for these sources, zero for those that the aggregate does not mix; not a `WeightMLP`.
  """

  gradients: list[Float[Array, "B T D"]]
  weights: Weights
