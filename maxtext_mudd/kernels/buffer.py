"""Aggregation of a buffer of sources with a dynamic number of valid entries: its two passes, fused or in plain JAX, and
the differentiable operation made of them.

A loop over layers that is traced once keeps its history in such a buffer. Its own backward pass calls `backward` with
the sums of gradients so far, which grow in place.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from maxtext_mudd.kernels import reference, sharded
from maxtext_mudd.kernels.tpu import Settings, Weights

# Parts that a buffer is read in, and their least size: more parts save little traffic and take long to compile.
PARTS, LEAST = 4, 8


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
  return _on_valid_parts(functools.partial(_plain, passes), buffer, newest, weights, count)


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
  if totals is None:
    totals = jnp.zeros_like(buffer)
  plain = functools.partial(_plain_backward, passes)
  return _on_valid_parts(plain, buffer, newest, weights, count, list(gradients), totals)


def _on_valid_parts(function, buffer, newest, weights, count, *arguments):
  """`function` of the smallest number of entries, in parts of the buffer, that holds all valid ones."""
  part = max(-(-len(buffer) // PARTS), LEAST)
  branches = [functools.partial(function, size) for size in range(part, len(buffer) + part, part)]
  return jax.lax.switch((count - 1) // part, branches, buffer, newest, weights, count, *arguments)


def _plain(passes: Passes, size: int, buffer, newest, weights: Weights, count):
  """In plain JAX, of the first `size` entries."""
  settings = {"activation": passes.settings.activation, "epsilon": passes.settings.epsilon}
  w2, a = (None if x is None else x[..., :size] for x in (weights.w2, weights.a))
  with contextlib.nullcontext() if passes.precision is None else jax.default_matmul_precision(passes.precision):
    return reference.depth_aggregate_buffer(buffer[:size], count, newest, weights.w1, w2, a, **settings)


def _plain_backward(passes: Passes, size: int, buffer, newest, weights: Weights, count, gradients, totals) -> Gradients:
  aggregate = functools.partial(_plain, passes, size, count=count)
  _, vjp = jax.vjp(aggregate, buffer[:size], newest, weights)
  made = Gradients(*vjp(gradients))
  return made._replace(buffer=totals.at[:size].add(made.buffer))


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
