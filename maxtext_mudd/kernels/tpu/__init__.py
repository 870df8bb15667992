"""The passes of `mix` as fused TPU kernels, on the arrays of one device.

This file lays operands out for the kernels, chooses block sizes, and brings results back into the form of `mix`. The
kernels are in `forward.py`, `backward.py` and `push.py`. They compute the weights of a `WeightMLP` in VMEM, from rows
that they have loaded for the product with the sources. So these weights cost no memory traffic.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxtext_mudd.kernels.operands import Buffer, Gradients, Pending, Sources
from maxtext_mudd.kernels.tpu import backward as _backward
from maxtext_mudd.kernels.tpu import common
from maxtext_mudd.kernels.tpu import forward as _forward
from maxtext_mudd.kernels.tpu import push as _push
from maxtext_mudd.kernels.tpu.common import TOKENS, Recipe, RowWeights, Shape, WholeWeights
from maxtext_mudd.kernels.weights import (
  ChannelWeights,
  HiddenLayer,
  WeightMLP,
  Weights,
  map_columns,
  number_of_ways,
)

DTYPES = ("bfloat16", "float32")

# Strict interpretation: memory that was never written reads as NaN, and races are reported.
STRICTLY = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True, out_of_bounds_reads="uninitialized")


def forward(sources: Sources, weights: Weights, *, interpret) -> list[Float[Array, "B T D"]]:
  """The streams; arguments as in `xla.forward`."""
  ways = number_of_ways(weights)

  def arrays(slots, size):
    # A buffer needs float32 sums. VMEM holds one copy of them, and two copies of the blocks of inputs and outputs.
    sums = 2 * ways // size if isinstance(sources, Buffer) else 0
    return slots + 1 + ways + sums

  shape = _shape(sources, ways, arrays)
  flat, count = _flat(sources)
  rows, whole = _lay_out(shape, _without_invalid(sources, weights))
  streams = _forward.forward(shape, _recipe(weights), count, flat, rows, whole, interpret=interpret)
  return _unflatten(streams, _lead(sources))


def backward(
  sources: Sources,
  weights: Weights,
  gradients: Sequence[Float[Array, "B T D"]],
  near: tuple[int, ...] | None,
  totals: Sequence[Float[Array, "B T D"]] | Float[Array, "S B T D"] | None = None,
  recompute: Weights | None = None,
  *,
  keep_hidden: bool = False,
  interpret,
) -> Gradients:
  """Gradients of the near sources and of the weights; arguments as in `Passes.backward`.

  `near` is None for a buffer. For a list it ends with the newest source.
  """
  ways, lead = number_of_ways(weights), _lead(sources)
  is_mlp = isinstance(weights, WeightMLP)

  def arrays(slots, _):
    near_arrays = (1 if totals is None else 2) * (slots if near is None else len(near))
    newest_arrays = 2 if is_mlp and weights.newest is not None else 0
    recomputed_arrays = 0 if recompute is None else number_of_ways(recompute) + 1
    return slots + ways + near_arrays + newest_arrays + recomputed_arrays + (1 if near is None else 0)

  shape = _shape(sources, ways, arrays)
  flat, count = _flat(sources)
  weights = _without_invalid(sources, weights)
  near_weights = weights
  if near is not None and near != tuple(range(len(sources))):
    near_weights = map_columns(weights, lambda x: x[..., jnp.asarray(near)])
  near_shape = shape if near is None else dataclasses.replace(shape, sources=len(near), slots=len(near))
  rows, whole = _lay_out(near_shape, near_weights)
  recomputed_rows, recomputed_whole = (None, None) if recompute is None else _lay_out(shape, recompute)
  outputs, sums = _backward.backward(
    shape,
    _backward.BackwardPlan(
      _recipe(weights), near, None if recompute is None else _recipe(recompute), keep_hidden and is_mlp
    ),
    count,
    _backward.Rows(_flatten(totals), flat, _flatten(list(gradients)), None, rows, recomputed_rows),
    _backward.Whole(whole, _flat_w2(shape, weights), _flat_scale(shape, weights), recomputed_whole),
    interpret=interpret,
  )
  grad_sources = outputs.sources.reshape(sources.entries.shape) if near is None else _unflatten(outputs.sources, lead)
  grad_weights = _form_of_gradient(shape, weights, outputs, sums, lead)
  if isinstance(sources, Buffer):
    grad_weights = _without_invalid(sources, grad_weights)
  return Gradients(grad_sources, grad_weights, _unflatten(outputs.hidden, lead), _unflatten(outputs.streams, lead))


def push(
  pushed: Sequence[Pending], totals: Sequence[Float[Array, "B T D"]] | None, count: int, *, interpret
) -> list[Float[Array, "B T D"]]:
  """The gradient accumulators of `count` sources; arguments as in `Passes.push`."""
  recipes = [_recipe(aggregate.weights) for aggregate in pushed]
  ways = sum(recipe.ways for recipe in recipes)
  sums = count if totals is None else 2 * count
  shape = _shape(pushed[0].gradients, ways, lambda *_: ways + sums)
  shape = dataclasses.replace(shape, sources=count, slots=count)
  operands = [_lay_out(shape, aggregate.weights) for aggregate in pushed]
  outputs = _push.push(
    shape,
    recipes,
    [_flatten(aggregate.gradients) for aggregate in pushed],
    [rows for rows, _ in operands],
    [whole for _, whole in operands],
    _flatten(totals),
    interpret=interpret,
  )
  return _unflatten(outputs, _lead(pushed[0].gradients))


# ---------------------------------------------------------------- sources


def _lead(sources: Sources) -> tuple[int, int]:
  return sources.entries.shape[1:3] if isinstance(sources, Buffer) else sources[0].shape[:2]


def _flatten(tree):
  """[...,B,T,n] -> [...,B·T,n] of every array."""
  return jax.tree.map(lambda x: x.reshape(*x.shape[:-3], -1, x.shape[-1]), tree)


def _unflatten(tree, lead: tuple[int, int]):
  return jax.tree.map(lambda x: x.reshape(*lead, x.shape[-1]), tree)


def _flat(sources: Sources):
  """The sources [rows,D] or [S,rows,D]; and the number of valid entries as int32 [1], None for a list."""
  if isinstance(sources, Buffer):
    return _flatten(sources.entries), sources.count[None]
  return _flatten(list(sources)), None


def _shape(sources: Sources, ways: int, arrays: Callable[[int, int], int]) -> Shape:
  """The sizes of a call, and the block size that fits VMEM.

  Args:
    ways: number of streams.
    arrays: a function of (number of slots, bytes of one number). It returns the number of arrays [rows,D] of which a
      grid step holds a block.
  """
  is_buffer = isinstance(sources, Buffer)
  source = sources.entries[0] if is_buffer else sources[-1]
  number = len(sources.entries if is_buffer else sources)
  slots = min(common.SLOTS, number) if is_buffer else number
  batch, length, width = source.shape
  dtype = jnp.dtype(source.dtype)
  limit = common.BUFFER_BYTES if is_buffer else common.LIST_BYTES
  block = common.block_rows(batch * length, arrays(slots, dtype.itemsize), width, dtype, limit)
  return Shape(batch * length, width, ways, number, slots, block, dtype, is_buffer)


# ---------------------------------------------------------------- weights


def _recipe(weights: Weights) -> Recipe:
  ways = number_of_ways(weights)
  if isinstance(weights, WeightMLP):
    return Recipe(ways, weights.source, weights.activation, weights.epsilon, weights.cap)
  return Recipe(ways, cap=weights.cap if isinstance(weights, HiddenLayer) else None)


def _without_invalid(sources: Sources, weights: Weights) -> Weights:
  """The weights with zeros in the columns of entries that are not valid, even where these columns are NaN."""
  if not isinstance(sources, Buffer):
    return weights
  is_valid = jnp.arange(len(sources.entries)) < sources.count
  return map_columns(weights, lambda x: jnp.where(is_valid, x, 0))


def _by_group(shape: Shape, x):
  """[...,N] -> [G,...,n], with zeros after the last source."""
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, shape.groups * shape.slots - shape.sources)])
  return jnp.moveaxis(x.reshape(*x.shape[:-1], shape.groups, shape.slots), -2, 0)


def _by_source(shape: Shape, x):
  """[G,...,n] -> [...,N]."""
  x = jnp.moveaxis(x, 0, -2)
  return x.reshape(*x.shape[:-2], shape.groups * shape.slots)[..., : shape.sources]


def _lay_out(shape: Shape, weights: Weights) -> tuple[RowWeights, WholeWeights]:
  """Splits weights into operands that the kernels read by blocks of rows, and operands that they read as a whole."""
  if isinstance(weights, ChannelWeights):
    rows, whole = _lay_out(shape, weights.w[:, :, :, 0])
    if weights.a is None:
      return rows, whole
    return rows, whole._replace(channels=jnp.swapaxes(_by_group(shape, weights.a.astype(jnp.float32)), -2, -1))
  if not isinstance(weights, WeightMLP | HiddenLayer):
    by_group = _by_group(shape, weights.astype(jnp.float32))
    if weights.ndim == 2:
      return RowWeights(), WholeWeights(common.repeat_columns(by_group[:, :, None]))
    return RowWeights(array=by_group.reshape(shape.groups, shape.rows, -1)), WholeWeights()
  _, whole = _lay_out(shape, weights.a)
  w2 = jnp.swapaxes(_by_group(shape, weights.w2.astype(shape.dtype)), 1, 2)
  whole = whole._replace(w2=common.repeat_columns(w2))
  if weights.scale is not None:
    scale = _by_group(shape, weights.scale.astype(jnp.float32))
    whole = whole._replace(scale=common.repeat_columns(scale[:, :, None]))
  if isinstance(weights, HiddenLayer):
    return RowWeights(hidden=_flatten(weights.hidden)), whole
  return RowWeights(newest=_flatten(weights.newest)), whole._replace(w1=weights.w1.astype(shape.dtype))


def _flat_w2(shape: Shape, weights: Weights):
  """W2 as [G,K,C·n]; None for an array of weights."""
  if not isinstance(weights, WeightMLP | HiddenLayer):
    return None
  w2 = _by_group(shape, weights.w2.astype(shape.dtype))
  return w2.reshape(*w2.shape[:2], -1)


def _flat_scale(shape: Shape, weights: Weights):
  """The scale as [G,1,C·n]; None for weights without one."""
  if not isinstance(weights, WeightMLP | HiddenLayer) or weights.scale is None:
    return None
  return _by_group(shape, weights.scale.astype(jnp.float32)).reshape(shape.groups, 1, -1)


def _form_of_gradient(
  shape: Shape, weights: Weights, outputs: _backward.Outputs, sums: _backward.Sums, lead
) -> Weights:
  """The gradient of the weights, from the results of the kernel. It has the type of the weights."""

  def by_source(x):
    return _by_source(shape, x.reshape(*x.shape[:2], shape.ways, shape.slots))

  if outputs.weights.array is not None:
    grad_w = by_source(outputs.weights.array).reshape(*lead, shape.ways, shape.sources)
    if not isinstance(weights, ChannelWeights):
      return grad_w
    grad_a = None if sums.channels is None else _by_source(shape, jnp.swapaxes(sums.channels, -2, -1))
    return ChannelWeights(grad_w[:, :, :, None], grad_a)
  grad_a = _by_source(shape, sums.a.reshape(*sums.a.shape[:2], shape.slots, TOKENS).sum(-1))
  if not isinstance(weights, WeightMLP | HiddenLayer):
    return grad_a
  grad_scale = None if sums.scale is None else by_source(sums.scale)[0]
  weights = dataclasses.replace(weights, w2=by_source(sums.w2), a=grad_a, scale=grad_scale)
  if isinstance(weights, HiddenLayer):
    return dataclasses.replace(weights, hidden=_unflatten(outputs.weights.hidden, lead))
  return dataclasses.replace(weights, w1=sums.w1, newest=_unflatten(outputs.weights.newest, lead))
