"""The history of a scanned decoder: one buffer that every block appends to, kept once for the backward pass.

Differentiated as it stands, a loop over blocks keeps the buffer of every turn. But the history is append-only, so that
the buffer after the last block serves for all of them. It reaches the backward pass of each block as a cotangent:
`Buffer.mirror` is zero and nothing reads it in the forward pass; `close` sends the final buffer back as its "gradient".
Where sources are pre-normed, each block's own X_i is kept besides, as stock layers keep their input.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxtext_mudd import kernels
from maxtext_mudd.kernels import Passes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffer:
  """What flows between scanned blocks. Not a tuple: stock layers unpack tuples.

  Attributes:
    sources: X_0 to X_i, pre-normed where `mudd_pre_norm` is on, and zeros after them.
    mirror: zeros, whose cotangent is the final `sources`.
    count: i + 1; also the number of the block that comes next.
    newest: X_i as the block returned it, where that is not the last source.
    rematerialise: from a block to what is differentiated, which says what is kept for the backward pass; None: nothing
      is kept, the block is recomputed.
  """

  sources: Float[Array, "S B T D"]
  mirror: Float[Array, "S B T D"]
  count: Int[Array, ""]
  newest: Float[Array, "B T D"] | None
  rematerialise: Callable | None = dataclasses.field(metadata={"static": True})


@jax.custom_vjp
def _close(sources, mirror, others):
  return sources, others


_close.defvjp(
  lambda sources, mirror, others: ((sources, others), sources),
  lambda final, gradients: (gradients[0], final, gradients[1]),
)


def close(buffer: Buffer, sown: Any) -> tuple[Float[Array, "S B T D"], Float[Array, "B T D"] | None, Any]:
  """`sources` and `newest` behind the last block, and what blocks left beside them: floating arrays, as losses of
  routers. Whatever a loss reads of them comes from here, for this hands the sources to the backward pass."""
  sources, (newest, sown) = _close(buffer.sources, buffer.mirror, (buffer.newest, sown))
  return sources, newest, sown


class Link(NamedTuple):
  """One aggregate with the block that reads it; all static.

  Attributes:
    passes: how the aggregate runs.
    weights: (own, count, newest) -> weights of all entries of the buffer; None: no block has an aggregate.
    block: (state, count, sums, X_i, arguments) -> (source, output, anything else); a pure function.
  """

  passes: Passes
  weights: Callable | None
  block: Callable


def through_block(link: Link, state: Any, own: Any, buffer: Buffer, arguments: Any) -> tuple[Buffer, Any]:
  """An aggregate and the block that reads it. The sums are recomputed in the backward pass.

  Args:
    state: of the block, own: of the aggregate; they may hold the same arrays.

  Returns:
    the buffer with the block's output, and what else the block returned.
  """
  rematerialise, has_newest = buffer.rematerialise, buffer.newest is not None

  def block_input(own, sources, count, newest):
    sources, sums = kernels.Buffer(sources, count), []
    if link.weights is not None:
      sums = link.passes.forward(sources, link.weights(own, count, newest))
    return sums, sources.newest if newest is None else newest

  # Traced here, during the model's call: quantization by interception, for one, is no longer active when the backward
  # pass is traced.
  made = jax.eval_shape(block_input, own, buffer.sources, buffer.count, buffer.newest)
  block, closed_over = jax.closure_convert(link.block, state, buffer.count, *made, arguments)
  pullback = _Pullback(rematerialise(block) if rematerialise else block)

  def append(sources, mirror, count, returned):
    source, output, rest = returned
    sources = jax.lax.dynamic_update_index_in_dim(sources, source, count, 0)
    return (sources, mirror, output if has_newest else None), rest

  @jax.custom_vjp
  def call(state, own, sources, mirror, count, newest, others):
    made = block_input(own, sources, count, newest)
    return append(sources, mirror, count, block(state, count, *made, *others))

  def forward(state, own, sources, mirror, count, newest, others):
    if rematerialise is None:
      return call(state, own, sources, mirror, count, newest, others), (own, count, newest, (state, others))
    made = block_input(own, sources, count, newest)
    returned, residuals = pullback.forward(made, (state, count, *made, *others))
    return append(sources, mirror, count, returned), (own, count, newest, residuals)

  def backward(kept, cotangents):
    own, count, newest, kept = kept
    (totals, sources, to_output), to_rest = cotangents  # the mirror's cotangent is the final buffer

    def again():
      return block_input(own, sources, count, newest)

    if rematerialise is None:
      state, others = kept
      _, vjp = jax.vjp(block, state, count, *again(), *others)
    else:
      vjp = pullback.restore(kept, again)
    to_source = jax.lax.dynamic_index_in_dim(totals, count, keepdims=False)
    to_output = to_output if has_newest else jnp.zeros_like(to_source)
    to_state, _, to_sums, to_newest, *to_others = vjp((to_source, to_output, to_rest))
    if not has_newest:
      reached = jax.lax.dynamic_index_in_dim(totals, count - 1, keepdims=False) + to_newest
      totals = jax.lax.dynamic_update_index_in_dim(totals, reached, count - 1, 0)
    to_own = jax.tree.map(jnp.zeros_like, own)
    if link.weights is not None:
      weights, vjp = jax.vjp(lambda own, newest: link.weights(own, count, newest), own, newest)
      made = link.passes.backward(kernels.Buffer(sources, count), weights, to_sums, totals=totals)
      to_weights = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), made.weights, weights)
      to_own, through_weights = vjp(to_weights)
      totals = made.sources
      to_newest = to_newest + through_weights if has_newest else None
    to_newest = to_newest if has_newest else None
    return to_state, to_own, totals, sources, None, to_newest, tuple(to_others)

  call.defvjp(forward, backward)
  others = (arguments, *closed_over)
  carried, rest = call(state, own, buffer.sources, buffer.mirror, buffer.count, buffer.newest, others)
  sources, mirror, newest = carried
  return dataclasses.replace(buffer, sources=sources, mirror=mirror, count=buffer.count + 1, newest=newest), rest


class _Pullback:
  """`jax.vjp` of a block in two halves, of which the second may come from another trace. Residuals that are inputs
  that can be recomputed are not kept."""

  def __init__(self, block: Callable):
    self.block = block

  def forward(self, made, inputs):
    returned, vjp = jax.vjp(self.block, *inputs)
    residuals, self.tree = jax.tree.flatten(vjp)
    made = jax.tree.leaves(made)
    self.places = [next((k for k, x in enumerate(made) if x is residual), None) for residual in residuals]
    return returned, [residual for residual, place in zip(residuals, self.places) if place is None]

  def restore(self, kept, again: Callable):
    made = jax.tree.leaves(again())
    kept = iter(kept)
    return jax.tree.unflatten(self.tree, [next(kept) if place is None else made[place] for place in self.places])
