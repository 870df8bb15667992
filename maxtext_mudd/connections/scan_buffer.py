"""Arrays that the blocks of scanned layers write entry by entry, kept once for the backward pass.

If JAX differentiated the loop over blocks, it would keep one copy of these arrays for each block. But a block changes
few entries. So the backward pass starts with the array as it is after the last block. Within a block it takes back what
was written, last first, so that each operation gets the array that it read. It does not restore an entry of an earlier
block that this block wrote over: the backward pass of each block starts with the array that its own recomputation made.
So only blocks may read, and what follows the last one.

The array reaches the backward pass of an operation as the cotangent of a second array, its `mirror`. In the forward
pass the mirror is zero and nothing reads it. The backward pass of `close` returns the final array as the cotangent of
the mirror; `put` returns the array with the entry that it found there; other operations return the array as it is.

**Use each `Entries` once**: every operation returns the `Entries` for the next one. If an operation is called on
`Entries` and what it returns is dropped, its backward pass gets zeros in place of the array, and gradients are wrong
without an error. Gradients of several readings are added within the passes that make them; separate readings would make
JAX add arrays as large as the buffer.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax._src import core as jax_core
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from maxtext_mudd import kernels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
  """One array of the buffer, for the one operation that comes next.

  Attributes:
    array: what was written so far.
    mirror: zeros, whose cotangent is `array`; None after the last block.
  """

  array: Float[Array, "S ..."]
  mirror: Float[Array, "S ..."] | None = None

  def append(self, index: Int[Array, ""], entry: Float[Array, "..."]) -> "Entries":
    """Writes an entry that nothing has written or read yet."""
    return dataclasses.replace(self, array=_append(self.array, index, entry))

  def put(self, index: Int[Array, ""], entry: Float[Array, "..."]) -> "Entries":
    """Writes an entry, which may replace another."""
    return Entries(*_put(self.array, self.mirror, index, entry))

  def take(self, index: Int[Array, ""], number: int, axis: int = 0) -> tuple[Array, "Entries"]:
    """`number` entries along an axis, from `index` on."""
    taken, array = _take(self.array, index, number, axis)
    return taken, dataclasses.replace(self, array=array)

  def mix(
    self, passes: kernels.Passes, count: Int[Array, ""], weights: kernels.Weights
  ) -> tuple[list[Float[Array, "B T D"]], "Entries"]:
    """Sums of the first `count` entries. Entries from `count` on have to be written before they are read next: their
    gradients may be anything."""
    if self.mirror is None:
      streams, array = _mix_closed(passes, self.array, count, weights)
      return streams, Entries(array)
    streams, *entries = _mix(passes, self.array, self.mirror, count, weights)
    return streams, Entries(*entries)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScanBuffer:
  """A part of the carry of scanned layers.

  Attributes:
    parts: its arrays.
    rematerialise: wraps the function of a block in `jax.checkpoint` with a policy; None: the whole block is recomputed
      in the backward pass.
  """

  parts: list[Entries]
  rematerialise: Callable | None = dataclasses.field(metadata={"static": True})

  @classmethod
  def zeros(
    cls,
    entry: Sequence[Float[Array, "..."] | jax.ShapeDtypeStruct],
    number: int,
    shardings: Sequence[NamedSharding | None],
    rematerialise: Callable | None,
  ) -> "ScanBuffer":
    """A buffer of this number of zeros.

    Args:
      entry: arrays like those of one entry.
      shardings: one for each of these arrays; None on one device.
    """

    def make(x, sharding):
      zeros = jnp.zeros((number, *x.shape), x.dtype)
      if sharding is None:
        return zeros
      return jax.lax.with_sharding_constraint(zeros, NamedSharding(sharding.mesh, P(None, *sharding.spec)))

    return cls([Entries(make(*x), make(*x)) for x in zip(entry, shardings)], rematerialise)

  @property
  def arrays(self) -> tuple[Float[Array, "S ..."], ...]:
    """The arrays, for what is no block: before the first one, or after the last."""
    return tuple(x.array for x in self.parts)

  def resumed(self, arrays: Sequence[Float[Array, "S ..."]], block: Int[Array, ""]) -> "ScanBuffer":
    """A buffer of these arrays, for the blocks of one stage of a pipeline.

    Args:
      block: number of blocks before this stage.
    """
    # All stages run as one batch. A mirror that did not depend on the stage would be one array for all of them, and its
    # cotangents, which are their arrays, would be added.
    of_stage = 0 * block
    parts = [Entries(x, jnp.zeros_like(x) + of_stage.astype(x.dtype)) for x in arrays]
    return dataclasses.replace(self, parts=parts)

  def through(self, step: Callable, *inputs) -> tuple["ScanBuffer", Any]:
    """The buffer after one block, and what else the block returns.

    Args:
      step: (parts, *inputs) -> (parts, outputs), a pure function. The backward pass calls it on the parts as they are
        after the block. So its results may depend only on entries that it writes before it reads them, or that only
        earlier blocks write.
    """
    rematerialise, with_batch_axes = self.rematerialise, _with_batch_axes()

    def block(parts, *inputs):
      parts, outputs = step(parts, *inputs)
      return [Entries(*_remember(x.array, x.mirror)) for x in parts], outputs

    # Traced here, during the model's call: quantization by interception, for one, is no longer active when the backward
    # pass is traced.
    block, closed_over = jax.closure_convert(block, self.parts, *inputs)
    pullback = _Pullback(rematerialise(block) if rematerialise else block)

    @jax.custom_vjp
    def call(parts, inputs):
      return block(parts, *inputs)

    @with_batch_axes
    def forward(parts, inputs):
      if rematerialise is None:
        return call(parts, inputs), inputs
      return pullback.forward(parts, inputs)

    @with_batch_axes
    def backward(kept, cotangents):
      after, to_outputs = cotangents
      parts = [Entries(x.mirror, x.mirror) for x in after]  # the mirror's cotangent is the array after the block
      if rematerialise is None:
        _, vjp = jax.vjp(block, parts, *_not_before(to_outputs, kept))
      else:
        vjp = pullback.restore(parts, kept)
      before, *to_inputs = vjp(cotangents)
      return before, tuple(to_inputs)

    call.defvjp(forward, backward)
    parts, outputs = call(self.parts, (*inputs, *closed_over))
    return dataclasses.replace(self, parts=parts), outputs

  def close(self, others: Any) -> tuple["ScanBuffer", Any]:
    """The buffer after the last block, for readings only, and `others` as they are.

    Args:
      others: all that a loss may read of the loop's other results. If it read the original ones only, the backward pass
        of `close` would not run, and blocks would get zeros in place of the final arrays.
    """
    arrays, others = _close(self.parts, others)
    return dataclasses.replace(self, parts=[Entries(x) for x in arrays]), others


@jax.custom_vjp
def _append(array, index, entry):
  return jax.lax.dynamic_update_index_in_dim(array, entry, index, 0)


# JAX's derivative would set the gradient of the entry before to zero, which nothing reads, in a copy of the array.
_append.defvjp(
  lambda array, index, entry: (_append(array, index, entry), index),
  lambda index, totals: (totals, None, _read_before_writing(totals, index)[0]),
)


@jax.custom_vjp
def _put(array, mirror, index, entry):
  return jax.lax.dynamic_update_index_in_dim(array, entry, index, 0), mirror


def _put_forward(array, mirror, index, entry):
  before, index = _read_before_writing(array, index)
  return _put(array, mirror, index, entry), (index, before)


def _put_backward(kept, cotangents):
  (index, before), (totals, array) = kept, cotangents
  # The gradient of the entry is there after its last reading, so that the entry is taken back after that.
  to_entry, index = _read_before_writing(totals, index)
  totals = jax.lax.dynamic_update_index_in_dim(totals, jnp.zeros_like(to_entry), index, 0)
  return totals, jax.lax.dynamic_update_index_in_dim(array, before, index, 0), None, to_entry


def _read_before_writing(array, index):
  """The entry at `index`, and `index` for what is written after this reading. Without the barrier XLA may read when
  the entry is used, or as it writes, and copies the array for that."""
  return jax.lax.optimization_barrier((jax.lax.dynamic_index_in_dim(array, index, keepdims=False), index))


_put.defvjp(_put_forward, _put_backward)


@jax.custom_vjp
def _remember(array, mirror):
  """Both as they are. The backward pass of a block starts with the array that it itself made: later blocks do not take
  back what they wrote over an entry of this block."""
  return array, mirror


_remember.defvjp(
  lambda array, mirror: ((array, mirror), array),
  lambda array, cotangents: (cotangents[0], array),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _take(array, index, number, axis):
  return jax.lax.dynamic_slice_in_dim(array, index, number, axis), array


def _add_at(number, axis, index, cotangents):
  to_taken, totals = cotangents
  # As in `_read_before_writing`.
  taken, index = jax.lax.optimization_barrier((jax.lax.dynamic_slice_in_dim(totals, index, number, axis), index))
  return jax.lax.dynamic_update_slice_in_dim(totals, taken + to_taken, index, axis), None


_take.defvjp(lambda array, index, number, axis: (_take(array, index, number, axis), index), _add_at)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(passes, array, mirror, count, weights):
  return passes.forward(kernels.Buffer(array, count), weights), array, mirror


def _mix_backward(passes, kept, cotangents):
  (count, weights), (gradients, totals, array) = kept, cotangents
  to_buffer, to_weights = kernels.gradients(passes, kernels.Buffer(array, count), weights, gradients, totals)
  return to_buffer.entries, array, None, to_weights


_mix.defvjp(
  lambda passes, array, mirror, count, weights: (_mix(passes, array, mirror, count, weights), (count, weights)),
  _mix_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix_closed(passes, array, count, weights):
  return passes.forward(kernels.Buffer(array, count), weights), array


def _mix_closed_forward(passes, *inputs):
  inputs = custom_vjp_primal_tree_values(inputs)
  return _mix_closed(passes, *inputs), inputs


def _mix_closed_backward(passes, kept, cotangents):
  (array, count, weights), (gradients, totals) = kept, cotangents
  gradients = [jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in gradients]
  totals = None if isinstance(totals, SymbolicZero) else totals  # nothing reads the array later
  to_buffer, to_weights = kernels.gradients(passes, kernels.Buffer(array, count), weights, gradients, totals)
  return to_buffer.entries, None, to_weights


_mix_closed.defvjp(_mix_closed_forward, _mix_closed_backward, symbolic_zeros=True)


@jax.custom_vjp
def _close(parts, others):
  return [x.array for x in parts], others


_close.defvjp(
  lambda parts, others: (([x.array for x in parts], others), [x.array for x in parts]),
  lambda final, cotangents: ([Entries(*x) for x in zip(cotangents[0], final)], cotangents[1]),
)


def _with_batch_axes() -> Callable[[Callable], Callable]:
  """Makes a function run with the mesh axes of the `jax.vmap` around the present call.

  JAX forgets these where it traces the functions of a `custom_vjp`. Then what a `shard_map` keeps for its backward pass
  would be split over the axis of the batch, too, which JAX 0.11.2 refuses. It has no public function for this.
  """
  names = jax_core.get_axis_env().spmd_axis_names

  def decorate(function):
    @functools.wraps(function)
    def call(*args):
      with jax_core.add_spmd_axis_names(names):
        return function(*args)

    return call

  return decorate


def _not_before(cotangents, inputs):
  """`inputs`, with integers that are there only when the cotangents are. A block reads the buffer by them. So XLA does
  not recompute all blocks of a cycle first, and hold for each what its backward pass needs."""
  floating = [x for x in jax.tree.leaves(cotangents) if jnp.issubdtype(x.dtype, jnp.floating)]
  leaves, tree = jax.tree.flatten(inputs)
  held, _ = jax.lax.optimization_barrier(([x for x in leaves if jnp.issubdtype(x.dtype, jnp.integer)], floating))
  held = iter(held)
  return jax.tree.unflatten(tree, [next(held) if jnp.issubdtype(x.dtype, jnp.integer) else x for x in leaves])


class _Pullback:
  """`jax.vjp` of a block in two halves, of which the second may come from another trace. The arrays of the buffer are
  not kept."""

  def __init__(self, step: Callable):
    self.step = step

  def forward(self, parts, inputs):
    returned, vjp = jax.vjp(self.step, parts, *inputs)
    residuals, self.tree = jax.tree.flatten(vjp)
    arrays = jax.tree.leaves(parts)
    self.places = [next((k for k, x in enumerate(arrays) if x is residual), None) for residual in residuals]
    return returned, [residual for residual, place in zip(residuals, self.places) if place is None]

  def restore(self, parts, kept):
    arrays, kept = jax.tree.leaves(parts), iter(kept)
    return jax.tree.unflatten(self.tree, [next(kept) if place is None else arrays[place] for place in self.places])
