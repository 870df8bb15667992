"""What the kernels share: blocks of rows, the weights of a block, and products with them on the MXU.

Eight tokens t at a time, one product mixes N sources into C streams:

  L[(c,t),(j,u)] = W[t,c,j] · [t == u]        [8C, 8N]
  out[(c,t), :]  = L @ X[(j,u), :]            X: the sources' rows of these tokens, one above another, [8N, D]

W is made with each column repeated eight times along lanes, so that masking it makes L without moving anything between
lanes. On the VPU the same sums take 3.4 to 3.9 cycles per 1024 values of a source on a v5p, more than the 2.9 in which
its HBM delivers them; as this product they take 2.0 (the compiler's static schedule).

Sources are a list, whose N arrays a grid step holds at once, or a buffer, of which a grid step holds one group of n
entries in n slots; a list is then one group with a slot for each source.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from maxtext_mudd.kernels import weights as forms

VMEM_LIMIT = 100 * 2**20  # above what chips with 64 MB have: there the compiler's own limit holds
TOKENS = 8  # per product: the sublanes of a float32 tile
CORES = 2  # of a v4 or v5p: each adds up the weight gradients of its own row blocks
CHUNK = 128  # columns per product: wider ones leave more results at a time than a core has registers
SLOTS = 16  # entries of a buffer in one grid step: with eight tokens 128 rows of a product, the depth of a v5p's MXU

# VMEM, 64 MB on a v5p, holds the blocks of rows that go in or out in one grid step twice, and besides them the weights,
# the sums of their gradients, scratch, and what the compiler keeps in between. Bytes of such blocks, once:
LIST_BYTES, BUFFER_BYTES = 24 * 2**20, 18 * 2**20
_LARGEST_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Shape:
  """The static facts of one call.

  Attributes:
    rows: B·T.
    width: D.
    ways: C, or the sum of those of all aggregates of a push.
    sources: N, or S of a buffer.
    slots: how many sources one grid step holds.
    block: how many rows one grid step holds.
    dtype: of the sources.
    is_buffer: whether the sources are a buffer, of which a number known at run time is valid.
  """

  rows: int
  width: int
  ways: int
  sources: int
  slots: int
  block: int
  dtype: jnp.dtype
  is_buffer: bool = False

  @property
  def blocks(self) -> int:
    return pl.cdiv(self.rows, self.block)

  @property
  def groups(self) -> int:
    return pl.cdiv(self.sources, self.slots)

  @property
  def parts(self) -> int:
    """Numbers of the sources' dtype that one weight is split into."""
    return 1 if self.dtype == jnp.float32 else 2


class RowWeights(NamedTuple):
  """What a block of weights is made from, of which each grid step reads its rows.

  Attributes:
    newest: [rows,D], what a `WeightMLP` reads, where that is not the source `Recipe.source` of a list.
    hidden: [rows,K], a hidden layer.
    array: [G,rows,C·n] float32, the weights themselves by group of n sources.
  """

  newest: jax.Array | None = None
  hidden: jax.Array | None = None
  array: jax.Array | None = None


class WholeWeights(NamedTuple):
  """What a block of weights is made from, of which each grid step reads all, by group of n sources.

  Attributes:
    a: [G,C,1,8n] float32, columns repeated.
    w2: [G,C,K,8n] in the dtype of the sources, columns repeated.
    w1: [D,K] in the dtype of the sources.
  """

  a: jax.Array | None = None
  w2: jax.Array | None = None
  w1: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How the weights of one aggregate are made; what of a `WeightMLP` is static."""

  ways: int
  source: int = -1
  activation: str = "gelu"
  epsilon: float = 1e-6


def block_rows(rows: int, arrays: int, width: int, dtype, limit: int) -> int:
  """Rows per grid step for so many [rows,width] arrays, whose blocks may take `limit` bytes."""
  most = min(_LARGEST_BLOCK, limit // (arrays * width * jnp.dtype(dtype).itemsize), -(-rows // TOKENS) * TOKENS)
  most = max(TOKENS, most // TOKENS * TOKENS)
  # No partial block, and the same number for each of two cores, where that does not make them small.
  even = [block for block in range(TOKENS, most + 1, TOKENS) if rows % (2 * block) == 0]
  return even[-1] if even and 2 * even[-1] >= most else most


# ---------------------------------------------------------------- what lies in VMEM at which grid step


def row_specs(shape: Shape, tree, row_block: Callable):
  """Of arrays [rows,n]: their block of rows. `row_block` maps the grid indices to the block's."""
  return jax.tree.map(lambda x: pl.BlockSpec((shape.block, x.shape[-1]), lambda *at: (row_block(*at), 0)), tree)


