"""The fused backward pass: it reads each source (a buffer's newest entry twice) and each stream gradient once.

It computes the gradients of the weights and of the near sources. In a list, the near sources are those whose gradients
the next step of the model's backward pass needs; the others are left to `push`. In a buffer, all sources are near. The
same pass can recompute the streams of the aggregate before, which mixes sources that are read anyway.
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

# One product of 256 columns gives the gradients of this many sources. 256 is the width of the MXU of a v6e and a TPU7x,
# on which the product takes 0.77 of the cycles of two products of 128 columns. Its results fit the registers.
SOURCES_PER_PRODUCT = 16
# Sums over rows of products with this many sources are in registers at a time. With eight, the pass with weights of
# each channel takes 0.9 of the cycles that it takes with four.
SOURCES_PER_SUM = 8


class Rows(NamedTuple):
  """Operands that are read block by block.

  Attributes:
    totals: gradient accumulators of the near sources; None: zeros.
    sources: N arrays [rows,D], or a buffer repeated for each slot.
    gradients: gradients of the C streams, [rows,D].
    newest: the buffer again, to read its newest entry for the weight MLP; None if no MLP reads that entry.
    weights: weights of this aggregate.
    recomputed: weights of the aggregate whose streams are recomputed.
  """

  totals: list | jax.Array | None
  sources: list
  gradients: list
  newest: jax.Array | None
  weights: RowWeights
  recomputed: RowWeights | None = None


class Whole(NamedTuple):
  """Operands that every grid step reads as a whole.

  Attributes:
    near: weights of this aggregate for the near sources, and its `w1`.
    w2: W2 for all sources, [G,K,C·n].
    scale: the scale of a `WeightMLP` for all sources, [G,1,C·n] float32.
    recomputed: weights of the aggregate whose streams are recomputed.
  """

  near: WholeWeights
  w2: jax.Array | None
  scale: jax.Array | None
  recomputed: WholeWeights | None = None


class Outputs(NamedTuple):
  """Results that are written block by block.

  Attributes:
    sources: gradient accumulators of the near sources, [rows,D] each; of a buffer, [S,rows,D].
    weights: gradients of `RowWeights`; those of a hidden layer and of an array are float32.
    hidden: the hidden layer [rows,K], for `push`; None unless it was requested.
    streams: recomputed streams of the aggregate before, [rows,D]; None unless they were requested.
  """

  sources: list | jax.Array
  weights: RowWeights
  hidden: jax.Array | None = None
  streams: list | None = None


class Sums(NamedTuple):
  """Gradients that are summed over rows, float32. In the kernel they have a leading axis: each core writes its own sum.

  Attributes:
    a: gradient of the static weights, [G,C,1,8n]. The eight lanes of each source remain to be summed.
    w2: gradient of W2, [G,K,C·n].
    w1: gradient of W1, [D,K].
    scale: gradient of the scale, [G,1,C·n].
    channels: gradient of the static weights of each channel, [G,C,n,D].
  """

  a: jax.Array | None
  w2: jax.Array | None
  w1: jax.Array | None
  scale: jax.Array | None
  channels: jax.Array | None


class BackwardPlan(NamedTuple):
  """What the kernel computes, known when it is traced.

  Attributes:
    recipe: recipe of this aggregate.
    near: indices of the near sources of a list, the newest last; None for a buffer.
    recomputed: recipe of the aggregate whose streams are recomputed; None: no streams are recomputed.
    keep_hidden: whether the hidden layer is written.
  """

  recipe: Recipe
  near: tuple[int, ...] | None = None
  recomputed: Recipe | None = None
  keep_hidden: bool = False


def backward(shape: Shape, plan: BackwardPlan, count, rows: Rows, whole: Whole, *, interpret) -> tuple[Outputs, Sums]:
  """Runs the kernel.

  If an entry of a buffer is not valid and its group has valid entries, its accumulator may change. Without
  `rows.totals` it is zero.

  Args:
    shape: sizes of the call.
    plan: what the kernel computes.
    count: number of valid entries of a buffer, int32 [1]; None for a list.
    rows: operands that are read block by block; `rows.newest` is set here.
    whole: operands that are read as a whole.
  """
  cores = common.CORES if shape.blocks % common.CORES == 0 else 1
  steps = shape.blocks // cores

  def row_block(core, step, *_):
    return core * steps + step

  def group(_, __, g, *___):
    return g

  grad_sources = all_grad_sources = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, shape.dtype), rows.sources)
  newest_spec, scalars = None, []
  if shape.is_buffer:
    scalars = [count]
    if whole.near.w1 is not None and rows.weights.newest is None:
      newest, newest_spec = common.newest_of_buffer(shape, rows.sources, row_block)
      rows = rows._replace(newest=newest)
    grad_source_specs = _group_spec(shape, row_block, only_valid=rows.totals is not None)
    rows = rows._replace(sources=[rows.sources] * shape.slots)
  else:
    grad_sources = [all_grad_sources[j] for j in plan.near]
    grad_source_specs = common.row_specs(shape, grad_sources, row_block)
  outputs, sums = _output_shapes(shape, plan, cores, rows, whole, grad_sources)
  row_specs = Rows(
    totals=None if rows.totals is None else grad_source_specs,
    sources=common.source_specs(shape, row_block),
    gradients=common.row_specs(shape, rows.gradients, row_block),
    newest=newest_spec,
    weights=common.weight_specs(shape, rows.weights, row_block, group),
    recomputed=None if rows.recomputed is None else common.weight_specs(shape, rows.recomputed, row_block, group),
  )
  output_specs = Outputs(
    grad_source_specs,
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
      out_specs=(output_specs, sums_specs),
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
  """The spec of all slots of a group of a buffer at once.

  With `only_valid`, groups without a valid entry keep the block of the last group that has one.
  """

  def index(*at):
    group, count = at[-2:]
    if only_valid:
      group = jnp.minimum(group, jax.lax.div(count[0] - 1, shape.slots))
    return group, row_block(*at), 0

  return pl.BlockSpec((shape.slots, shape.block, shape.width), index)


def _output_shapes(
  shape: Shape, plan: BackwardPlan, cores: int, rows: Rows, whole: Whole, grad_sources
) -> tuple[Outputs, Sums]:
  """Shapes and dtypes of everything that the kernel writes."""

  def for_each_core(*lengths):
    return jax.ShapeDtypeStruct((cores, *lengths), jnp.float32)

  weights, columns = rows.weights, shape.ways * shape.slots
  has_hidden = whole.w2 is not None
  outputs = Outputs(
    grad_sources,
    RowWeights(
      newest=None if weights.newest is None else common.row_array(shape),
      hidden=None if weights.hidden is None else common.row_array(shape, weights.hidden.shape[-1], jnp.float32),
      array=None if weights.array is None else jax.ShapeDtypeStruct((shape.groups, shape.rows, columns), jnp.float32),
    ),
    hidden=common.row_array(shape, whole.w2.shape[1]) if plan.keep_hidden and has_hidden else None,
    streams=None if plan.recomputed is None else [common.row_array(shape)] * plan.recomputed.ways,
  )
  lanes = TOKENS * shape.slots
  sums = Sums(
    a=for_each_core(shape.groups, shape.ways, 1, lanes) if weights.array is None else None,
    w2=for_each_core(*whole.w2.shape) if has_hidden else None,
    w1=None if whole.near.w1 is None else for_each_core(*whole.near.w1.shape),
    scale=None if whole.scale is None else for_each_core(*whole.scale.shape),
    channels=None if whole.near.channels is None else for_each_core(shape.groups, shape.ways, shape.slots, shape.width),
  )
  return outputs, sums


def _near(shape: Shape, plan: BackwardPlan) -> Shape:
  """The sizes of the call, restricted to the near sources."""
  if plan.near is None:
    return shape
  return dataclasses.replace(shape, sources=len(plan.near), slots=len(plan.near))


def _scratch(shape: Shape, plan: BackwardPlan, whole: Whole) -> dict:
  near = _near(shape, plan)
  scratch = {
    "factors": common.factors_scratch(near),
    "tile": common.tile_scratch(near, transposed=True),
    "pairs": pltpu.VMEM((shape.ways, shape.block, TOKENS * shape.slots), jnp.float32),
  }
  if not shape.is_buffer:  # float32, so that the gradient is rounded once, after the MLP's part is added
    scratch["grad_newest"] = pltpu.VMEM((shape.block, shape.width), jnp.float32)
  if whole.w2 is not None:  # in VMEM, because registers with these arrays would be spilled around the loops
    scratch["h"] = pltpu.VMEM((shape.block, whole.w2.shape[1]), shape.dtype)
    scratch["grad_h"] = pltpu.VMEM((shape.block, whole.w2.shape[1]), jnp.float32)
  if plan.recomputed is not None:
    recomputed_shape = dataclasses.replace(shape, ways=plan.recomputed.ways)
    scratch["recomputed_factors"] = common.factors_scratch(recomputed_shape)
    scratch["recomputed_tile"] = common.tile_scratch(recomputed_shape)
  return scratch


def _body(shape: Shape, plan: BackwardPlan, steps: int, *refs):
  *count, rows, whole, outputs, sums, scratch = refs
  step, group = pl.program_id(1), pl.program_id(2)
  block_start = (pl.program_id(0) * steps + step) * shape.block
  has_hidden = whole.w2 is not None
  num_valid, is_last = None, None
  if shape.is_buffer:
    num_valid = count[0][0] - group * shape.slots  # valid entries in this group and in later ones
    is_last = (num_valid > 0) & (num_valid <= shape.slots)
  newest = rows.newest if shape.is_buffer else rows.sources[plan.recipe.source]

  def when(condition):  # a list is one group, so every condition on groups holds
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
      scratch["grad_h"][...] = jnp.zeros_like(scratch["grad_h"])
      if outputs.hidden is not None:
        outputs.hidden[...] = h
    if plan.recomputed is not None:
      recipe, recomputed_shape = plan.recomputed, dataclasses.replace(shape, ways=plan.recomputed.ways)
      h, *_ = common.activations(
        shape, recipe, rows.recomputed, whole.recomputed, rows.sources[recipe.source], block_start
      )
      factors = scratch["recomputed_factors"]
      common.fill_factors(factors, recomputed_shape, recipe, rows.recomputed, whole.recomputed, h, block_start)

  @when(None if num_valid is None else num_valid > 0)
  def _():
    h = scratch["h"][...] if has_hidden else None
    common.fill_factors(
      scratch["factors"], _near(shape, plan), plan.recipe, rows.weights, whole.near, h, block_start, group
    )
    _products(shape, plan, block_start, num_valid, group, rows, whole.near.channels, outputs, scratch)
    if sums.channels is not None:
      _channel_gradients(shape, block_start, rows, sums.channels, group)
    grad_w = _token_gradients(shape, sums, scratch["pairs"], group)
    if outputs.weights.array is not None:
      outputs.weights.array[...] = grad_w
    if plan.recipe.cap is not None:
      scale = None if whole.scale is None else whole.scale[group]
      dynamic = common.product(scratch["h"][...], whole.w2[group])
      _, slope, by_scale = forms.bounded(dynamic, scale, plan.recipe.cap)
      if sums.scale is not None:
        sums.scale[0, group] += jnp.sum(grad_w * by_scale, axis=0, keepdims=True)
      grad_w = grad_w * slope
    if has_hidden:
      for part in common.halves(grad_w, shape.dtype):
        sums.w2[0, group] += common.product(scratch["h"][...], part, 0, 0)
        scratch["grad_h"][...] += common.product(part, whole.w2[group], 1, 1)

  if shape.is_buffer and rows.totals is None:
    for slot in range(shape.slots):

      @pl.when(slot >= num_valid)
      def _(slot=slot):
        outputs.sources[slot] = jnp.zeros(outputs.sources.shape[1:], shape.dtype)

  @when(is_last)
  def _():  # the group of the newest source is the last, so the gradients of all weights are complete
    through_weights = jnp.zeros((), jnp.float32)
    if outputs.weights.hidden is not None:
      outputs.weights.hidden[...] = scratch["grad_h"][...]
    elif has_hidden:
      _, hidden, x = common.activations(shape, plan.recipe, rows.weights, whole.near, newest, block_start)
      through_weights, grad_w1 = forms.hidden_gradients(x, whole.near.w1[...], hidden, scratch["grad_h"][...])
      sums.w1[0] += grad_w1
    if outputs.weights.newest is not None:
      outputs.weights.newest[...] = through_weights.astype(shape.dtype)
      through_weights = jnp.zeros((), jnp.float32)
    if not shape.is_buffer:
      outputs.sources[-1][...] = (scratch["grad_newest"][...] + through_weights).astype(shape.dtype)
    elif whole.near.w1 is not None and outputs.weights.newest is None:
      newest_slot = num_valid - 1
      total = outputs.sources[newest_slot].astype(jnp.float32) + through_weights
      outputs.sources[newest_slot] = total.astype(shape.dtype)


def _products(
  shape: Shape,
  plan: BackwardPlan,
  block_start,
  num_valid,
  group,
  rows: Rows,
  channels,
  outputs: Outputs,
  scratch,
):
  """Computes, for a block of rows, all products with the sources and with the gradients of the streams.

  They are the gradients of the near sources, the recomputed streams, and dO @ X^T for `_token_gradients`.

  Args:
    channels: as in `WholeWeights`, of the near sources; None: zeros.
  """
  near = shape.slots if plan.near is None else len(plan.near)

  def at_source(x, k):
    return x.at[k] if shape.is_buffer else x[k]

  def eight_tokens(g, at):
    first = block_start + g * TOKENS
    scratch["tile"][...] = scratch["factors"][g].T.astype(shape.dtype)
    if plan.recomputed is not None:
      scratch["recomputed_tile"][...] = scratch["recomputed_factors"][g].astype(shape.dtype)
    for columns in common.chunks(shape.width, 2 * common.CHUNK):
      stacked = common.stack_rows(shape, rows.sources, at, first, columns, num_valid)
      grad_streams = common.stack_rows(shape, rows.gradients, at, first, columns)
      pairs = common.product(grad_streams, stacked, 1, 1)
      for c in range(shape.ways):
        way_pairs = common.eight_rows(pairs, c)
        is_first = columns.start == 0
        scratch["pairs"][c, at, :] = way_pairs if is_first else scratch["pairs"][c, at, :] + way_pairs
      if channels is not None:
        wide = [common.eight_rows(grad_streams, c).astype(jnp.float32) for c in range(shape.ways)]
      for lowest in range(0, near, SOURCES_PER_PRODUCT):
        sources = range(lowest, min(lowest + SOURCES_PER_PRODUCT, near))
        grad_sources = common.push_tile(scratch["tile"][pl.ds(lowest * TOKENS, len(sources) * TOKENS)], grad_streams)
        for k in sources:
          grad_source = common.eight_rows(grad_sources, k - lowest)
          if channels is not None:
            grad_source += sum(channels[group, c, pl.ds(k, 1), columns] * x for c, x in enumerate(wide))
          if rows.totals is not None:
            grad_source += at_source(rows.totals, k)[at, columns].astype(jnp.float32)
          if not shape.is_buffer and k == near - 1:
            scratch["grad_newest"][at, columns] = grad_source
          else:
            at_source(outputs.sources, k)[at, columns] = grad_source.astype(shape.dtype)
      for part in common.chunks(columns.size) if plan.recomputed is not None else ():
        mixed = common.mix_tile(
          scratch["recomputed_tile"][...], stacked[:, part.start : part.start + part.size], plan.recomputed.ways
        )
        for c, stream in enumerate(outputs.streams):
          write_stream(stream, at, pl.ds(columns.start + part.start, part.size), common.eight_rows(mixed, c))

  common.for_each_eight_tokens(shape, eight_tokens)


def _channel_gradients(shape: Shape, block_start, rows: Rows, total, group) -> None:
  """Adds dO ∘ X, summed over a block of rows, to the gradient of the weights of each channel. The sums of some sources
  and columns stay in registers while all rows go by."""

  def of_columns(columns):
    for lowest in range(0, shape.slots, SOURCES_PER_SUM):
      sources = range(lowest, min(lowest + SOURCES_PER_SUM, shape.slots))

      def step(g, partial, sources=sources):
        at = pl.ds(pl.multiple_of(g * TOKENS, TOKENS), TOKENS)
        first = block_start + g * TOKENS
        read = [common.valid(shape, first, x[at, columns]).astype(jnp.float32) for x in rows.gradients]
        mixed = [common.valid(shape, first, rows.sources[k][at, columns]).astype(jnp.float32) for k in sources]
        return [[x + stream * source for x, source in zip(of_way, mixed)] for of_way, stream in zip(partial, read)]

      zeros = [[jnp.zeros((TOKENS, columns.size), jnp.float32)] * len(sources)] * shape.ways
      partial = jax.lax.fori_loop(0, shape.block // TOKENS, step, zeros)
      for c, of_way in enumerate(partial):
        for k, x in zip(sources, of_way):
          total[0, group, c, pl.ds(k, 1), columns] += jnp.sum(x, axis=0, keepdims=True)

  whole = shape.width // common.CHUNK
  if whole:  # a loop, since code for each chunk of columns takes long to compile
    size = common.CHUNK
    jax.lax.fori_loop(0, whole, lambda k, _: of_columns(pl.ds(pl.multiple_of(k * size, size), size)), None)
  if shape.width % common.CHUNK:
    of_columns(pl.ds(whole * common.CHUNK, shape.width % common.CHUNK))


def _token_gradients(shape: Shape, sums: Sums, pairs, group):
  """The gradient of the weights of a block of rows, [block,C·n] float32; also adds its sum over tokens to `sums.a`.

  Args:
    pairs: dO @ X^T of all pairs among every eight tokens, [C,block,8n]. Only pairs of equal tokens are gradients.
      `sums.a` adds these in float32, in eight lanes for each source.
  """
  mask = common.same_token(shape.block, TOKENS * shape.slots)
  grad_w = jnp.zeros((shape.block, shape.ways * shape.slots), jnp.float32)
  for c in range(shape.ways):
    same_token_pairs = jnp.where(mask, pairs[c], 0.0)
    if sums.a is not None:
      sums.a[0, group, c] += jnp.sum(same_token_pairs, axis=0, keepdims=True)
    columns = common.columns_of_way(shape, shape.ways, c)
    grad_w += sum(common.product(part, columns, 1, 1) for part in common.halves(same_token_pairs, shape.dtype))
  return grad_w
