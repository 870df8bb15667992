"""The two passes of the fused kernel on a buffer of sources, of which a number known only at run time is valid: layouts
outside the kernels, block sizes."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxtext_mudd.kernels import tpu_buffer_backward, tpu_buffer_forward
from maxtext_mudd.kernels.tpu import Settings, Weights
from maxtext_mudd.kernels.tpu_buffer_common import SLOTS, BufferShape
from maxtext_mudd.kernels.tpu_common import GROUP, Operands, Origin, repeat_columns

# Of [block,D] arrays in VMEM. A v5p has 64 MB, and the weights, the sums of their gradients and what the compiler keeps
# in between need room too.
_VMEM_BYTES = 36 * 2**20
_LARGEST_BLOCK = 128


class BufferGradients(NamedTuple):
  """What the backward pass makes; shapes of what they are gradients of.

  Attributes:
    buffer: of the buffer, added to the totals where there are any.
    newest: of `Origin.newest`, to_hidden: of `Origin.hidden`; None where there is none.
    weights: float32.
  """

  buffer: Float[Array, "S B T D"]
  newest: Float[Array, "B T D"] | None
  to_hidden: Float[Array, "B T K"] | None
  weights: Weights


def forward(settings: Settings, buffer: Float[Array, "S B T D"], count, weights: Weights, origin: Origin) -> list:
  """The streams of the first `count` entries."""
  shape = _shape(settings, buffer)
  operands, _ = _laid_out(shape, count, weights)
  ways = weights.a.shape[0]
  sums = ways * 4 // shape.dtype.itemsize  # float32, and once where inputs and outputs are there twice
  shape = _with_block(shape, 2 * (shape.slots + 1 + ways) + sums)
  rows, origin = _rows(buffer), jax.tree.map(_rows, origin)
  streams = tpu_buffer_forward.forward(shape, count[None], rows, origin, operands, interpret=settings.interpret)
  return [x.reshape(buffer.shape[1:]) for x in streams]


def backward(
  settings: Settings,
  buffer: Float[Array, "S B T D"],
  count,
  gradients,
  weights: Weights,
  origin: Origin,
  totals: Float[Array, "S B T D"] | None = None,
) -> BufferGradients:
  """Gradients of everything. With `totals`, entries that are not valid are left alone or undefined; else zero."""
  shape = _shape(settings, buffer)
  operands, plain = _laid_out(shape, count, weights)
  groups = 2 if totals is None else 3
  shape = _with_block(shape, 2 * (groups * shape.slots + 2 + weights.a.shape[0]))
  to_buffer, to_origin, sums = tpu_buffer_backward.backward(
    shape,
    count[None],
    _rows(buffer),
    [_rows(x) for x in gradients],
    jax.tree.map(_rows, origin),
    operands,
    plain,
    None if totals is None else _rows(totals),
    interpret=settings.interpret,
  )

  def of_weights(x, like):
    x = _by_entry(shape, x.reshape(*x.shape[:2], weights.a.shape[0], shape.slots))
    return _valid(shape, count, x).reshape(like.shape)

  lead = buffer.shape[1:3]
  to_newest, to_hidden = (None if x is None else x.reshape(*lead, -1) for x in to_origin)
  return BufferGradients(
    to_buffer.reshape(buffer.shape),
    to_newest,
    to_hidden,
    Weights(of_weights(sums.a, weights.a), None if sums.w2 is None else of_weights(sums.w2, weights.w2), sums.w1),
  )


def _rows(x):
  """[...,B,T,n] -> [...,B·T,n]."""
  return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _shape(settings: Settings, buffer) -> BufferShape:
  entries, batch, length, width = buffer.shape
  return BufferShape(
    rows=batch * length,
    width=width,
    block=GROUP,  # each pass takes larger ones
    dtype=jnp.dtype(buffer.dtype),
    activation=settings.activation,
    epsilon=settings.epsilon,
    entries=entries,
    slots=min(SLOTS, entries),
  )


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


def _laid_out(shape: BufferShape, count, weights: Weights) -> tuple[Operands, jax.Array | None]:
  """The operands by group of n entries, with repeated columns; and W2 as [G,K,C·n]."""
  a = _by_group(shape, _valid(shape, count, weights.a.astype(jnp.float32)))
  static = repeat_columns(a[:, :, None])
  if weights.w2 is None:
    return Operands(static), None
  w2 = _by_group(shape, _valid(shape, count, weights.w2.astype(shape.dtype)))
  by_way = repeat_columns(jnp.swapaxes(w2, 1, 2))
  w1 = None if weights.w1 is None else weights.w1.astype(shape.dtype)
  return Operands(static, by_way, w1), w2.reshape(*w2.shape[:2], -1)
