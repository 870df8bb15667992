"""Arrays that the blocks of scanned layers write entry by entry, kept once for the backward pass.

If JAX differentiated the loop over blocks, it would keep one copy of these arrays for each block. But a block leaves
the entries of earlier blocks as they are, so that one copy, from after the last block, has what every block read. It
reaches the backward pass of each block as a cotangent. In the forward pass `ScanBuffer.mirror` is zero and nothing
reads it. The backward pass of `close` returns the final entries as the cotangent of `mirror`; that of each block runs
the block again from them and passes them to the block before.

Where a block reads the entries several times, the gradients of these readings are added within the passes that make
them: each reading returns the entries to the next (`take`, `kernels.chained`). If all of them read the same variable,
JAX would add arrays as large as the buffer.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScanBuffer:
  """A part of the carry of scanned layers.

  Attributes:
    entries: arrays [S, ...].
    mirror: zeros, whose cotangent is the final `entries`.
    rematerialise: wraps the function of a block in `jax.checkpoint` with a policy; None: the whole block is recomputed
      in the backward pass.
  """

  entries: list[Float[Array, "S ..."]]
  mirror: list[Float[Array, "S ..."]]
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

    entries, mirror = ([make(*x) for x in zip(entry, shardings)] for _ in range(2))
    return cls(entries, mirror, rematerialise)

  def append(self, index: Int[Array, ""], entry: Sequence[Float[Array, "..."]]) -> "ScanBuffer":
    """The buffer with an entry at `index`, which nothing has written or read yet; `put` is for other entries."""
    return dataclasses.replace(self, entries=[_append(x, index, y) for x, y in zip(self.entries, entry)])

  def through(self, step: Callable, *inputs) -> tuple["ScanBuffer", Any]:
    """The buffer after one block, and what else the block returns.

    Args:
      step: (entries, *inputs) -> (entries, outputs), a pure function. The backward pass calls it on the final entries.
        So its results may depend only on entries that it or an earlier block wrote, and an entry that an earlier block
        reads may be overwritten only if the earlier block itself writes it before it reads it.
    """
    rematerialise = self.rematerialise
    # Traced here, during the model's call: quantization by interception, for one, is no longer active when the backward
    # pass is traced.
    step, closed_over = jax.closure_convert(step, self.entries, *inputs)
    pullback = _Pullback(rematerialise(step) if rematerialise else step)

    @jax.custom_vjp
    def call(entries, mirror, inputs):
      entries, outputs = step(entries, *inputs)
      return entries, mirror, outputs

    def forward(entries, mirror, inputs):
      if rematerialise is None:
        return call(entries, mirror, inputs), inputs
      (entries, outputs), residuals = pullback.forward(entries, inputs)
      return (entries, mirror, outputs), residuals

    def backward(kept, cotangents):
      totals, entries, to_outputs = cotangents  # the mirror's cotangent is the final buffer
      if rematerialise is None:
        (entries, _), vjp = jax.vjp(step, entries, *kept)
      else:
        vjp = pullback.restore(entries, kept)
      totals, *to_inputs = vjp((totals, to_outputs))
      return totals, entries, tuple(to_inputs)

    call.defvjp(forward, backward)
    entries, mirror, outputs = call(self.entries, self.mirror, (*inputs, *closed_over))
    return dataclasses.replace(self, entries=entries, mirror=mirror), outputs

  def close(self, others: Any) -> tuple[Any, Any]:
    """The final entries, and `others` as they are.

    Args:
      others: all that a loss may read of the loop's other results. If it read the original ones only, the backward pass
        of `close` would not run, and blocks would get zeros in place of the final entries.
    """
    return _close(self.entries, self.mirror, others)


@jax.custom_vjp
def _append(entries, index, entry):
  return jax.lax.dynamic_update_index_in_dim(entries, entry, index, 0)


# JAX's derivative would set the gradient of the entry before to zero, which nothing reads, in a copy of the array.
_append.defvjp(
  lambda entries, index, entry: (_append(entries, index, entry), index),
  lambda index, totals: (totals, None, jax.lax.dynamic_index_in_dim(totals, index, keepdims=False)),
)


def put(entries: Float[Array, "S ..."], index: Int[Array, ""], entry: Float[Array, "..."]) -> Float[Array, "S ..."]:
  """The entries with another one at `index`."""
  return jax.lax.dynamic_update_index_in_dim(entries, entry, index, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def take(entries: Array, index: Int[Array, ""], number: int, axis: int = 0) -> tuple[Array, Array]:
  """`number` entries along an axis, from `index` on; and all entries, for what reads them next."""
  return jax.lax.dynamic_slice_in_dim(entries, index, number, axis), entries


def _add_at(number, axis, index, cotangents):
  to_taken, totals = cotangents
  total = jax.lax.dynamic_slice_in_dim(totals, index, number, axis) + to_taken
  return jax.lax.dynamic_update_slice_in_dim(totals, total, index, axis), None


take.defvjp(lambda entries, index, number, axis: (take(entries, index, number, axis), index), _add_at)


@jax.custom_vjp
def _close(entries, mirror, others):
  return entries, others


_close.defvjp(
  lambda entries, mirror, others: ((entries, others), entries),
  lambda final, cotangents: (cotangents[0], final, cotangents[1]),
)


class _Pullback:
  """`jax.vjp` of a block in two halves, of which the second may come from another trace. The entries are not kept."""

  def __init__(self, step: Callable):
    self.step = step

  def forward(self, entries, inputs):
    returned, vjp = jax.vjp(self.step, entries, *inputs)
    residuals, self.tree = jax.tree.flatten(vjp)
    entries = jax.tree.leaves(entries)
    self.places = [next((k for k, x in enumerate(entries) if x is residual), None) for residual in residuals]
    return returned, [residual for residual, place in zip(residuals, self.places) if place is None]

  def restore(self, entries, kept):
    entries, kept = jax.tree.leaves(entries), iter(kept)
    return jax.tree.unflatten(self.tree, [next(kept) if place is None else entries[place] for place in self.places])
