"""The fused forward pass: each source read once, each stream written once."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from maxtext_mudd.kernels import tpu_common as common
from maxtext_mudd.kernels.tpu_common import GROUP, Shape


def forward(shape: Shape, sources, newest, w1, w2, a, *, interpret):
  """C streams [rows,D] of N sources [rows,D]; w1 [D,K], w2 [C,K,8N] and a [C,1,8N] with repeated columns."""
  row_block = pl.BlockSpec((shape.block, shape.width), lambda i: (i, 0))

  def whole(x):
    return pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)

  weights = [a] if w1 is None else [w1, w2, a]
  inputs = [*sources, *([newest] if shape.has_newest else []), *weights]
  specs = [row_block] * (len(inputs) - len(weights)) + [whole(x) for x in weights]
  scratch = [pltpu.VMEM((shape.ways, shape.block, shape.lanes), jnp.float32)]
  return pl.pallas_call(
    lambda *refs: _body(shape, *refs),
    grid=(shape.blocks,),
    in_specs=specs,
    out_specs=[row_block] * shape.ways,
    out_shape=[jax.ShapeDtypeStruct((shape.rows, shape.width), shape.dtype)] * shape.ways,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=common.VMEM_LIMIT),
    interpret=interpret,
    name="depth_aggregate_forward",
  )(*inputs)


def _body(shape: Shape, *refs):
  refs = list(refs)
  sources = [refs.pop(0) for _ in range(shape.sources)]
  newest = refs.pop(0) if shape.has_newest else sources[-1]
  w1, w2 = (refs.pop(0), refs.pop(0)) if shape.hidden else (None, None)
  a = refs.pop(0)
  outputs = [refs.pop(0) for _ in range(shape.ways)]
  (weights,) = refs
  step = pl.program_id(0)

  h = None
  if shape.hidden:
    _, _, z = common.hidden(shape, common.valid(shape, step * shape.block, newest[...]), w1[...])
    h = common.activate(z, shape.activation).astype(shape.dtype)
  for c in range(shape.ways):
    made = common.repeated_weights(h, w2[c] if shape.hidden else None, a[c])
    weights[c] = jnp.broadcast_to(made, (shape.block, shape.lanes))

  mask = common.mask(shape)

  def group(g, _):
    rows = pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)
    first = step * shape.block + g * GROUP
    mixing = jnp.concatenate([jnp.where(mask, weights[c, rows, :], 0.0) for c in range(shape.ways)], axis=0)
    stacked = jnp.concatenate([common.valid(shape, first, x[rows, :]) for x in sources], axis=0)
    parts = common.halves(mixing, shape.dtype)
    mixed = common.product(jnp.concatenate(parts, axis=0), stacked)
    height = shape.ways * GROUP
    mixed = sum(mixed[k * height : (k + 1) * height] for k in range(len(parts)))
    for c, output in enumerate(outputs):
      output[rows, :] = mixed[c * GROUP : (c + 1) * GROUP].astype(shape.dtype)
    return 0

  jax.lax.fori_loop(0, shape.block // GROUP, group, 0)
