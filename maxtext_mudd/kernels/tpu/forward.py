"""The fused forward pass: it reads each source once (a buffer's newest entry twice), and writes each stream once."""

import functools

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from maxtext_mudd.kernels.tpu import common
from maxtext_mudd.kernels.tpu.common import Recipe, RowWeights, Shape, WholeWeights


def forward(shape: Shape, recipe: Recipe, count, sources, rows: RowWeights, whole: WholeWeights, *, interpret):
  """Runs the kernel.

  Args:
    shape: sizes of the call.
    recipe: how the weights are computed.
    count: number of valid entries of a buffer, int32 [1]; None for a list.
    sources: N arrays [rows,D], or a buffer [S,rows,D].
    rows: operands of the weights that are read by blocks of rows.
    whole: operands of the weights that are read as a whole.

  Returns:
    C streams [rows,D].
  """

  def row_block(i, *_):
    return i

  def group(_, g, *__):
    return g

  scalars, newest, newest_spec = [], None, None
  if shape.is_buffer:
    scalars = [count]
    if whole.w1 is not None and rows.newest is None:
      newest, newest_spec = common.newest_of_buffer(shape, sources, row_block)
    sources = [sources] * shape.slots
  streams = [common.row_array(shape)] * shape.ways
  scratch = {"factors": common.factors_scratch(shape), "tile": common.tile_scratch(shape)}
  if shape.is_buffer:
    scratch["sums"] = pltpu.VMEM((shape.ways, shape.block, shape.width), jnp.float32)
    if whole.w2 is not None:
      scratch["h"] = pltpu.VMEM((shape.block, whole.w2.shape[2]), shape.dtype)
  (streams,) = pl.pallas_call(
    functools.partial(_body, shape, recipe),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(shape.blocks, shape.groups),
      in_specs=[
        common.source_specs(shape, row_block),
        newest_spec,
        common.weight_specs(shape, rows, row_block, group),
        common.whole_specs(whole),
      ],
      out_specs=(common.row_specs(shape, streams, row_block),),
      scratch_shapes=[scratch],
    ),
    out_shape=(streams,),
    compiler_params=common.compiler_params("parallel", "arbitrary"),
    interpret=interpret,
    name="depth_aggregate_forward",
  )(*scalars, sources, newest, rows, whole)
  return streams


def _body(shape: Shape, recipe: Recipe, *refs):
  *count, sources, newest, rows, whole, streams, scratch = refs
  block_start = pl.program_id(0) * shape.block
  if not shape.is_buffer:
    h, *_ = common.activations(shape, recipe, rows, whole, sources[recipe.source], block_start)
    common.fill_factors(scratch["factors"], shape, recipe, rows, whole, h, block_start)
    mix_block(shape, block_start, sources, streams, scratch["factors"], scratch["tile"], whole.channels)
    return
  group, sums = pl.program_id(1), scratch["sums"]
  num_valid = count[0][0] - group * shape.slots  # valid entries in this group and in later ones

  @pl.when(group == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)
    if whole.w2 is not None:
      scratch["h"][...], *_ = common.activations(shape, recipe, rows, whole, newest, block_start)

  @pl.when(num_valid > 0)
  def _():
    h = None if whole.w2 is None else scratch["h"][...]
    common.fill_factors(scratch["factors"], shape, recipe, rows, whole, h, block_start, group)
    mix_block(shape, block_start, sources, sums, scratch["factors"], scratch["tile"], whole.channels, group, num_valid)

  @pl.when((num_valid > 0) & (num_valid <= shape.slots))
  def _():
    for c, stream in enumerate(streams):
      stream[...] = sums[c].astype(shape.dtype)


def mix_block(shape: Shape, block_start, sources, streams, factors, tile, channels, group=0, num_valid=None):
  """Computes the streams of a block of rows.

  Args:
    streams: where they are written: C arrays [block,D]; for one group of a buffer, float32 sums [C,block,D].
    channels: as in `WholeWeights`; None: zeros.
    num_valid: number of valid entries in this group of a buffer and later ones; None for a list.
  """

  def eight_tokens(g, rows):
    tile[...] = factors[g].astype(shape.dtype)
    for columns in common.chunks(shape.width):
      stacked = common.stack_rows(shape, sources, rows, block_start + g * common.TOKENS, columns, num_valid)
      mixed = common.mix_tile(tile[...], stacked, shape.ways)
      mixed = [common.eight_rows(mixed, c) for c in range(shape.ways)]
      for k in range(shape.slots) if channels is not None else ():
        source = common.eight_rows(stacked, k).astype(jnp.float32)
        mixed = [x + channels[group, c, pl.ds(k, 1), columns] * source for c, x in enumerate(mixed)]
      for c, stream in enumerate(mixed):
        if num_valid is None:
          write_stream(streams[c], rows, columns, stream)
        else:
          streams[c, rows, columns] += stream

  common.for_each_eight_tokens(shape, eight_tokens)


def write_stream(stream, rows, columns, mixed):
  stream[rows, columns] = mixed.astype(stream.dtype)
