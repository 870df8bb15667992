"""The fused backward pass on a buffer: each valid entry (the newest twice) and each stream gradient read once, the
gradient of each entry written once."""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from maxtext_mudd.kernels import tpu_buffer_common as buffers
from maxtext_mudd.kernels import tpu_common as common
from maxtext_mudd.kernels.tpu_buffer_common import BufferShape
from maxtext_mudd.kernels.tpu_common import GROUP, Operands, Origin

SUMMED = 512  # columns per product in a sum of products


class Sums(NamedTuple):
  """Gradients of a [G,1,C·n], W2 [G,K,C·n] and W1 [D,K], float32, by group of n entries and one per core."""

  a: jax.Array
  w2: jax.Array | None = None
  w1: jax.Array | None = None


def backward(
  shape: BufferShape, count, buffer, gradients, origin: Origin, operands: Operands, w2, totals, *, interpret
):
  """Gradients of the buffer [S,rows,D], of `origin`, and `Sums`.

  Args:
    gradients: of the C streams, [rows,D].
    w2: W2 [G,K,C·n]; the rest as in the forward pass.
    totals: [S,rows,D], to which the gradients of valid entries are added in place; nothing else of it is touched, but
      that entries of the last valid group may change that are not valid. None: others get zero.
  """
  cores = common.CORES if shape.blocks % common.CORES == 0 else 1
  steps = shape.blocks // cores

  def row_block(core, step):
    return core * steps + step

  def for_each_core(*dimensions):
    return jax.ShapeDtypeStruct((cores, *dimensions), jnp.float32)

  def of_core(x):
    return pl.BlockSpec((1, *x.shape[1:]), lambda core, *_: (core,) + (0,) * (x.ndim - 1))

  row_spec = buffers.row_spec(shape, row_block)
  newest, newest_spec = buffers.newest_of(shape, row_block, buffer, origin, operands)
  groups, ways, _, lanes = operands.a.shape
  sums = Sums(for_each_core(groups, 1, ways * shape.slots))
  scratch = {
    "factors": common.factors_scratch(shape, ways, shape.slots),
    "pairs": pltpu.VMEM((ways, shape.block, lanes), jnp.float32),
  }
  to_origin = Origin(
    newest=None if origin.newest is None else common.row_array(shape),
    hidden=None if origin.hidden is None else jax.ShapeDtypeStruct(origin.hidden.shape, jnp.float32),
  )
  if w2 is not None:
    w1 = None if operands.w1 is None else for_each_core(*operands.w1.shape)
    sums = Sums(sums.a, for_each_core(*w2.shape), w1)
    for name, dtype in (("h", shape.dtype), ("to_h", jnp.float32)):
      scratch[name] = pltpu.VMEM((shape.block, w2.shape[1]), dtype)
  if totals is None:
    to_buffer_spec = pl.BlockSpec(
      (shape.slots, shape.block, shape.width), lambda core, step, group, _: (group, row_block(core, step), 0)
    )
    totals_spec = None
  else:
    totals_spec = to_buffer_spec = buffers.group_spec(shape, row_block)
  to_buffer, to_origin, sums = pl.pallas_call(
    functools.partial(_body, shape, steps),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(cores, steps, groups),
      in_specs=[
        totals_spec,
        buffers.slot_specs(shape, row_block),
        newest_spec,
        [row_spec] * ways,
        buffers.row_specs(shape, row_block, origin),
        common.whole_specs(operands),
        common.whole_specs(w2),
      ],
      out_specs=(to_buffer_spec, buffers.row_specs(shape, row_block, to_origin), jax.tree.map(of_core, sums)),
      scratch_shapes=[scratch],
    ),
    out_shape=(jax.ShapeDtypeStruct(buffer.shape, shape.dtype), to_origin, sums),
    input_output_aliases={} if totals is None else {1: 0},
    compiler_params=common.compiler_params("parallel", "arbitrary", "arbitrary"),
    interpret=interpret,
    name="depth_aggregate_buffer_backward",
  )(count, totals, [buffer] * shape.slots, newest, gradients, origin, operands, w2)
  return to_buffer, to_origin, jax.tree.map(lambda x: x.sum(0), sums)


