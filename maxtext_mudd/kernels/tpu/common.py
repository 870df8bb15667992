"""Shared parts of the kernels: blocks of rows, the weights of a block, and the products of weights with sources.

One product on the matrix unit (MXU) mixes N sources into C streams, for eight tokens t at a time:

  L[(c,t),(j,u)] = W[t,c,j] · [t == u]        [8C, 8N]
  out[(c,t), :]  = L @ X[(j,u), :]            X: the sources' rows of these tokens, one source below another, [8N, D]

L is called the factors of the weights. W is computed with each column repeated eight times along lanes, so that a mask
turns W into L and no value moves between lanes. On a v5p the HBM delivers 1024 values of a source in 2.9 cycles. Sums
on the vector unit (VPU) take 3.4 to 3.9 cycles for these values, and the product on the MXU takes 2.0 cycles (by the
compiler's static schedule).

A grid step holds a block of rows of all N arrays of a list of sources. For a buffer it holds a block of rows of one
group of n entries, in n slots. A list is treated as one group, with one slot for each source.
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

VMEM_LIMIT = 100 * 2**20  # for chips with 64 MB of VMEM the compiler lowers this limit
TOKENS = 8  # tokens of one product: the number of sublanes of a float32 tile
CORES = 2  # cores of a v4 or v5p chip; each sums the weight gradients of its own row blocks
CHUNK = 128  # columns of one product: with more, the results do not fit the registers of a core
SLOTS = 16  # entries of a buffer in one grid step: with eight tokens, 128 rows of a product, the depth of a v5p's MXU

# VMEM (64 MB on a v5p) holds the input and output blocks of a grid step twice, and besides them the weights, the sums
# of their gradients, scratch memory and temporaries of the compiler. These limit the bytes of the blocks, counted once.
LIST_BYTES, BUFFER_BYTES = 24 * 2**20, 18 * 2**20
_LARGEST_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Shape:
  """The sizes of one call of a kernel, which are known when it is traced.

  Attributes:
    rows: B·T.
    width: D.
    ways: C; for a push, the sum over its aggregates.
    sources: N; for a buffer, S.
    slots: how many sources one grid step holds.
    block: how many rows one grid step holds.
    dtype: dtype of the sources.
    is_buffer: whether the sources are a buffer. Its number of valid entries is known at run time only.
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
    """How many numbers of the sources' dtype represent one weight: see `halves`."""
    return 1 if self.dtype == jnp.float32 else 2


class RowWeights(NamedTuple):
  """The operands of weights of which each grid step reads a block of rows. At most one is given.

  Attributes:
    newest: [rows,D], the input of a `WeightMLP`, where it is not one of the sources.
    hidden: [rows,K], a hidden layer.
    array: [G,rows,C·n] float32, the weights themselves, by group of n sources.
  """

  newest: jax.Array | None = None
  hidden: jax.Array | None = None
  array: jax.Array | None = None


