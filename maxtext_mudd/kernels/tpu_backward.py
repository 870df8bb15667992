"""The fused backward pass: each source and each stream gradient read once.

It makes the gradients of the weights, and of the sources that are `near`, whose gradients the next block needs; what
goes to the others can wait for `tpu_push`. In the same pass it can make the streams of the aggregate before (`again`),
which mixes the same sources.
"""

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from maxtext_mudd.kernels import tpu_common as common
from maxtext_mudd.kernels.tpu_common import GROUP, Operands, Origin, Shape
from maxtext_mudd.kernels.tpu_forward import write_streams


class Again(NamedTuple):
  """The aggregate whose streams are made again: `newest` is the index of its newest source."""

  newest: int
  origin: Origin
  operands: Operands


class Rows(NamedTuple):
  """What is read block by block, [rows,D] each but for `Origin.hidden`."""

  totals: list | None  # what the near sources' gradients add to
  sources: list
  gradients: list
  origin: Origin
  again: Origin | None


class Whole(NamedTuple):
  """What every grid step reads. `near` has the columns of the near sources; W2 [C,K,N] is as it is."""

  near: Operands
  w1: jax.Array | None
  w2: jax.Array | None
  again: Operands | None


class Made(NamedTuple):
  """What is written block by block.

  Attributes:
    near: gradients of the near sources, [rows,D].
    newest: of `Origin.newest`, [rows,D].
    hidden: [rows,K], what `tpu_push` makes the weights from.
    to_hidden: gradient of `Origin.hidden`, [rows,K] float32.
    streams: of `Again`, [rows,D].
  """

  near: list
  newest: jax.Array | None
  hidden: jax.Array | None
  to_hidden: jax.Array | None
  streams: list | None


class Sums(NamedTuple):
  """Gradients of a [C,N], W2 [C,K,N] and W1 [D,K], float32, one per core."""

  a: jax.Array
  w2: jax.Array | None
  w1: jax.Array | None


def backward(
  shape: Shape, rows: Rows, whole: Whole, near: tuple[int, ...], again: int | None, *, keep_hidden: bool, interpret
) -> tuple[Made, Sums]:
  """`near`: indices of the near sources; `again`: of the newest source of the aggregate made again."""
  cores = common.CORES if shape.blocks % common.CORES == 0 else 1
  steps = shape.blocks // cores
  ways, sources = len(rows.gradients), len(rows.sources)
  hidden = 0 if whole.w2 is None else whole.w2.shape[1]

  def index(core, i):
    return core * steps + i, 0

  def of_core(core, i):
    return core, 0, 0, 0

  one = common.row_array(shape)
  made = Made(
    near=[one] * len(near),
    newest=one if rows.origin.newest is not None else None,
    hidden=common.row_array(shape, hidden) if keep_hidden and hidden else None,
    to_hidden=jax.ShapeDtypeStruct((shape.rows, hidden), jnp.float32) if rows.origin.hidden is not None else None,
    streams=None if whole.again is None else [one] * whole.again.a.shape[0],
  )
  sums = Sums(
    a=jax.ShapeDtypeStruct((cores, ways, 1, GROUP * sources), jnp.float32),
    w2=jax.ShapeDtypeStruct((cores, ways, hidden, sources), jnp.float32) if hidden else None,
    w1=None if whole.w1 is None else jax.ShapeDtypeStruct((cores, 1, *whole.w1.shape), jnp.float32),
  )
  scratch = {
    "factors": common.factors_scratch(shape, ways, len(near)),
    "of_group": common.group_scratch(shape, ways, len(near), transposed=True),
    "pairs": pltpu.VMEM((ways, shape.block, GROUP * sources), jnp.float32),
    "newest": pltpu.VMEM((shape.block, shape.width), jnp.float32),
  }
  if hidden:
    scratch["hidden"] = pltpu.VMEM((shape.block, hidden), shape.dtype)
  if made.streams is not None:
    scratch["again"] = common.factors_scratch(shape, len(made.streams), sources)
    scratch["again_of_group"] = common.group_scratch(shape, len(made.streams), sources)
  made, sums = pl.pallas_call(
    lambda *refs: _body(shape, steps, near, again, *refs),
    grid=(cores, steps),
    in_specs=[common.row_specs(shape, rows, index), common.whole_specs(whole)],
    out_specs=(
      common.row_specs(shape, made, index),
      jax.tree.map(lambda x: pl.BlockSpec((1, *x.shape[1:]), of_core), sums),
    ),
    out_shape=(made, sums),
    scratch_shapes=[scratch],
    input_output_aliases={} if rows.totals is None else {j: j for j in range(len(near))},
    compiler_params=common.compiler_params("parallel", "arbitrary"),
    interpret=interpret,
    name="depth_aggregate_backward",
  )(rows, whole)
  to_a = sums.a.reshape(cores, ways, sources, GROUP).sum((0, 3))
  return made, Sums(to_a, *(None if x is None else x.sum(0) for x in sums[1:]))


