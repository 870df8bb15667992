"""Operands and results of the passes of `mix`, the same for every implementation."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from maxtext_mudd.kernels.weights import Weights


class Buffer(NamedTuple):
  """Sources in one array, for a loop over blocks that is traced once.

  Attributes:
    entries: S sources, oldest first.
    count: number of valid entries, from 1 to S. The other entries are ignored, even where they are NaN.
  """

  entries: Float[Array, "S B T D"]
  count: Int[Array, ""]

  @property
  def newest(self) -> Float[Array, "B T D"]:
    return jax.lax.dynamic_index_in_dim(self.entries, self.count - 1, keepdims=False)


Sources = list[Float[Array, "B T D"]] | Buffer


class Gradients(NamedTuple):
  """Results of the backward pass.

  Attributes:
    sources: gradient accumulators of the near sources, or of the entries of a buffer, with this aggregate's gradients
      added.
    weights: gradient of the weights, of the same type as the weights. Arrays are float32 or wider; that of
      `WeightMLP.newest` has the dtype of the sources.
    hidden: hidden layer of a `WeightMLP`, for `push`; None unless it was requested.
    streams: recomputed streams of the aggregate before; None unless they were requested.
  """

  sources: list[Float[Array, "B T D"]] | Float[Array, "S B T D"]
  weights: Weights
  hidden: Float[Array, "B T K"] | None = None
  streams: list[Float[Array, "B T D"]] | None = None


class Pending(NamedTuple):
  """An aggregate whose contribution to the gradients of older sources is still to be added, by `push`.

  Attributes:
    gradients: gradients of its C streams.
    weights: its weights for the older sources, zero for a source that it does not mix; not a `WeightMLP`.
  """

  gradients: list[Float[Array, "B T D"]]
  weights: Weights