class WholeWeights(NamedTuple):
  """The operands of weights that every grid step reads as a whole, by group of n sources.

  Attributes:
    a: [G,C,1,8n] float32, each column repeated eight times.
    w2: [G,C,K,8n] in the dtype of the sources, each column repeated eight times.
    w1: [D,K] in the dtype of the sources.
    scale: [G,C,1,8n] float32, each column repeated eight times.
    channels: [G,C,n,D] float32, static weights of each channel.
  """

  a: jax.Array | None = None
  w2: jax.Array | None = None
  w1: jax.Array | None = None
  scale: jax.Array | None = None
  channels: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How the weights of one aggregate are computed: the number of ways and the static fields of a `WeightMLP`."""

  ways: int
  source: int = -1
  activation: str = "gelu"
  epsilon: float = 1e-6
  cap: float | None = None


def block_rows(rows: int, arrays: int, width: int, dtype, limit: int) -> int:
  """Rows of a block, for a grid step that holds a block of `arrays` arrays [rows,width] and may use `limit` bytes."""
  most = min(_LARGEST_BLOCK, limit // (arrays * width * jnp.dtype(dtype).itemsize), -(-rows // TOKENS) * TOKENS)
  most = max(TOKENS, most // TOKENS * TOKENS)
  # Prefer a block size that divides the rows into an even number of whole blocks, so that two cores get equally many.
  # Take it only if it is at least half of the largest size.
  even = [block for block in range(TOKENS, most + 1, TOKENS) if rows % (2 * block) == 0]
  return even[-1] if even and 2 * even[-1] >= most else most


# ---------------------------------------------------------------- block specs: what VMEM holds at which grid step


def row_specs(shape: Shape, tree, row_block: Callable):
  """Specs of arrays [rows,n]. `row_block` maps the grid indices to the index of a block of rows."""
  return jax.tree.map(lambda x: pl.BlockSpec((shape.block, x.shape[-1]), lambda *at: (row_block(*at), 0)), tree)


def weight_specs(shape: Shape, weights: RowWeights, row_block: Callable, group: Callable) -> RowWeights:
  """Specs of `RowWeights`. `group` maps the grid indices to the group of sources."""
  specs = row_specs(shape, weights, row_block)
  if weights.array is None:
    return specs
  block = (None, shape.block, weights.array.shape[-1])
  return specs._replace(array=pl.BlockSpec(block, lambda *at: (group(*at), row_block(*at), 0)))


def source_specs(shape: Shape, row_block: Callable):
  """Specs of the sources, one for each slot, so that only the valid entries of a buffer are copied from HBM.

  A slot holds entry group·slots + slot as long as that is valid. In later groups it keeps its last block, and a slot
  that never gets an entry holds the first block of entry 0: Pallas copies a block only when its index changes.
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
  """A buffer and the spec of its newest entry, which is read twice: weights need it before the first group."""
  return buffer, pl.BlockSpec((None, shape.block, shape.width), lambda *at: (at[-1][0] - 1, row_block(*at), 0))


def whole_specs(tree):
  return jax.tree.map(lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim), tree)


def row_array(shape: Shape, width: int | None = None, dtype=None):
  return jax.ShapeDtypeStruct((shape.rows, width or shape.width), dtype or shape.dtype)


def compiler_params(*dimensions: str):
  # Bounds checks would cost a third of a step. The interpreted tests find accesses out of bounds.
  return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True)


# ---------------------------------------------------------------- rows of a block


def valid(shape: Shape, first_row, x):
  """Sets rows beyond the last token to zero: memory there is undefined, and zero times NaN would reach other rows."""
  if shape.rows % shape.block == 0:
    return x
  row = first_row + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
  return jnp.where(row < shape.rows, x, jnp.zeros_like(x))


def stack_rows(shape: Shape, arrays, rows, first_row, columns, num_valid=None):
  """Stacks eight rows and some columns of several arrays, one array below another.

  Args:
    first_row: index of the first of these rows among all rows.
    num_valid: number of arrays that are valid; default: all. The others hold stale blocks, which may not be finite, and
      are replaced by zeros.
  """
  blocks = [valid(shape, first_row, x[rows, columns]) for x in arrays]
  if num_valid is not None:
    blocks = [x if k == 0 else jnp.where(k < num_valid, x, jnp.zeros_like(x)) for k, x in enumerate(blocks)]
  return jnp.concatenate(blocks, axis=0)


def chunks(width: int, size: int = CHUNK):
  """Slices of at most `size` columns that cover `width` columns."""
  return [pl.ds(start, min(size, width - start)) for start in range(0, width, size)]


