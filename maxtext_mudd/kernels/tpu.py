"""The fused kernel as a differentiable operation: layouts outside the kernels, and which passes make what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from maxtext_mudd.kernels import tpu_backward, tpu_forward
from maxtext_mudd.kernels.tpu_common import GROUP, Shape, repeat_columns

# Bytes of all [block,D] inputs and outputs of one grid step. VMEM, 64 MB on a v5p, holds them twice, the weights, and
# the sums of the weight gradients.
_STEP_BYTES = 20 * 2**20
_LARGEST_BLOCK = 128


def depth_aggregate(sources, newest, w1, w2, a, *, activation: str, epsilon: float, interpret=False):
  """As `reference.depth_aggregate`; `newest` may be sources[-1] itself. The backward pass keeps the inputs alone."""
  batch, length, width = sources[-1].shape
  row_bytes = width * sources[-1].dtype.itemsize
  shape = Shape(
    rows=batch * length,
    width=width,
    sources=len(sources),
    ways=a.shape[0],
    hidden=0 if w1 is None else w1.shape[1],
    block=_block(batch * length, (len(sources) + a.shape[0] + 1) * row_bytes),
    dtype=jnp.dtype(sources[-1].dtype),
    activation=activation,
    epsilon=epsilon,
    has_newest=newest is not sources[-1] and w1 is not None,
  )
  rows = [x.reshape(shape.rows, width) for x in sources]
  apart = newest.reshape(shape.rows, width) if shape.has_newest else None
  streams = _aggregate(shape, interpret, rows, apart, w1, w2, a)
  return [x.reshape(batch, length, width) for x in streams]


def _block(rows: int, bytes_per_row: int) -> int:
  block = max(GROUP, min(_LARGEST_BLOCK, _STEP_BYTES // bytes_per_row) // GROUP * GROUP)
  return min(block, -(-rows // GROUP) * GROUP)


def _laid_out(shape: Shape, w1, w2, a):
  """w1 [D,K] and W2 [C,K,N] in the sources' dtype; W2 and a again with repeated columns."""
  static = repeat_columns(a.astype(jnp.float32))[:, None, :]
  if w1 is None:
    return None, None, None, static
  by_way = jnp.transpose(w2, (1, 0, 2)).astype(shape.dtype)
  return w1.astype(shape.dtype), by_way, repeat_columns(by_way), static


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _aggregate(shape, interpret, sources, newest, w1, w2, a):
  w1, _, repeated, static = _laid_out(shape, w1, w2, a)
  return tpu_forward.forward(shape, sources, newest, w1, repeated, static, interpret=interpret)


def _forward(shape, interpret, *inputs):
  return _aggregate(shape, interpret, *inputs), inputs


def _backward(shape, interpret, inputs, gradients):
  sources, newest, w1, w2, a = inputs
  laid_out = _laid_out(shape, w1, w2, a)
  arrays = 2 * (shape.sources + shape.has_newest) + shape.ways
  block = _block(shape.rows, arrays * shape.width * shape.dtype.itemsize)
  to_sources, to_newest, dw1, dw2, da = tpu_backward.backward(
    dataclasses.replace(shape, block=block), sources, newest, list(gradients), *laid_out, interpret=interpret
  )
  da = da[:, 0].astype(a.dtype)
  if w1 is None:
    return to_sources, to_newest, None, None, da
  return to_sources, to_newest, dw1.astype(w1.dtype), jnp.transpose(dw2, (1, 0, 2)).astype(w2.dtype), da


_aggregate.defvjp(_forward, _backward)