def _body(
  shape: BufferShape,
  steps,
  count,
  totals,
  slots,
  newest,
  gradients,
  origin,
  operands,
  w2,
  to_buffer,
  to_origin,
  sums,
  scratch,
):
  step, group = pl.program_id(1), pl.program_id(2)
  block_start = (pl.program_id(0) * steps + step) * shape.block
  left = count[0] - group * shape.slots  # valid entries from this group on

  @pl.when((step == 0) & (group == 0))
  def _():
    for total in jax.tree.leaves(sums):
      total[...] = jnp.zeros_like(total)

  if w2 is not None:

    @pl.when(group == 0)
    def _():
      scratch["h"][...] = common.hidden(shape, operands, origin, newest, block_start)
      scratch["to_h"][...] = jnp.zeros_like(scratch["to_h"])

  @pl.when(left > 0)
  def _():
    h = None if w2 is None else scratch["h"][...]
    buffers.fill_factors(scratch["factors"], shape, h, operands, group)
    _products(shape, block_start, left, slots, gradients, totals, to_buffer, scratch)
    dw, da = _weight_gradients(shape, scratch["pairs"])
    sums.a[0, group] += da
    if w2 is not None:
      sums.w2[0, group] += common.product(h.astype(jnp.float32), dw, ((0,), (0,)))
      scratch["to_h"][...] += common.product(dw, w2[group].astype(jnp.float32), ((1,), (1,)))

  if totals is None:
    for slot in range(shape.slots):

      @pl.when(slot >= left)
      def _(slot=slot):
        to_buffer[slot] = jnp.zeros(to_buffer.shape[1:], shape.dtype)

  if w2 is not None:

    @pl.when((left > 0) & (left <= shape.slots))  # the newest is here, and the gradients of all weights are known
    def _():
      if to_origin.hidden is not None:
        to_origin.hidden[...] = scratch["to_h"][...]
        return
      x = common.newest_rows(shape, origin, newest, block_start)
      z, inverse = common.pre_activation(x, operands.w1[...], shape.epsilon)
      _, slope = common.activation_and_slope(z, shape.activation)
      dz = scratch["to_h"][...] * slope
      along = jnp.sum(dz * z, axis=-1, keepdims=True) / shape.width
      scaled = (dz * inverse).astype(shape.dtype)
      sums.w1[0] += common.product(x, scaled, ((0,), (0,)))
      through = common.product(scaled, operands.w1[...], ((1,), (1,))) - x.astype(jnp.float32) * (inverse**2 * along)
      if to_origin.newest is not None:
        to_origin.newest[...] = through.astype(shape.dtype)
      else:
        to_buffer[left - 1] = (to_buffer[left - 1].astype(jnp.float32) + through).astype(shape.dtype)


def _products(shape: BufferShape, block_start, left, slots, gradients, totals, to_buffer, scratch):
  """The products with the entries of one group, eight tokens at a time."""

  def eight_tokens(i, _):
    rows = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
    first = block_start + i * GROUP
    factors = scratch["factors"][i].T.astype(shape.dtype)
    pairs = jnp.zeros((GROUP * shape.slots, GROUP * len(gradients)), jnp.float32)
    for columns in common.chunks(shape.width, SUMMED):
      coming = common.stack_rows(shape, gradients, rows, first, columns)
      stacked = buffers.stack_slots(shape, slots, rows, first, left, columns)
      pairs += common.product(stacked, coming, ((1,), (1,)))
    for columns in common.chunks(shape.width):
      pushed = common.push(factors, common.stack_rows(shape, gradients, rows, first, columns))
      for slot in range(shape.slots):
        own = pushed[slot * GROUP : (slot + 1) * GROUP]
        own = own if totals is None else own + totals[slot, rows, columns].astype(jnp.float32)
        to_buffer[slot, rows, columns] = own.astype(shape.dtype)
    pairs = pairs.T
    for c in range(len(gradients)):
      scratch["pairs"][c, rows, :] = pairs[c * GROUP : (c + 1) * GROUP]
    return 0

  jax.lax.fori_loop(0, shape.block // GROUP, eight_tokens, 0)


def _weight_gradients(shape: BufferShape, pairs):
  """Gradients of the weights of one group, [block,C·n], and their exact sum over tokens, [1,C·n]; from dO @ X^T
  [C,block,8n] of all pairs of eight tokens."""
  lanes = GROUP * shape.slots
  own = common.own_token(shape.block, lanes)
  slot = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (lanes, shape.slots), 0), GROUP)
  one_hot = (slot == jax.lax.broadcasted_iota(jnp.int32, (lanes, shape.slots), 1)).astype(shape.dtype)
  made, summed = [], []
  for c in range(pairs.shape[0]):
    of_own = jnp.where(own, pairs[c], 0.0)
    made.append(sum(common.product(part, one_hot) for part in common.halves(of_own, shape.dtype)))
    summed.append(common.product(jnp.sum(of_own, axis=0, keepdims=True), one_hot.astype(jnp.float32)))
  return jnp.concatenate(made, axis=1), jnp.concatenate(summed, axis=1)
