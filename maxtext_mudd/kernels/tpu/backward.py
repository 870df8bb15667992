"""The fused backward pass: each source (the newest entry of a buffer twice) and each stream gradient read once.

It makes the gradients of the weights, and of the sources that are `near`: of a list those whose gradients the next
block needs, for the others can wait for `push`; of a buffer all. In the same pass it can recompute the streams of the
aggregate before, which mixes the same sources.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from maxtext_mudd.kernels import weights as forms
from maxtext_mudd.kernels.tpu import common
from maxtext_mudd.kernels.tpu.common import TOKENS, Recipe, RowWeights, Shape, WholeWeights
from maxtext_mudd.kernels.tpu.forward import write_stream

# Sources whose gradients come from one product of 256 columns, the width of a v6e's and a TPU7x's MXU: 0.77 of the
# cycles of products of 128 columns there, and their results fit the registers.
SOURCES_PER_PRODUCT = 16


class Rows(NamedTuple):
  """What is read block by block.

  Attributes:
    totals: what the gradients of the near sources are added to; None: zeros.
    sources: N arrays [rows,D], or a buffer once for each slot.
    gradients: of the C streams, [rows,D].
    newest: a buffer, for its newest entry, where weights are made from it.
    weights: of this aggregate.
    before: weights of the aggregate whose streams are recomputed.
  """

  totals: list | jax.Array | None
  sources: list
  gradients: list
  newest: jax.Array | None
  weights: RowWeights
  before: RowWeights | None = None


class Whole(NamedTuple):
  """What every grid step reads.

  Attributes:
    near: weights of this aggregate for the near sources; its `w1`.
    w2: [G,K,C·n], of all sources.
    before: weights of the aggregate whose streams are recomputed.
  """

  near: WholeWeights
  w2: jax.Array | None
  before: WholeWeights | None = None


class Outputs(NamedTuple):
  """What is written block by block.

  Attributes:
    sources: gradients of the near sources, [rows,D] each, or of a buffer, [S,rows,D].
    weights: gradients, in the form of `RowWeights`; of a hidden layer and of an array in float32.
    hidden: [rows,K], the hidden layer, for `push`.
    streams: of the aggregate before, [rows,D].
  """

  sources: list | jax.Array
  weights: RowWeights
  hidden: jax.Array | None = None
  streams: list | None = None


class Sums(NamedTuple):
  """Gradients of a [G,C,1,8n], of W2 [G,K,C·n] and of W1 [D,K], float32, one per core."""

  a: jax.Array | None
  w2: jax.Array | None
  w1: jax.Array | None


class Plan(NamedTuple):
  """What is static besides the shape of the sources.

  Attributes:
    recipe: of this aggregate; `before`: of the one whose streams are recomputed.
    near: indices of the near sources of a list, the newest last; None for a buffer.
    keep_hidden: whether the hidden layer is written.
  """

  recipe: Recipe
  near: tuple[int, ...] | None = None
  before: Recipe | None = None
  keep_hidden: bool = False


def backward(shape: Shape, plan: Plan, count, rows: Rows, whole: Whole, *, interpret) -> tuple[Outputs, Sums]:
  """What the kernel makes of each block of rows, and sums over all rows.

  Args:
    count: int32 [1], the number of valid entries; None for a list. Of a buffer with totals, entries that are not valid
      may change where they share a group with valid ones; without totals they get zeros.
    rows: `rows.newest` is filled in here.
  """
  cores = common.CORES if shape.blocks % common.CORES == 0 else 1
  steps = shape.blocks // cores

  def row_block(core, step, *_):
    return core * steps + step

  def group(_, __, g, *___):
    return g

  to_sources = shape_of_sources = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, shape.dtype), rows.sources)
  newest_spec, scalars = None, []
  if shape.is_buffer:
    scalars = [count]
    if whole.near.w1 is not None and rows.weights.newest is None:
      newest, newest_spec = common.newest_of_buffer(shape, rows.sources, row_block)
      rows = rows._replace(newest=newest)
    to_sources_specs = _group_spec(shape, row_block, only_valid=rows.totals is not None)
    rows = rows._replace(sources=[rows.sources] * shape.slots)
  else:
    to_sources = [shape_of_sources[j] for j in plan.near]
    to_sources_specs = common.row_specs(shape, to_sources, row_block)
  outputs, sums = _output_shapes(shape, plan, cores, rows, whole, to_sources)
  row_specs = Rows(
    totals=None if rows.totals is None else to_sources_specs,
    sources=common.source_specs(shape, row_block),
    gradients=common.row_specs(shape, rows.gradients, row_block),
    newest=newest_spec,
    weights=common.weight_specs(shape, rows.weights, row_block, group),
    before=None if rows.before is None else common.weight_specs(shape, rows.before, row_block, group),
  )
  made_specs = Outputs(
    to_sources_specs,
    common.weight_specs(shape, outputs.weights, row_block, group),
    common.row_specs(shape, outputs.hidden, row_block),
    common.row_specs(shape, outputs.streams, row_block),
  )
  sums_specs = jax.tree.map(_core_spec, sums)
  outputs, sums = pl.pallas_call(
    functools.partial(_body, shape, plan, steps),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(cores, steps, shape.groups),
      in_specs=[row_specs, common.whole_specs(whole)],
      out_specs=(made_specs, sums_specs),
      scratch_shapes=[_scratch(shape, plan, whole)],
    ),
    out_shape=(outputs, sums),
    input_output_aliases={len(scalars) + j: j for j in range(len(jax.tree.leaves(rows.totals)))},
    compiler_params=common.compiler_params("parallel", "arbitrary", "arbitrary"),
    interpret=interpret,
    name="depth_aggregate_backward",
  )(*scalars, rows, whole)
  return outputs, jax.tree.map(lambda x: x.sum(0), sums)


def _core_spec(x):
  return pl.BlockSpec((1, *x.shape[1:]), lambda core, *_: (core,) + (0,) * (x.ndim - 1))


def _group_spec(shape: Shape, row_block, only_valid: bool):
  """Of all slots of a group of a buffer at once; with `only_valid`, groups without a valid entry stand for the last
  that has one."""

  def index(*at):
    group, count = at[-2:]
    if only_valid:
      group = jnp.minimum(group, jax.lax.div(count[0] - 1, shape.slots))
    return group, row_block(*at), 0

  return pl.BlockSpec((shape.slots, shape.block, shape.width), index)


def _output_shapes(shape: Shape, plan: Plan, cores: int, rows: Rows, whole: Whole, to_sources) -> tuple[Outputs, Sums]:
  """Shapes and dtypes of everything that the kernel writes."""

  def for_each_core(*lengths):
    return jax.ShapeDtypeStruct((cores, *lengths), jnp.float32)

  weights, columns = rows.weights, shape.ways * shape.slots
  has_hidden = whole.w2 is not None
  outputs = Outputs(
    to_sources,
    RowWeights(
      newest=None if weights.newest is None else common.row_array(shape),
      hidden=None if weights.hidden is None else common.row_array(shape, weights.hidden.shape[-1], jnp.float32),
      array=None if weights.array is None else jax.ShapeDtypeStruct((shape.groups, shape.rows, columns), jnp.float32),
    ),
    hidden=common.row_array(shape, whole.w2.shape[1]) if plan.keep_hidden and has_hidden else None,
    streams=None if plan.before is None else [common.row_array(shape)] * plan.before.ways,
  )
  lanes = TOKENS * shape.slots
  sums = Sums(
    a=for_each_core(shape.groups, shape.ways, 1, lanes) if weights.array is None else None,
    w2=for_each_core(*whole.w2.shape) if has_hidden else None,
    w1=None if whole.near.w1 is None else for_each_core(*whole.near.w1.shape),
  )
  return outputs, sums


def _near(shape: Shape, plan: Plan) -> Shape:
  """The shape of what concerns the near sources alone."""
  if plan.near is None:
    return shape
  return dataclasses.replace(shape, sources=len(plan.near), slots=len(plan.near))


def _scratch(shape: Shape, plan: Plan, whole: Whole) -> dict:
  near = _near(shape, plan)
  scratch = {
    "factors": common.factors_scratch(near),
    "tile": common.tile_scratch(near, transposed=True),
    "pairs": pltpu.VMEM((shape.ways, shape.block, TOKENS * shape.slots), jnp.float32),
  }
  if not shape.is_buffer:  # of which the weights' part is added before it is rounded
    scratch["to_newest"] = pltpu.VMEM((shape.block, shape.width), jnp.float32)
  if whole.w2 is not None:  # in registers they would be spilled around the loops
    scratch["h"] = pltpu.VMEM((shape.block, whole.w2.shape[1]), shape.dtype)
    scratch["to_h"] = pltpu.VMEM((shape.block, whole.w2.shape[1]), jnp.float32)
  if plan.before is not None:
    before = dataclasses.replace(shape, ways=plan.before.ways)
    scratch["before"] = common.factors_scratch(before)
    scratch["tile_below"] = common.tile_scratch(before)
  return scratch


def _body(shape: Shape, plan: Plan, steps: int, *refs):
  *count, rows, whole, outputs, sums, scratch = refs
  step, group = pl.program_id(1), pl.program_id(2)
  block_start = (pl.program_id(0) * steps + step) * shape.block
  has_hidden = whole.w2 is not None
  left, is_last = None, None
  if shape.is_buffer:
    left = count[0][0] - group * shape.slots  # valid entries from this group on
    is_last = (left > 0) & (left <= shape.slots)
  newest = rows.newest if shape.is_buffer else rows.sources[plan.recipe.source]

  def when(condition):  # a list is one group
    return pl.when(condition) if shape.is_buffer else lambda function: function()

  @pl.when((step == 0) & (group == 0))
  def _():
    for total in jax.tree.leaves(sums):
      total[...] = jnp.zeros_like(total)

  @when(group == 0)
  def _():
    if has_hidden:
      h, *_ = common.activations(shape, plan.recipe, rows.weights, whole.near, newest, block_start)
      scratch["h"][...] = h
      scratch["to_h"][...] = jnp.zeros_like(scratch["to_h"])
      if outputs.hidden is not None:
        outputs.hidden[...] = h
    if plan.before is not None:
      recipe, of_before = plan.before, dataclasses.replace(shape, ways=plan.before.ways)
      h, *_ = common.activations(shape, recipe, rows.before, whole.before, rows.sources[recipe.source], block_start)
      common.fill_factors(scratch["before"], of_before, recipe, rows.before, whole.before, h, block_start)

  @when(None if left is None else left > 0)
  def _():
    h = scratch["h"][...] if has_hidden else None
    common.fill_factors(
      scratch["factors"], _near(shape, plan), plan.recipe, rows.weights, whole.near, h, block_start, group
    )
    _products(shape, plan, block_start, left, rows, outputs, scratch)
    to_w = _token_gradients(shape, sums, scratch["pairs"], group)
    if outputs.weights.array is not None:
      outputs.weights.array[...] = to_w
    if has_hidden:
      for part in common.halves(to_w, shape.dtype):
        sums.w2[0, group] += common.product(scratch["h"][...], part, 0, 0)
        scratch["to_h"][...] += common.product(part, whole.w2[group], 1, 1)

  if shape.is_buffer and rows.totals is None:
    for slot in range(shape.slots):

      @pl.when(slot >= left)
      def _(slot=slot):
        outputs.sources[slot] = jnp.zeros(outputs.sources.shape[1:], shape.dtype)

  @when(is_last)
  def _():  # the newest source is here, and the gradients of all weights are known
    through_weights = jnp.zeros((), jnp.float32)
    if outputs.weights.hidden is not None:
      outputs.weights.hidden[...] = scratch["to_h"][...]
    elif has_hidden:
      _, hidden, x = common.activations(shape, plan.recipe, rows.weights, whole.near, newest, block_start)
      through_weights, to_w1 = forms.hidden_gradients(x, whole.near.w1[...], hidden, scratch["to_h"][...])
      sums.w1[0] += to_w1
    if outputs.weights.newest is not None:
      outputs.weights.newest[...] = through_weights.astype(shape.dtype)
      through_weights = jnp.zeros((), jnp.float32)
    if not shape.is_buffer:
      outputs.sources[-1][...] = (scratch["to_newest"][...] + through_weights).astype(shape.dtype)
    elif whole.near.w1 is not None and outputs.weights.newest is None:
      outputs.sources[left - 1] = (outputs.sources[left - 1].astype(jnp.float32) + through_weights).astype(shape.dtype)


def _products(shape: Shape, plan: Plan, block_start, left, rows: Rows, outputs: Outputs, scratch):
  """All products with the sources and with the gradients of the streams: a block of what goes to the near sources, of
  the streams that are recomputed, and dO @ X^T for `_token_gradients`."""
  near = shape.slots if plan.near is None else len(plan.near)

  def at_source(x, k):
    return x.at[k] if shape.is_buffer else x[k]

  def eight_tokens(g, at):
    first = block_start + g * TOKENS
    scratch["tile"][...] = scratch["factors"][g].T.astype(shape.dtype)
    if plan.before is not None:
      scratch["tile_below"][...] = scratch["before"][g].astype(shape.dtype)
    for columns in common.chunks(shape.width, 2 * common.CHUNK):
      stacked = common.stack_rows(shape, rows.sources, at, first, columns, left)
      coming = common.stack_rows(shape, rows.gradients, at, first, columns)
      pairs = common.product(coming, stacked, 1, 1)
      for c in range(shape.ways):
        of_way = common.of_row(pairs, c)
        is_first = columns.start == 0
        scratch["pairs"][c, at, :] = of_way if is_first else scratch["pairs"][c, at, :] + of_way
      for lowest in range(0, near, SOURCES_PER_PRODUCT):
        sources = range(lowest, min(lowest + SOURCES_PER_PRODUCT, near))
        pushed = common.push_tile(scratch["tile"][pl.ds(lowest * TOKENS, len(sources) * TOKENS)], coming)
        for k in sources:
          to_source = common.of_row(pushed, k - lowest)
          if rows.totals is not None:
            to_source += at_source(rows.totals, k)[at, columns].astype(jnp.float32)
          if not shape.is_buffer and k == near - 1:
            scratch["to_newest"][at, columns] = to_source
          else:
            at_source(outputs.sources, k)[at, columns] = to_source.astype(shape.dtype)
      for part in common.chunks(columns.size) if plan.before is not None else ():
        mixed = common.mix_tile(
          scratch["tile_below"][...], stacked[:, part.start : part.start + part.size], plan.before.ways
        )
        for c, stream in enumerate(outputs.streams):
          write_stream(stream, at, pl.ds(columns.start + part.start, part.size), common.of_row(mixed, c))

  common.for_each_eight_tokens(shape, eight_tokens)


def _token_gradients(shape: Shape, sums: Sums, pairs, group):
  """The gradient of the weights of a block, [block,C·n] float32, from dO @ X^T [C,block,8n] of all pairs of eight
  tokens; its sum over tokens is added to `sums.a`, exact, in eight lanes for each source."""
  own = common.own_token(shape.block, TOKENS * shape.slots)
  to_w = jnp.zeros((shape.block, shape.ways * shape.slots), jnp.float32)
  for c in range(shape.ways):
    of_own = jnp.where(own, pairs[c], 0.0)
    if sums.a is not None:
      sums.a[0, group, c] += jnp.sum(of_own, axis=0, keepdims=True)
    at_way = common.columns_of_way(shape, shape.ways, c)
    to_w += sum(common.product(part, at_way, 1, 1) for part in common.halves(of_own, shape.dtype))
  return to_w
