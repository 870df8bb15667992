"""The fused forward pass: each source read once, each stream written once."""

import jax
from jax.experimental import pallas as pl

from maxtext_mudd.kernels import tpu_common as common
from maxtext_mudd.kernels.tpu_common import GROUP, Operands, Origin, Shape


def forward(shape: Shape, sources, origin: Origin, operands: Operands, *, interpret):
  """C streams [rows,D] of N sources [rows,D], the newest last."""

  def index(i):
    return i, 0

  ways = operands.a.shape[0]
  streams = [common.row_array(shape)] * ways
  rows = (sources, origin)
  (streams,) = pl.pallas_call(
    lambda *refs: _body(shape, *refs),
    grid=(shape.blocks,),
    in_specs=[*common.row_specs(shape, rows, index), common.whole_specs(operands)],
    out_specs=(common.row_specs(shape, streams, index),),
    out_shape=(streams,),
    scratch_shapes=[common.factors_scratch(shape, ways, len(sources)), common.group_scratch(shape, ways, len(sources))],
    compiler_params=common.compiler_params("parallel"),
    interpret=interpret,
    name="depth_aggregate_forward",
  )(*rows, operands)
  return streams


def _body(shape: Shape, sources, origin, operands, streams, factors, of_group):
  block_start = pl.program_id(0) * shape.block
  h = common.hidden(shape, operands, origin, sources[-1], block_start)
  common.fill_factors(factors, shape, h, operands, len(streams))

  def group(g, _):
    rows = pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)
    of_group[...] = factors[g].astype(shape.dtype)
    for columns in common.chunks(shape.width):
      stacked = common.stack_rows(shape, sources, rows, block_start + g * GROUP, columns)
      write_streams(streams, rows, columns, common.mix(of_group[...], stacked, len(streams)))
    return 0

  jax.lax.fori_loop(0, shape.block // GROUP, group, 0)


def write_streams(streams, rows, columns, mixed):
  for c, stream in enumerate(streams):
    stream[rows, columns] = mixed[c * GROUP : (c + 1) * GROUP].astype(stream.dtype)
