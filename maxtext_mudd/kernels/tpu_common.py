"""What the kernels share: block sizes, and weights laid out for the MXU.

Eight tokens t at a time, one product aggregates N sources into C streams:

  L[(c,t),(j,u)] = W[t,c,j] · [t == u]        [8C, 8N]
  out[(c,t), :]  = L @ X[(j,u), :]            X: the sources' rows of these tokens, one above another, [8N, D]

W arrives with each column repeated eight times along lanes (the columns of W2 and a are, outside the kernel), so that
masking it makes L without moving anything between lanes.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from maxtext_mudd.kernels.reference import ACTIVATIONS

VMEM_LIMIT = 100 * 2**20  # above what chips with 64 MB have: there the compiler's own limit holds
GROUP = 8  # tokens per product: the sublanes of a float32 tile
CORES = 2  # of a v4 or v5p: each adds up the weight gradients of its own row blocks
CHUNK = 128  # columns per product: wider ones leave more results at a time than a core has registers

# Bytes of all row blocks that go in or out in one grid step. VMEM, 64 MB on a v5p, holds them twice, the weights, and
# the sums of the weight gradients.
_STEP_BYTES = 24 * 2**20
_LARGEST_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Shape:
  """The static facts of one call. `rows` is B·T; `block` how many of them one grid step takes."""

  rows: int
  width: int
  block: int
  dtype: jnp.dtype
  activation: str
  epsilon: float

  @property
  def blocks(self) -> int:
    return pl.cdiv(self.rows, self.block)


class Operands(NamedTuple):
  """One aggregate as a kernel takes it, whole. Static weights: `a` alone.

  Attributes:
    a: [C,1,8N] float32, columns repeated.
    w2: [C,K,8N], columns repeated, in the dtype of the sources.
    w1: [D,K] in the dtype of the sources; None where `Origin.hidden` is given.
  """

  a: jax.Array
  w2: jax.Array | None = None
  w1: jax.Array | None = None


class Origin(NamedTuple):
  """What the weights of each token are made from, where that is not the newest of the sources.

  Attributes:
    newest: [rows,D], X_i itself where the sources are pre-normed.
    hidden: [rows,K], act(RMSNorm(X_i) @ W1) made outside, where D is sharded.
  """

  newest: jax.Array | None = None
  hidden: jax.Array | None = None


def block_rows(rows: int, arrays: int, width: int, dtype) -> int:
  """Rows per grid step for so many [rows,width] inputs and outputs."""
  most = min(_LARGEST_BLOCK, _STEP_BYTES // (arrays * width * jnp.dtype(dtype).itemsize), -(-rows // GROUP) * GROUP)
  most = max(GROUP, most // GROUP * GROUP)
  # Without a rest, and the same number for each of two cores, where that does not make them small.
  even = [block for block in range(GROUP, most + 1, GROUP) if rows % (2 * block) == 0]
  return even[-1] if even and 2 * even[-1] >= most else most


def row_specs(shape: Shape, tree, index):
  """Of [rows,n] arrays, one block of rows per grid step."""
  return jax.tree.map(lambda x: pl.BlockSpec((shape.block, x.shape[1]), index), tree)


def whole_specs(tree):
  return jax.tree.map(lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim), tree)


def row_array(shape: Shape, width: int | None = None):
  return jax.ShapeDtypeStruct((shape.rows, width or shape.width), shape.dtype)


def compiler_params(*dimensions: str):
  # The checks would cost a third of a step; the interpreted tests look for reads and writes out of bounds.
  return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True)


def own_token(rows: int, lanes: int):
  """[rows,lanes], true where lane (j,u) belongs to the token of this row."""
  token = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
  return jax.lax.rem(token, GROUP) == jax.lax.rem(lane, GROUP)


def valid(shape: Shape, first_row, x):
  """Rows beyond the last token as zero: what is read there is undefined, and zero times NaN would reach others."""
  if shape.rows % shape.block == 0:
    return x
  row = first_row + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
  return jnp.where(row < shape.rows, x, jnp.zeros_like(x))


def product(x, y, dimensions=((1,), (0,))):
  """A product with a float32 result; float32 operands are multiplied as such, whatever precision is set outside."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(x, y, (dimensions, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def activate(z, name: str):
  """The activation; GELU by erf, for which the TPU has an instruction sequence where it has none for erfc."""
  if name == "gelu":
    return 0.5 * z * (1 + jax.lax.erf(z * 0.5**0.5))
  return ACTIVATIONS[name](z)


