"""Aggregation of a buffer of sources with a dynamic number of valid entries: its two passes, fused or in plain JAX, and
the differentiable operation made of them.

A loop over layers that is traced once keeps its history in such a buffer. Its own backward pass calls `backward` with
the sums of gradients so far, which grow in place.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from maxtext_mudd.kernels import reference, sharded
from maxtext_mudd.kernels.tpu import Settings, Weights


class Passes(NamedTuple):
  """How the passes run; all static.

  Attributes:
    fused: whether by the fused kernel.
    sharding: of a source; None on one device, and in plain JAX, which the compiler shards.
    precision: of matrix products in plain JAX; None: what is set around.
  """

  fused: bool
  settings: Settings
  sharding: NamedSharding | None = None
  precision: str | None = None


class Gradients(NamedTuple):
  """Of the buffer, of X_i where it is given apart, and of the weights, in the dtypes of what they are gradients of."""

  buffer: Float[Array, "S B T D"]
  newest: Float[Array, "B T D"] | None
  weights: Weights


@jax.named_scope("depth_aggregate")
def forward(
  passes: Passes,
  buffer: Float[Array, "S B T D"],
  count: Int[Array, ""],
  newest: Float[Array, "B T D"] | None,
  weights: Weights,
) -> list[Float[Array, "B T D"]]:
  """The streams of the first `count` entries; arguments as of `depth_aggregate`."""
  if passes.fused:
    return sharded.buffer_forward(passes.settings, passes.sharding, buffer, count, newest, weights)
  return _plain(passes)(buffer, newest, weights, count)


@jax.named_scope("depth_aggregate")
def backward(
  passes: Passes,
  buffer: Float[Array, "S B T D"],
  count: Int[Array, ""],
  newest: Float[Array, "B T D"] | None,
  weights: Weights,
  gradients: list[Float[Array, "B T D"]],
  totals: Float[Array, "S B T D"] | None = None,
) -> Gradients:
  """From the gradients of the streams.

  Args:
    totals: what reached the buffer from elsewhere, to be added to; entries from `count` on may change. None: nothing
      did, and these entries get zero.
  """
  if passes.fused:
    made = sharded.buffer_backward(passes.settings, passes.sharding, buffer, count, newest, weights, gradients, totals)
    to_weights = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), made.weights, weights)
    return Gradients(made.buffer, made.newest, to_weights)
  _, vjp = jax.vjp(functools.partial(_plain(passes), count=count), buffer, newest, weights)
  made = Gradients(*vjp(list(gradients)))
  return made if totals is None else made._replace(buffer=totals + made.buffer)


def _plain(passes: Passes):
  def call(buffer, newest, weights: Weights, count):
    settings = {"activation": passes.settings.activation, "epsilon": passes.settings.epsilon}
    with contextlib.nullcontext() if passes.precision is None else jax.default_matmul_precision(passes.precision):
      return reference.depth_aggregate_buffer(buffer, count, newest, weights.w1, weights.w2, weights.a, **settings)

  return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def depth_aggregate(passes: Passes, buffer, count, newest, weights: Weights) -> list[Float[Array, "B T D"]]:
  """`forward`, differentiable. Its backward pass keeps the inputs alone."""
  return forward(passes, buffer, count, newest, weights)


def _forward(passes, *inputs):
  return depth_aggregate(passes, *inputs), inputs


def _backward(passes, inputs, gradients):
  made = backward(passes, *inputs, gradients)
  return made.buffer, None, made.newest, made.weights


depth_aggregate.defvjp(_forward, _backward)
