"""The fused kernel as one differentiable operation. Its backward pass keeps the inputs alone."""

import functools

import jax
from jax.sharding import NamedSharding

from maxtext_mudd.kernels import sharded
from maxtext_mudd.kernels.tpu import Aggregate, Settings, Weights
from maxtext_mudd.kernels.tpu_common import Origin


def depth_aggregate(sources, newest, w1, w2, a, settings: Settings, sharding: NamedSharding | None):
  """As `reference.depth_aggregate`; `newest` may be sources[-1] itself."""
  apart = newest if newest is not sources[-1] and w1 is not None else None
  return _depth_aggregate(settings, sharding, list(sources), apart, Weights(a, w2, w1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _depth_aggregate(settings, sharding, sources, newest, weights):
  return sharded.forward(settings, sharding, sources, _aggregate(sources, newest, weights))


def _aggregate(sources, newest, weights):
  return Aggregate(weights, Origin(newest), tuple(range(len(sources))))


def _forward(settings, sharding, *inputs):
  return _depth_aggregate(settings, sharding, *inputs), inputs


def _backward(settings, sharding, inputs, gradients):
  sources, newest, weights = inputs
  everything = tuple(range(len(sources)))
  aggregate = _aggregate(sources, newest, weights)
  made = sharded.backward(settings, sharding, sources, list(gradients), aggregate, near=everything)
  to_weights = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), made.weights, weights)
  return made.near, made.newest, to_weights


_depth_aggregate.defvjp(_forward, _backward)
