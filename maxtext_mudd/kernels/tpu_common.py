"""What the forward and the backward kernel share: block sizes, and weights laid out for the MXU.

Eight tokens t at a time, one product aggregates N sources into C streams:

  L[(c,t),(j,u)] = W[t,c,j] · [t == u]        [8C, 8N]
  out[(c,t), :]  = L @ X[(j,u), :]            X: the sources' rows of these tokens, one above another, [8N, D]

W arrives with each column repeated eight times along lanes (the columns of W2 and a are, outside the kernel), so that
masking it makes L without moving anything between lanes.
"""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from maxtext_mudd.kernels.reference import ACTIVATIONS

VMEM_LIMIT = 100 * 2**20
GROUP = 8  # tokens per product: the sublanes of a float32 tile


@dataclasses.dataclass(frozen=True)
class Shape:
  """The static facts of one call. `rows` is B·T; `block` how many of them one grid step takes."""

  rows: int
  width: int
  sources: int
  ways: int
  hidden: int
  block: int
  dtype: jnp.dtype
  activation: str
  epsilon: float
  has_newest: bool

  @property
  def blocks(self) -> int:
    return pl.cdiv(self.rows, self.block)

  @property
  def lanes(self) -> int:
    return GROUP * self.sources


def mask(shape: Shape):
  """[8,8N], one where lane (j,u) belongs to token t."""
  token = jax.lax.broadcasted_iota(jnp.int32, (GROUP, shape.lanes), 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, (GROUP, shape.lanes), 1)
  return token == jax.lax.rem(lane, GROUP)


def valid(shape: Shape, first_row, x):
  """Rows beyond the last token as zero: what is read there is undefined, and zero times NaN would reach others."""
  if shape.rows % shape.block == 0:
    return x
  row = first_row + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
  return jnp.where(row < shape.rows, x, jnp.zeros_like(x))


def product(x, y, dimensions=((1,), (0,))):
  """A product with a float32 result; float32 operands are multiplied as such."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(x, y, (dimensions, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def activate(z, name: str):
  """The activation; GELU by erf, for which the TPU has an instruction sequence where it has none for erfc."""
  if name == "gelu":
    return 0.5 * z * (1 + jax.lax.erf(z * 0.5**0.5))
  return ACTIVATIONS[name](z)


def hidden(shape: Shape, x, w1):
  """(normed newest in the sources' dtype, inverse root mean square, product with W1) of a block of rows."""
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + shape.epsilon)
  normed = (wide * inverse).astype(shape.dtype)
  return normed, inverse, product(normed, w1)


def repeated_weights(h, w2, a):
  """W of one way for a block of rows, each column eight times: [rows,8N] float32; `h` None: static."""
  return a if h is None else product(h, w2) + a


def halves(x, dtype):
  """float32 as a sum of two bfloat16 numbers where the sources are bfloat16, else as it is: the MXU multiplies those
  exactly, so weights lose no more than 2^-17."""
  if dtype == jnp.float32:
    return [x]
  high = x.astype(dtype)
  return [high, (x - high.astype(jnp.float32)).astype(dtype)]


repeat_columns = functools.partial(jnp.repeat, repeats=GROUP, axis=-1)
