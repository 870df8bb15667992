"""The fused forward pass on a buffer: each valid entry read once (the newest twice), each stream written once."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from maxtext_mudd.kernels import tpu_buffer_common as buffers
from maxtext_mudd.kernels import tpu_common as common
from maxtext_mudd.kernels.tpu_buffer_common import BufferShape
from maxtext_mudd.kernels.tpu_common import GROUP, Operands, Origin


def forward(shape: BufferShape, count, buffer, origin: Origin, operands: Operands, *, interpret):
  """C streams [rows,D] of the first `count` entries of a buffer [S,rows,D].

  Args:
    count: int32 [1].
    origin: of arrays [rows,n]; empty where the weights are made from entry count - 1, or static.
    operands: `w2` [G,C,K,8n] and `a` [G,C,1,8n] by group of n entries.
  """

  def row_block(i):
    return i

  newest, newest_spec = buffers.newest_of(shape, row_block, buffer, origin, operands)
  ways = operands.a.shape[1]
  scratch = {
    "sums": pltpu.VMEM((ways, shape.block, shape.width), jnp.float32),
    "factors": common.factors_scratch(shape, ways, shape.slots),
  }
  if operands.w2 is not None:
    scratch["h"] = pltpu.VMEM((shape.block, operands.w2.shape[2]), shape.dtype)
  (streams,) = pl.pallas_call(
    functools.partial(_body, shape),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(shape.blocks, shape.groups),
      in_specs=[
        buffers.slot_specs(shape, row_block),
        newest_spec,
        buffers.row_specs(shape, row_block, origin),
        common.whole_specs(operands),
      ],
      out_specs=([buffers.row_spec(shape, row_block)] * ways,),
      scratch_shapes=[scratch],
    ),
    out_shape=([common.row_array(shape)] * ways,),
    compiler_params=common.compiler_params("parallel", "arbitrary"),
    interpret=interpret,
    name="depth_aggregate_buffer_forward",
  )(count, [buffer] * shape.slots, newest, origin, operands)
  return streams


def _body(shape: BufferShape, count, slots, newest, origin, operands, streams, scratch):
  block_start = pl.program_id(0) * shape.block
  group = pl.program_id(1)
  left = count[0] - group * shape.slots  # valid entries from this group on
  sums = scratch["sums"]

  @pl.when(group == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)
    if operands.w2 is not None:
      scratch["h"][...] = common.hidden(shape, operands, origin, newest, block_start)

  @pl.when(left > 0)
  def _():
    h = None if operands.w2 is None else scratch["h"][...]
    buffers.fill_factors(scratch["factors"], shape, h, operands, group)

    def eight_tokens(i, _):
      rows = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
      factors = scratch["factors"][i].astype(shape.dtype)
      for columns in common.chunks(shape.width):
        stacked = buffers.stack_slots(shape, slots, rows, block_start + i * GROUP, left, columns)
        mixed = common.mix(factors, stacked, len(streams))
        for c in range(len(streams)):
          sums[c, rows, columns] += mixed[c * GROUP : (c + 1) * GROUP]
      return 0

    jax.lax.fori_loop(0, shape.block // GROUP, eight_tokens, 0)

  @pl.when((left > 0) & (left <= shape.slots))
  def _():
    for c, stream in enumerate(streams):
      stream[...] = sums[c].astype(shape.dtype)