def weight_specs(shape: Shape, weights: RowWeights, row_block: Callable, group: Callable) -> RowWeights:
  """Of `RowWeights`; `group` maps the grid indices to the group of sources."""
  specs = row_specs(shape, weights, row_block)
  if weights.array is None:
    return specs
  block = (None, shape.block, weights.array.shape[-1])
  return specs._replace(array=pl.BlockSpec(block, lambda *at: (group(*at), row_block(*at), 0)))


def source_specs(shape: Shape, row_block: Callable):
  """One BlockSpec for each slot, so that nothing but valid entries of a buffer is copied from HBM.

  A slot holds entry group·slots + slot while there is such a valid entry. Later it keeps the block it has, and a slot
  that never gets an entry holds the very first: Pallas copies a block only when its index changes.
  """
  if not shape.is_buffer:
    return [pl.BlockSpec((shape.block, shape.width), lambda *at: (row_block(*at), 0))] * shape.slots

  def spec(slot):
    def index(*at):
      group, count = at[-2], at[-1][0]
      last_group = jax.lax.div(count - 1 - slot, shape.slots)
      entry = jnp.minimum(group, last_group) * shape.slots + slot
      used = slot < count
      return jnp.where(used, entry, 0), jnp.where(used, row_block(*at), 0), 0

    return pl.BlockSpec((None, shape.block, shape.width), index)

  return [spec(slot) for slot in range(shape.slots)]


def newest_of_buffer(shape: Shape, buffer, row_block: Callable):
  """(the buffer, the spec of its newest entry): weights need it before the first group, so it is read twice."""
  return buffer, pl.BlockSpec((None, shape.block, shape.width), lambda *at: (at[-1][0] - 1, row_block(*at), 0))


def whole_specs(tree):
  return jax.tree.map(lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim), tree)


def row_array(shape: Shape, width: int | None = None, dtype=None):
  return jax.ShapeDtypeStruct((shape.rows, width or shape.width), dtype or shape.dtype)


def compiler_params(*dimensions: str):
  # The checks would cost a third of a step; the interpreted tests look for reads and writes out of bounds.
  return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True)


# ---------------------------------------------------------------- rows of a block


def valid(shape: Shape, first_row, x):
  """Rows beyond the last token as zero: what is read there is undefined, and zero times NaN would reach others."""
  if shape.rows % shape.block == 0:
    return x
  row = first_row + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
  return jnp.where(row < shape.rows, x, jnp.zeros_like(x))


def stack_rows(shape: Shape, arrays, rows, first_row, columns, left=None):
  """Eight rows of each array, one array above another; of some columns.

  Args:
    left: None, or the number of arrays that are valid; the others hold other entries or tokens, which may not be
      finite, and count as zero.
  """
  blocks = [valid(shape, first_row, x[rows, columns]) for x in arrays]
  if left is not None:
    blocks = [x if k == 0 else jnp.where(k < left, x, jnp.zeros_like(x)) for k, x in enumerate(blocks)]
  return jnp.concatenate(blocks, axis=0)


def chunks(width: int, size: int = CHUNK):
  """The columns in parts."""
  return [pl.ds(start, min(size, width - start)) for start in range(0, width, size)]