def for_each_eight_tokens(shape: Shape, body: Callable) -> None:
  """Calls `body` for every eight tokens of a block, with the index of the eight and their rows in the block."""

  def step(g, _):
    body(g, pl.ds(pl.multiple_of(g * TOKENS, TOKENS), TOKENS))
    return 0

  jax.lax.fori_loop(0, shape.block // TOKENS, step, 0)


# ---------------------------------------------------------------- weights as factors of products


def product(x, y, axes_of_x=1, axes_of_y=0):
  return forms.product(x, y, axes_of_x, axes_of_y)


def halves(x, dtype):
  """x as a list of terms that the MXU multiplies exactly, for sources of this dtype.

  For float32 the list has x itself. For bfloat16 it has two bfloat16 terms, with a relative error of 2^-17 at most.
  """
  if dtype == jnp.float32:
    return [x]
  high = x.astype(dtype)
  return [high, (x - high.astype(jnp.float32)).astype(dtype)]


def same_token(rows: int, lanes: int):
  """A mask [rows,lanes], true where lane (j,u) belongs to the token of the row."""
  token = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
  return jax.lax.rem(token, TOKENS) == jax.lax.rem(lane, TOKENS)


def columns_of_way(shape: Shape, ways: int, way: int):
  """A matrix [C·n,8n] that selects the columns of one way from an array of weights and repeats each eight times."""
  lengths = (ways * shape.slots, TOKENS * shape.slots)
  column = jax.lax.broadcasted_iota(jnp.int32, lengths, 0)
  source = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, lengths, 1), TOKENS)
  return (column == way * shape.slots + source).astype(shape.dtype)


def factors_scratch(shape: Shape):
  """Memory for L of every eight tokens of a block, [block/8, parts·8C, 8n]; float32, to be written by eight rows."""
  return pltpu.VMEM((shape.block // TOKENS, shape.parts * shape.ways * TOKENS, TOKENS * shape.slots), jnp.float32)


def tile_scratch(shape: Shape, transposed: bool = False):
  """Memory for L or L^T of eight tokens, in the dtype of the products.

  The product of every chunk of columns loads it again, so that it takes no registers in between.
  """
  lengths = (shape.parts * shape.ways * TOKENS, TOKENS * shape.slots)
  return pltpu.VMEM(lengths[::-1] if transposed else lengths, shape.dtype)


def activations(shape: Shape, recipe: Recipe, rows: RowWeights, whole: WholeWeights, newest, block_start):
  """The hidden layer of a block of rows.

  Args:
    newest: the source that is the input of the weight MLP, where `rows.newest` is not.

  Returns:
    (h, activations, x): the hidden layer in the dtype of the sources, None for weights without one; what
    `weights.hidden_layer` returns, and its input, both None unless the hidden layer was computed here.
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
  """Writes L of one aggregate into `factors`, which holds `shape.ways` ways; those of the aggregate begin at `first`.

  Args:
    h: hidden layer of the block; None for weights without one.
  """
  tiles, _, lanes = factors.shape
  mask = same_token(shape.block, lanes)
  if rows.array is not None:
    array = halves(valid(shape, block_start, rows.array[...]), shape.dtype)
  for c in range(recipe.ways):
    if rows.array is not None:
      weights = sum(product(part, columns_of_way(shape, recipe.ways, c)) for part in array)
    else:
      weights = whole.a[group, c]
      if h is not None:
        scale = None if whole.scale is None else whole.scale[group, c]
        weights += forms.bounded(product(h, whole.w2[group, c]), scale, recipe.cap)[0]
    for part, x in enumerate(halves(jnp.where(mask, weights, 0.0), shape.dtype)):
      at = pl.ds((part * shape.ways + first + c) * TOKENS, TOKENS)
      factors[:, at, :] = x.astype(jnp.float32).reshape(tiles, TOKENS, lanes)


def mix_tile(factors, stacked, ways: int):
  """L @ X as [8C,D] float32, from L [parts·8C,8n], whose parts are summed."""
  mixed = product(factors, stacked)
  height = ways * TOKENS
  return sum(mixed[k : k + height] for k in range(0, mixed.shape[0], height))


def push_tile(factors, grad_streams):
  """L^T @ dO as [8n,D] float32, from L^T: what stream gradients dO [8C,D] contribute to the gradients of sources."""
  parts = factors.shape[1] // grad_streams.shape[0]
  return product(factors, jnp.concatenate([grad_streams] * parts, axis=0))


def eight_rows(stacked, k: int):
  """The eight rows of stream or source k in a stack."""
  return stacked[k * TOKENS : (k + 1) * TOKENS]


repeat_columns = functools.partial(jnp.repeat, repeats=TOKENS, axis=-1)