def _body(shape: Shape, steps: int, near, again, rows: Rows, whole: Whole, made: Made, sums: Sums, scratch):
  step = pl.program_id(1)
  block_start = (pl.program_id(0) * steps + step) * shape.block
  newest_source = rows.sources[-1]

  @pl.when(step == 0)
  def _():
    for total in jax.tree.leaves(sums):
      total[...] = jnp.zeros_like(total)

  h = common.hidden(shape, whole.near._replace(w1=whole.w1), rows.origin, newest_source, block_start)
  common.fill_factors(scratch["factors"], shape, h, whole.near, len(rows.gradients))
  if h is not None:
    scratch["hidden"][...] = h  # in a register it would be spilled around the loop
  if made.hidden is not None:
    made.hidden[...] = h
  if made.streams is not None:
    again_h = common.hidden(shape, whole.again, rows.again, rows.sources[again], block_start)
    common.fill_factors(scratch["again"], shape, again_h, whole.again, len(made.streams))

  _groups(shape, block_start, near, rows, made, scratch)
  to_newest = _weight_gradients(shape, block_start, rows, whole, made, sums, scratch)
  last = len(near) - 1
  if made.newest is not None:
    made.newest[...] = jnp.broadcast_to(to_newest, made.newest.shape).astype(shape.dtype)
    to_newest = 0.0
  made.near[last][...] = (scratch["newest"][...] + to_newest).astype(shape.dtype)


def _groups(shape: Shape, block_start, near, rows: Rows, made: Made, scratch):
  """The products with the sources, eight tokens at a time."""
  ways = len(rows.gradients)

  def group(g, _):
    of_group = pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)
    first = block_start + g * GROUP
    scratch["of_group"][...] = scratch["factors"][g].T.astype(shape.dtype)
    if made.streams is not None:
      scratch["again_of_group"][...] = scratch["again"][g].astype(shape.dtype)
    for columns in common.chunks(shape.width):
      stacked = common.stack_rows(shape, rows.sources, of_group, first, columns)
      coming = common.stack_rows(shape, rows.gradients, of_group, first, columns)
      pairs = common.product(coming, stacked, ((1,), (1,)))
      for c in range(ways):
        own = pairs[c * GROUP : (c + 1) * GROUP]
        is_first = columns.start == 0
        scratch["pairs"][c, of_group, :] = own if is_first else scratch["pairs"][c, of_group, :] + own
      pushed = common.push(scratch["of_group"][...], coming)
      for k in range(len(near)):
        to_source = pushed[k * GROUP : (k + 1) * GROUP]
        if rows.totals is not None:
          to_source += rows.totals[k][of_group, columns].astype(jnp.float32)
        if k == len(near) - 1:
          scratch["newest"][of_group, columns] = to_source  # what the weights send to the newest is still to come
        else:
          made.near[k][of_group, columns] = to_source.astype(shape.dtype)
      if made.streams is not None:
        write_streams(
          made.streams, of_group, columns, common.mix(scratch["again_of_group"][...], stacked, len(made.streams))
        )

    return 0

  jax.lax.fori_loop(0, shape.block // GROUP, group, 0)


def _weight_gradients(shape: Shape, block_start, rows: Rows, whole: Whole, made: Made, sums: Sums, scratch):
  """Adds to the sums over tokens; returns the gradient of X_i through the weights, [block,D] float32, or zero."""
  sources = len(rows.sources)
  lanes = GROUP * sources
  own = common.own_token(shape.block, lanes)
  source = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (lanes, sources), 0), GROUP)
  one_hot = (source == jax.lax.broadcasted_iota(jnp.int32, (lanes, sources), 1)).astype(shape.dtype)
  dh = jnp.zeros((), jnp.float32)
  for c in range(len(rows.gradients)):
    pairs = jnp.where(own, scratch["pairs"][c], 0.0)
    sums.a[0, c] += jnp.sum(pairs, axis=0, keepdims=True)  # exact; eight lanes per source, added up outside
    if whole.w2 is not None:
      dw = sum(common.product(part, one_hot) for part in common.halves(pairs, shape.dtype))
      for part in common.halves(dw, shape.dtype):
        sums.w2[0, c] += common.product(scratch["hidden"][...], part, ((0,), (0,)))
        dh += common.product(part, whole.w2[c], ((1,), (1,)))
  if made.to_hidden is not None:
    made.to_hidden[...] = dh
  if whole.w1 is None:
    return jnp.zeros((), jnp.float32)
  x = common.newest_rows(shape, rows.origin, rows.sources[-1], block_start)
  z, inverse = common.pre_activation(x, whole.w1[...], shape.epsilon)
  _, slope = common.activation_and_slope(z, shape.activation)
  dz = dh * slope
  along = jnp.sum(dz * z, axis=-1, keepdims=True) / shape.width
  scaled = (dz * inverse).astype(shape.dtype)
  sums.w1[0, 0] += common.product(x, scaled, ((0,), (0,)))
  return common.product(scaled, whole.w1[...], ((1,), (1,))) - x.astype(jnp.float32) * (inverse**2 * along)
