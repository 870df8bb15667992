"""What several aggregates send to the sources they share, in one pass: each gradient sum read and written once."""

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from maxtext_mudd.kernels import tpu_common as common
from maxtext_mudd.kernels.tpu_common import GROUP, Operands, Origin, Shape


class Sent(NamedTuple):
  """The gradients [rows,D] of one aggregate's C streams, and what its weights for the shared sources are made from."""

  gradients: list
  origin: Origin
  operands: Operands


def push(shape: Shape, sent: list[Sent], totals, count: int, *, interpret):
  """Adds to the gradient sums `totals` of `count` sources, [rows,D] each; None: they start here."""

  def index(i):
    return i, 0

  ways = sum(len(one.gradients) for one in sent)
  out = [common.row_array(shape)] * count
  row_inputs = (totals, [one.gradients for one in sent], [one.origin for one in sent])
  operands = [one.operands for one in sent]
  (out,) = pl.pallas_call(
    lambda *refs: _body(shape, *refs),
    grid=(shape.blocks,),
    in_specs=[*common.row_specs(shape, row_inputs, index), common.whole_specs(operands)],
    out_specs=(common.row_specs(shape, out, index),),
    out_shape=(out,),
    scratch_shapes=[
      common.factors_scratch(shape, ways, count),
      common.group_scratch(shape, ways, count, transposed=True),
    ],
    input_output_aliases={} if totals is None else {j: j for j in range(count)},
    compiler_params=common.compiler_params("parallel"),
    interpret=interpret,
    name="depth_aggregate_push",
  )(*row_inputs, operands)
  return out


def _body(shape: Shape, totals, gradients, origins, operands, out, factors, of_group):
  block_start = pl.program_id(0) * shape.block
  arrays = [x for own_gradients in gradients for x in own_gradients]
  first = 0
  for own_gradients, origin, own in zip(gradients, origins, operands):
    h = common.hidden(shape, own, origin, None, block_start)
    common.fill_factors(factors, shape, h, own, len(arrays), first)
    first += len(own_gradients)

  def group(g, _):
    rows = pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)
    of_group[...] = factors[g].T.astype(shape.dtype)
    for columns in common.chunks(shape.width):
      coming = common.stack_rows(shape, arrays, rows, block_start + g * GROUP, columns)
      pushed = common.push(of_group[...], coming)
      for j, x in enumerate(out):
        own = pushed[j * GROUP : (j + 1) * GROUP]
        if totals is not None:
          own += totals[j][rows, columns].astype(jnp.float32)
        x[rows, columns] = own.astype(shape.dtype)
    return 0

  jax.lax.fori_loop(0, shape.block // GROUP, group, 0)
