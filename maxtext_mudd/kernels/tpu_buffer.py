"""The fused kernel on a buffer of sources, of which a number known only at run time is valid, as a differentiable
operation: layouts outside the kernels, and which pass makes what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from maxtext_mudd.kernels import tpu_buffer_backward, tpu_buffer_forward
from maxtext_mudd.kernels.tpu import Settings
from maxtext_mudd.kernels.tpu_buffer_common import SLOTS, BufferShape
from maxtext_mudd.kernels.tpu_common import GROUP, Operands, repeat_columns

# Of [block,D] arrays in VMEM. A v5p has 64 MB, and the weights, the sums of their gradients and what the compiler keeps
# in between need room too.
_VMEM_BYTES = 36 * 2**20
_LARGEST_BLOCK = 128


def depth_aggregate(buffer, count, newest, w1, w2, a, settings: Settings):
  """As `reference.depth_aggregate_buffer`. The backward pass keeps the inputs alone."""
  entries, batch, length, width = buffer.shape
  shape = BufferShape(
    rows=batch * length,
    width=width,
    block=GROUP,  # each pass takes larger ones
    dtype=jnp.dtype(buffer.dtype),
    activation=settings.activation,
    epsilon=settings.epsilon,
    entries=entries,
    slots=min(SLOTS, entries),
  )
  rows = buffer.reshape(entries, shape.rows, width)
  apart = None if newest is None or w1 is None else newest.reshape(shape.rows, width)
  streams = _aggregate(shape, settings.interpret, count, rows, apart, w1, w2, a)
  return [x.reshape(batch, length, width) for x in streams]


def _with_block(shape: BufferShape, arrays: int) -> BufferShape:
  """With blocks of which `arrays` fit: of a power of two rows, for then usually no row has to be masked."""
  block = _LARGEST_BLOCK
  while block > GROUP and arrays * block * shape.width * shape.dtype.itemsize > _VMEM_BYTES:
    block //= 2
  return dataclasses.replace(shape, block=min(block, -(-shape.rows // GROUP) * GROUP))


def _by_group(shape: BufferShape, x):
  """[...,S] -> [G,...,n], zero after the last entry."""
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, shape.groups * shape.slots - shape.entries)])
  return jnp.moveaxis(x.reshape(*x.shape[:-1], shape.groups, shape.slots), -2, 0)


def _by_entry(shape: BufferShape, x):
  """[G,...,n] -> [...,S]."""
  x = jnp.moveaxis(x, 0, -2)
  return x.reshape(*x.shape[:-2], shape.groups * shape.slots)[..., : shape.entries]


def _valid(shape: BufferShape, count, x):
  """Columns from `count` on as zero, whatever they hold."""
  return jnp.where(jnp.arange(shape.entries) < count, x, 0)


def _laid_out(shape: BufferShape, count, w1, w2, a) -> tuple[Operands, jax.Array | None]:
  """The operands by group of n entries, with repeated columns; and W2 as [G,K,C·n]."""
  static = repeat_columns(_by_group(shape, _valid(shape, count, a.astype(jnp.float32)))[:, :, None])
  if w1 is None:
    return Operands(static), None
  w2 = _by_group(shape, _valid(shape, count, w2.astype(shape.dtype)))
  by_way = repeat_columns(jnp.swapaxes(w2, 1, 2))
  return Operands(static, by_way, w1.astype(shape.dtype)), w2.reshape(*w2.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _aggregate(shape, interpret, count, buffer, newest, w1, w2, a):
  operands, _ = _laid_out(shape, count, w1, w2, a)
  ways = a.shape[0]
  sums = ways * 4 // shape.dtype.itemsize  # float32, and once where inputs and outputs are there twice
  shape = _with_block(shape, 2 * (shape.slots + 1 + ways) + sums)
  return tpu_buffer_forward.forward(shape, count[None], buffer, newest, operands, interpret=interpret)


def _forward(shape, interpret, *inputs):
  return _aggregate(shape, interpret, *inputs), inputs


def _backward(shape, interpret, inputs, gradients):
  count, buffer, newest, w1, w2, a = inputs
  operands, plain = _laid_out(shape, count, w1, w2, a)
  shape = _with_block(shape, 2 * (2 * shape.slots + 2 + a.shape[0]))
  to_buffer, to_newest, sums = tpu_buffer_backward.backward(
    shape, count[None], buffer, newest, gradients, operands, plain, interpret=interpret
  )

  def of_weights(x, like):
    x = _by_entry(shape, x.reshape(*x.shape[:2], a.shape[0], shape.slots))
    return _valid(shape, count, x).reshape(like.shape).astype(like.dtype)

  if w1 is None:
    return None, to_buffer, None, None, None, of_weights(sums.a, a)
  return None, to_buffer, to_newest, sums.w1.astype(w1.dtype), of_weights(sums.w2, w2), of_weights(sums.a, a)


_aggregate.defvjp(_forward, _backward)
