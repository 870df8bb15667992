"""Adds the gradients that several aggregates send to the sources they share, in one pass: each sum is read and written
once."""

import functools

from jax.experimental import pallas as pl
import jax.numpy as jnp

from maxtext_mudd.kernels.tpu import common
from maxtext_mudd.kernels.tpu.common import Recipe, RowWeights, Shape, WholeWeights


def push(
  shape: Shape,
  recipes: list[Recipe],
  gradients: list[list],
  rows: list[RowWeights],
  whole: list[WholeWeights],
  totals,
  *,
  interpret,
):
  """The sums [rows,D] of the gradients of `shape.sources` sources.

  Args:
    gradients: of the C streams [rows,D] of each aggregate; `rows` and `whole` are its weights for these sources.
    totals: what the sums begin with, [rows,D] each; None: zeros.
  """

  def row_block(i):
    return i

  def group(_):
    return 0

  sums = [common.row_array(shape)] * shape.sources
  (sums,) = pl.pallas_call(
    functools.partial(_body, shape, recipes),
    grid=(shape.blocks,),
    in_specs=[
      common.row_specs(shape, totals, row_block),
      common.row_specs(shape, gradients, row_block),
      [common.weight_specs(shape, one, row_block, group) for one in rows],
      common.whole_specs(whole),
    ],
    out_specs=(common.row_specs(shape, sums, row_block),),
    out_shape=(sums,),
    scratch_shapes=[common.factors_scratch(shape), common.tile_scratch(shape, transposed=True)],
    input_output_aliases={} if totals is None else {j: j for j in range(shape.sources)},
    compiler_params=common.compiler_params("parallel"),
    interpret=interpret,
    name="depth_aggregate_push",
  )(totals, gradients, rows, whole)
  return sums


def _body(shape: Shape, recipes, totals, gradients, rows, whole, sums, factors, tile):
  block_start = pl.program_id(0) * shape.block
  streams = [stream for of_one in gradients for stream in of_one]
  first = 0
  for recipe, rows_of_one, whole_of_one in zip(recipes, rows, whole):
    h, *_ = common.activations(shape, recipe, rows_of_one, whole_of_one, None, block_start)
    common.fill_factors(factors, shape, recipe, rows_of_one, whole_of_one, h, block_start, first=first)
    first += recipe.ways

  def eight_tokens(g, at):
    tile[...] = factors[g].T.astype(shape.dtype)
    for columns in common.chunks(shape.width):
      coming = common.stack_rows(shape, streams, at, block_start + g * common.TOKENS, columns)
      pushed = common.push_tile(tile[...], coming)
      for j, x in enumerate(sums):
        total = common.of_row(pushed, j)
        if totals is not None:
          total += totals[j][at, columns].astype(jnp.float32)
        x[at, columns] = total.astype(shape.dtype)

  common.for_each_eight_tokens(shape, eight_tokens)
