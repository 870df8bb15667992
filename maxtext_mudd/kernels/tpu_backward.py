"""The fused backward pass: each source and each stream gradient read once, each source gradient written once."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from maxtext_mudd.kernels import tpu_common as common
from maxtext_mudd.kernels.tpu_common import GROUP, Shape

CORES = 2  # of a v4 or v5p: each adds up the weight gradients of its own row blocks


def backward(shape: Shape, sources, newest, gradients, w1, w2_plain, w2, a, *, interpret):
  """Gradients of the sources [rows,D] and of `newest` (None: part of the last source's), and, in float32, of W1 [D,K],
  W2 [C,K,N] and a [C,1,N].

  Args:
    gradients: of the C streams, [rows,D].
    w2_plain: W2 [C,K,N]; `w2` and `a` have repeated columns, as in the forward pass.
  """
  cores = CORES if shape.blocks % CORES == 0 else 1
  steps = shape.blocks // cores
  row_block = pl.BlockSpec((shape.block, shape.width), lambda core, i: (core * steps + i, 0))

  def whole(x):
    return pl.BlockSpec(x.shape, lambda core, i: (0,) * x.ndim)

  def sums(dimensions):
    """A float32 array for each core, which adds to it at every step."""
    spec = pl.BlockSpec((1, *dimensions), lambda core, i: (core,) + (0,) * len(dimensions))
    return spec, jax.ShapeDtypeStruct((cores, *dimensions), jnp.float32)

  weights = [w1, w2_plain, w2, a] if shape.hidden else [a]
  rows_in = [*sources, *([newest] if shape.has_newest else []), *gradients]
  specs = [row_block] * len(rows_in) + [whole(x) for x in weights]
  made = shape.sources + (1 if shape.has_newest else 0)
  reduced = [(shape.ways, 1, shape.sources)]
  if shape.hidden:
    reduced += [(shape.width, shape.hidden), (shape.ways, shape.hidden, shape.sources)]
  sum_specs, sum_shapes = zip(*(sums(dimensions) for dimensions in reduced))
  results = pl.pallas_call(
    lambda *refs: _body(shape, steps, *refs),
    grid=(cores, steps),
    in_specs=specs,
    out_specs=[*[row_block] * made, *sum_specs],
    out_shape=[*[jax.ShapeDtypeStruct((shape.rows, shape.width), shape.dtype)] * made, *sum_shapes],
    scratch_shapes=[
      pltpu.VMEM((shape.ways, shape.block, shape.lanes), jnp.float32),
      pltpu.VMEM((shape.ways, shape.block, shape.sources), jnp.float32),
      pltpu.VMEM((shape.block, shape.width), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=common.VMEM_LIMIT
    ),
    interpret=interpret,
    name="depth_aggregate_backward",
  )(*rows_in, *weights)
  per_row, added = results[:made], [x.sum(0) for x in results[made:]]
  source_gradients = list(per_row[: shape.sources])
  newest_gradient = per_row[shape.sources] if shape.has_newest else None
  da, dw1, dw2 = (*added, None, None)[:3]
  return source_gradients, newest_gradient, dw1, dw2, da


def _body(shape: Shape, steps: int, *refs):
  refs = list(refs)

  def take(count):
    return [refs.pop(0) for _ in range(count)]

  sources = take(shape.sources)
  (newest,) = take(1) if shape.has_newest else sources[-1:]
  gradients = take(shape.ways)
  w1, w2_plain, w2 = take(3) if shape.hidden else (None, None, None)
  (a,) = take(1)
  source_gradients = take(shape.sources)
  newest_gradient = take(1) if shape.has_newest else []
  (da,) = take(1)
  dw1, dw2 = take(2) if shape.hidden else (None, None)
  weights, weight_gradients, last = refs

  step = pl.program_id(1)
  block_start = (pl.program_id(0) * steps + step) * shape.block

  @pl.when(step == 0)
  def _():
    for total in (da, dw1, dw2):
      if total is not None:
        total[...] = jnp.zeros_like(total)

  h = None
  if shape.hidden:
    normed, inverse, z = common.hidden(shape, common.valid(shape, block_start, newest[...]), w1[...])
    h_wide, slope = jax.jvp(lambda z: common.activate(z, shape.activation), (z,), (jnp.ones_like(z),))
    h = h_wide.astype(shape.dtype)
  for c in range(shape.ways):
    made = common.repeated_weights(h, w2[c] if shape.hidden else None, a[c])
    weights[c] = jnp.broadcast_to(made, (shape.block, shape.lanes))

  mask = common.mask(shape)
  source = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (shape.lanes, shape.sources), 0), GROUP)
  one_hot = (source == jax.lax.broadcasted_iota(jnp.int32, (shape.lanes, shape.sources), 1)).astype(jnp.float32)

  def group(g, _):
    rows = pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)
    first = block_start + g * GROUP
    stacked = jnp.concatenate([common.valid(shape, first, x[rows, :]) for x in sources], axis=0)
    coming = jnp.concatenate([common.valid(shape, first, x[rows, :]) for x in gradients], axis=0)
    mixing = jnp.concatenate([jnp.where(mask, weights[c, rows, :], 0.0) for c in range(shape.ways)], axis=0)
    parts = common.halves(mixing, shape.dtype)
    pushed = common.product(
      jnp.concatenate(parts, axis=0), jnp.concatenate([coming] * len(parts), axis=0), ((0,), (0,))
    )
    for j, x in enumerate(source_gradients):
      of_source = pushed[j * GROUP : (j + 1) * GROUP]
      if j == shape.sources - 1:
        last[rows, :] = of_source  # what the weights send to the newest is still to come
      else:
        x[rows, :] = of_source.astype(shape.dtype)
    pairs = common.product(coming, stacked, ((1,), (1,)))
    for c in range(shape.ways):
      own = jnp.where(mask, pairs[c * GROUP : (c + 1) * GROUP], 0.0)
      weight_gradients[c, rows, :] = common.product(own, one_hot)
    return 0

  jax.lax.fori_loop(0, shape.block // GROUP, group, 0)

  dh = jnp.zeros((shape.block, shape.hidden), jnp.float32) if shape.hidden else None
  for c in range(shape.ways):
    dw = weight_gradients[c]
    da[0, c] += jnp.sum(dw, axis=0, keepdims=True)
    if shape.hidden:
      dw2[0, c] += common.product(h.astype(jnp.float32), dw, ((0,), (0,)))
      dh += common.product(dw, w2_plain[c].astype(jnp.float32), ((1,), (1,)))
  to_newest = jnp.zeros((), jnp.float32)
  if shape.hidden:
    dz = (dh * slope).astype(shape.dtype)
    dw1[0] += common.product(normed, dz, ((0,), (0,)))
    d_normed = common.product(dz, w1[...], ((1,), (1,)))
    wide = normed.astype(jnp.float32)
    to_newest = inverse * (d_normed - wide * jnp.mean(d_normed * wide, axis=-1, keepdims=True))
  if shape.has_newest:
    newest_gradient[0][...] = jnp.broadcast_to(to_newest, last.shape).astype(shape.dtype)
    to_newest = jnp.zeros((), jnp.float32)
  source_gradients[-1][...] = (last[...] + to_newest).astype(shape.dtype)