def pre_activation(x, w1, epsilon: float):
  """(RMSNorm(x) @ W1, inverse root mean square), float32, of rows of x. The norm commutes with the product, so x is
  multiplied as it is, without another rounding."""
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
  return inverse * product(x, w1), inverse


def activation_and_slope(z, name: str):
  return jax.jvp(functools.partial(activate, name=name), (z,), (jnp.ones_like(z),))


def newest_rows(shape: Shape, origin: Origin, newest, block_start):
  """The block of X_i that the weights are made from; `newest` is that source."""
  return valid(shape, block_start, (newest if origin.newest is None else origin.newest)[...])


def hidden(shape: Shape, operands: Operands, origin: Origin, newest, block_start):
  """act(RMSNorm(X_i) @ W1) of a block of rows in the dtype of the sources; None where the weights are static."""
  if operands.w2 is None:
    return None
  if origin.hidden is not None:
    return valid(shape, block_start, origin.hidden[...])
  z, _ = pre_activation(newest_rows(shape, origin, newest, block_start), operands.w1[...], shape.epsilon)
  return activate(z, shape.activation).astype(shape.dtype)


def factors_scratch(shape: Shape, ways: int, sources: int):
  """Room for L of every group of a block, [groups, parts·8C, 8N]. Float32, to be written eight rows at a time."""
  parts = len(halves(jnp.zeros((), jnp.float32), shape.dtype))
  return pltpu.VMEM((shape.block // GROUP, parts * ways * GROUP, GROUP * sources), jnp.float32)


def group_scratch(shape: Shape, ways: int, sources: int, transposed: bool = False):
  """Room for L or L^T of one group in the dtype of the products, which load it again for every part of the columns: so
  it takes no registers in between."""
  parts = len(halves(jnp.zeros((), jnp.float32), shape.dtype))
  lengths = (parts * ways * GROUP, GROUP * sources)
  return pltpu.VMEM(lengths[::-1] if transposed else lengths, shape.dtype)


def fill_factors(factors, shape: Shape, h, operands: Operands, ways: int, first: int = 0):
  """L of one aggregate into a scratch for `ways` ways in all, of which its own start with `first`."""
  groups, _, lanes = factors.shape
  own = own_token(shape.block, lanes)
  for c in range(operands.a.shape[0]):
    weights = operands.a[c] if h is None else product(h, operands.w2[c]) + operands.a[c]
    for part, x in enumerate(halves(jnp.where(own, weights, 0.0), shape.dtype)):
      rows = pl.ds((part * ways + first + c) * GROUP, GROUP)
      factors[:, rows, :] = x.astype(jnp.float32).reshape(groups, GROUP, lanes)


def mix(factors, stacked, ways: int):
  """L @ X, its parts added up: [8C,D] float32, from L [parts·8C,8N]."""
  mixed = product(factors, stacked)
  height = ways * GROUP
  return sum(mixed[k : k + height] for k in range(0, mixed.shape[0], height))


def push(factors, coming):
  """L^T @ dO: what the streams' gradients [8C,D] send to the sources, [8N,D] float32, from L^T [8N,parts·8C]."""
  parts = factors.shape[1] // coming.shape[0]
  return product(factors, jnp.concatenate([coming] * parts, axis=0))


def halves(x, dtype):
  """float32 as a sum of two bfloat16 numbers where the sources are bfloat16, else as it is: the MXU multiplies those
  exactly, so weights lose no more than 2^-17."""
  if dtype == jnp.float32:
    return [x]
  high = x.astype(dtype)
  return [high, (x - high.astype(jnp.float32)).astype(dtype)]


def stack_rows(shape: Shape, arrays, rows, first_row, columns):
  """Eight rows of each array, one array above another; of some columns."""
  return jnp.concatenate([valid(shape, first_row, x[rows, columns]) for x in arrays], axis=0)


def chunks(width: int, size: int = CHUNK):
  """The columns in parts."""
  return [pl.ds(start, min(size, width - start)) for start in range(0, width, size)]


repeat_columns = functools.partial(jnp.repeat, repeats=GROUP, axis=-1)
