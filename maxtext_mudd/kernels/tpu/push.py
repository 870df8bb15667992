"""The fused push pass: it adds what several aggregates contribute to the gradients of the same older sources.

It reads and writes each gradient accumulator once.
"""

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
  """Runs the kernel.

  Args:
    shape: sizes of the call; `shape.ways` counts the streams of all aggregates.
    recipes: how the weights of each aggregate are computed.
    gradients: gradients of the C streams [rows,D] of each aggregate.
    rows: for each aggregate, operands of its weights for these sources that are read by blocks of rows.
    whole: for each aggregate, operands of its weights for these sources that are read as a whole.
    totals: gradient accumulators [rows,D] of the sources; None: zeros.

  Returns:
    The accumulators.
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
      [common.weight_specs(shape, weights, row_block, group) for weights in rows],
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
  all_gradients = [gradient for of_aggregate in gradients for gradient in of_aggregate]
  first = 0
  for recipe, row_weights, whole_weights in zip(recipes, rows, whole):
    h, *_ = common.activations(shape, recipe, row_weights, whole_weights, None, block_start)
    common.fill_factors(factors, shape, recipe, row_weights, whole_weights, h, block_start, first=first)
    first += recipe.ways

  def eight_tokens(g, token_rows):
    tile[...] = factors[g].T.astype(shape.dtype)
    for columns in common.chunks(shape.width):
      stacked = common.stack_rows(shape, all_gradients, token_rows, block_start + g * common.TOKENS, columns)
      grad_sources = common.push_tile(tile[...], stacked)
      for j, x in enumerate(sums):
        total = common.eight_rows(grad_sources, j)
        if totals is not None:
          total += totals[j][token_rows, columns].astype(jnp.float32)
        x[token_rows, columns] = total.astype(shape.dtype)

  common.for_each_eight_tokens(shape, eight_tokens)