def for_each_eight_tokens(shape: Shape, body: Callable) -> None:
  """Calls `body` with the number of the group of tokens and its rows within the block."""

  def step(g, _):
    body(g, pl.ds(pl.multiple_of(g * TOKENS, TOKENS), TOKENS))
    return 0

  jax.lax.fori_loop(0, shape.block // TOKENS, step, 0)


# ---------------------------------------------------------------- weights as factors of products


def product(x, y, axes_of_x=1, axes_of_y=0):
  return forms.product(x, y, axes_of_x, axes_of_y)


def halves(x, dtype):
  """float32 as a sum of two bfloat16 numbers where the sources are bfloat16, else as it is: the MXU multiplies those
  exactly, so weights lose no more than 2^-17."""
  if dtype == jnp.float32:
    return [x]
  high = x.astype(dtype)
  return [high, (x - high.astype(jnp.float32)).astype(dtype)]


def own_token(rows: int, lanes: int):
  """[rows,lanes], true where lane (j,u) belongs to the token of this row."""
  token = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
  return jax.lax.rem(token, TOKENS) == jax.lax.rem(lane, TOKENS)


def columns_of_way(shape: Shape, ways: int, way: int):
  """[C·n,8n], one where column (way,j) of an array of weights belongs to lane (j,u)."""
  lengths = (ways * shape.slots, TOKENS * shape.slots)
  column = jax.lax.broadcasted_iota(jnp.int32, lengths, 0)
  source = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, lengths, 1), TOKENS)
  return (column == way * shape.slots + source).astype(shape.dtype)


def factors_scratch(shape: Shape):
  """L of every group of tokens of a block, [groups, parts·8C, 8n]. Float32, to be written eight rows at a time."""
  return pltpu.VMEM((shape.block // TOKENS, shape.parts * shape.ways * TOKENS, TOKENS * shape.slots), jnp.float32)


def tile_scratch(shape: Shape, transposed: bool = False):
  """L or L^T of one group of tokens in the dtype of the products, which load it again for every part of the columns: so
  it takes no registers in between."""
  lengths = (shape.parts * shape.ways * TOKENS, TOKENS * shape.slots)
  return pltpu.VMEM(lengths[::-1] if transposed else lengths, shape.dtype)


def activations(shape: Shape, recipe: Recipe, rows: RowWeights, whole: WholeWeights, newest, block_start):
  """(the hidden layer of a block of rows in the dtype of the sources, `weights.Activations`, X_i); None where there is
  none.

  Args:
    newest: the source that the weights are made from, where `rows` does not have X_i.
  """
  if rows.hidden is not None:
    return valid(shape, block_start, rows.hidden[...]), None, None
  if whole.w1 is None:
    return None, None, None
  x = valid(shape, block_start, (newest if rows.newest is None else rows.newest)[...])
  hidden = forms.hidden_layer(x, whole.w1[...], recipe.activation, recipe.epsilon)
  return hidden.value.astype(shape.dtype), hidden, x


def fill_factors(
  factors, shape: Shape, recipe: Recipe, rows: RowWeights, whole: WholeWeights, h, block_start, group=0, first: int = 0
):
  """L of one aggregate into a scratch for `shape.ways` ways in all, of which its own start with `first`."""
  tiles, _, lanes = factors.shape
  own = own_token(shape.block, lanes)
  if rows.array is not None:
    array = halves(valid(shape, block_start, rows.array[...]), shape.dtype)
  for c in range(recipe.ways):
    if rows.array is not None:
      weights = sum(product(part, columns_of_way(shape, recipe.ways, c)) for part in array)
    else:
      weights = whole.a[group, c] if h is None else product(h, whole.w2[group, c]) + whole.a[group, c]
    for part, x in enumerate(halves(jnp.where(own, weights, 0.0), shape.dtype)):
      at = pl.ds((part * shape.ways + first + c) * TOKENS, TOKENS)
      factors[:, at, :] = x.astype(jnp.float32).reshape(tiles, TOKENS, lanes)


def mix_tile(factors, stacked, ways: int):
  """L @ X, its parts added up: [8C,D] float32, from L [parts·8C,8n]."""
  mixed = product(factors, stacked)
  height = ways * TOKENS
  return sum(mixed[k : k + height] for k in range(0, mixed.shape[0], height))


def push_tile(factors, coming):
  """L^T @ dO: what the streams' gradients [8C,D] add to those of the sources, [8n,D] float32, from L^T."""
  parts = factors.shape[1] // coming.shape[0]
  return product(factors, jnp.concatenate([coming] * parts, axis=0))


def of_row(mixed, k: int):
  """The eight tokens of stream or source k."""
  return mixed[k * TOKENS : (k + 1) * TOKENS]


repeat_columns = functools.partial(jnp.repeat, repeats=TOKENS, axis=-1)
