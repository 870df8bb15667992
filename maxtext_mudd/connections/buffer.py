"""The history of a scanned decoder: one buffer that every block appends to, kept once for the backward pass.

If JAX differentiated the loop over blocks, it would keep one copy of the buffer for each block. But blocks only append
to the buffer, so that one copy, from after the last block, has the sources of every block. It reaches the backward pass
of each block as a cotangent. In the forward pass `HistoryBuffer.mirror` is zero and nothing reads it. The backward pass
of `finish` returns the final buffer as the cotangent of `mirror`; that of each block recomputes its aggregate from it
and passes it to the block before.
Where sources are pre-normed, each block's own X_i is kept besides, as stock layers keep their input.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from maxtext_mudd import kernels
from maxtext_mudd.connections.base import Link


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HistoryBuffer:
  """What flows between scanned blocks. Not a tuple: stock layers unpack tuples.

  Attributes:
    sources: X_0 to X_i, pre-normed where `mudd_pre_norm` is on, and zeros after them.
    mirror: zeros, whose cotangent is the final `sources`.
    count: i + 1; also the number of the block that comes next.
    newest: X_i as the block returned it, where that is not the last source.
    rematerialise: wraps the block's function in `jax.checkpoint` with a policy; None: the whole block is recomputed in
      the backward pass.
  """

  sources: Float[Array, "S B T D"]
  mirror: Float[Array, "S B T D"]
  count: Int[Array, ""]
  newest: Float[Array, "B T D"] | None
  rematerialise: Callable | None = dataclasses.field(metadata={"static": True})

  @classmethod
  def start(
    cls,
    source: Float[Array, "B T D"],
    newest: Float[Array, "B T D"] | None,
    num_blocks: int,
    sharding: NamedSharding | None,
    rematerialise: Callable | None,
  ) -> "HistoryBuffer":
    """The buffer before the first block, `sharding` being that of one source."""
    shape = (num_blocks + 1, *source.shape)
    sources, mirror = jnp.zeros(shape, source.dtype).at[0].set(source), jnp.zeros(shape, source.dtype)
    if sharding is not None:
      sharding = NamedSharding(sharding.mesh, P(None, *sharding.spec))
      sources, mirror = (jax.lax.with_sharding_constraint(x, sharding) for x in (sources, mirror))
    return cls(sources, mirror, jnp.ones((), jnp.int32), newest, rematerialise)

  @property
  def output_shape(self) -> tuple[int, ...]:
    return self.sources.shape[1:]

  def through(self, link: Link, parameters: Any, state: Any, arguments: Any) -> tuple["HistoryBuffer", Any]:
    """The buffer after a block, and what else the block returned.

    Args:
      parameters: of the aggregate, state: of the block; they may hold the same arrays.
    """
    return _through_block(link, state, parameters, self, arguments)

  def finish(self, link: Link | None, parameters: Any, sown: Any):
    """(sums of the site after the last block or None, X_L, `sown`).

    Args:
      sown: floating arrays that blocks left beside the buffer, such as the losses of routers. A loss has to read them
        as they are returned. If it read the original ones only, the backward pass of `finish` would not run, and blocks
        would get zeros in place of the final buffer.
    """
    sources, (newest, sown) = _close(self.sources, self.mirror, (self.newest, sown))
    output = sources[-1] if newest is None else newest
    if link is None:
      return None, output, sown
    count = jnp.asarray(len(sources))
    weights = link.weights(parameters, count, output, newest is None)
    return kernels.differentiable(link.passes, kernels.Buffer(sources, count), weights), output, sown


@jax.custom_vjp
def _close(sources, mirror, others):
  return sources, others


_close.defvjp(
  lambda sources, mirror, others: ((sources, others), sources),
  lambda final, gradients: (gradients[0], final, gradients[1]),
)


def _through_block(
  link: Link, state: Any, parameters: Any, buffer: HistoryBuffer, arguments: Any
) -> tuple[HistoryBuffer, Any]:
  """An aggregate and the block that reads it. The sums are recomputed in the backward pass."""
  rematerialise, has_newest = buffer.rematerialise, buffer.newest is not None

  def block_input(parameters, sources, count, newest):
    sources, sums = kernels.Buffer(sources, count), []
    output = newest if has_newest else sources.newest
    if link.weights is not None:
      sums = link.passes.forward(sources, link.weights(parameters, count, output, not has_newest))
    return sums, output

  # Traced here, during the model's call: quantization by interception, for one, is no longer active when the backward
  # pass is traced.
  inputs = jax.eval_shape(block_input, parameters, buffer.sources, buffer.count, buffer.newest)
  block, closed_over = jax.closure_convert(link.block, state, buffer.count, *inputs, arguments)
  pullback = _Pullback(rematerialise(block) if rematerialise else block)

  def append(sources, mirror, count, returned):
    source, output, rest = returned
    sources = jax.lax.dynamic_update_index_in_dim(sources, source, count, 0)
    return (sources, mirror, output if has_newest else None), rest

  @jax.custom_vjp
  def call(state, parameters, sources, mirror, count, newest, others):
    inputs = block_input(parameters, sources, count, newest)
    return append(sources, mirror, count, block(state, count, *inputs, *others))

  def forward(state, parameters, sources, mirror, count, newest, others):
    if rematerialise is None:
      outputs = call(state, parameters, sources, mirror, count, newest, others)
      return outputs, (parameters, count, newest, (state, others))
    inputs = block_input(parameters, sources, count, newest)
    returned, residuals = pullback.forward(inputs, (state, count, *inputs, *others))
    return append(sources, mirror, count, returned), (parameters, count, newest, residuals)

  def backward(kept, cotangents):
    parameters, count, newest, kept = kept
    (totals, sources, to_output), to_rest = cotangents  # the mirror's cotangent is the final buffer

    inputs = block_input(parameters, sources, count, newest)

    if rematerialise is None:
      state, others = kept
      _, vjp = jax.vjp(block, state, count, *inputs, *others)
    else:
      vjp = pullback.restore(kept, inputs)
    to_source = jax.lax.dynamic_index_in_dim(totals, count, keepdims=False)
    to_output = to_output if has_newest else jnp.zeros_like(to_source)
    to_state, _, to_sums, to_newest, *to_others = vjp((to_source, to_output, to_rest))
    to_parameters = jax.tree.map(jnp.zeros_like, parameters)
    if link.weights is not None:

      def weights_of(parameters, output):
        return link.weights(parameters, count, output, not has_newest)

      weights, vjp = jax.vjp(weights_of, parameters, inputs[1])
      gradients = link.passes.backward(kernels.Buffer(sources, count), weights, to_sums, totals=totals)
      to_weights = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients.weights, weights)
      to_parameters, through_weights = vjp(to_weights)
      totals = gradients.sources
      to_newest = to_newest + through_weights
    if not has_newest:
      reached = jax.lax.dynamic_index_in_dim(totals, count - 1, keepdims=False) + to_newest
      totals = jax.lax.dynamic_update_index_in_dim(totals, reached, count - 1, 0)
      to_newest = None
    return to_state, to_parameters, totals, sources, None, to_newest, tuple(to_others)

  call.defvjp(forward, backward)
  others = (arguments, *closed_over)
  carried, rest = call(state, parameters, buffer.sources, buffer.mirror, buffer.count, buffer.newest, others)
  sources, mirror, newest = carried
  return dataclasses.replace(buffer, sources=sources, mirror=mirror, count=buffer.count + 1, newest=newest), rest


class _Pullback:
  """`jax.vjp` of a block in two halves, of which the second may come from another trace. Residuals that are inputs
  that can be recomputed are not kept."""

  def __init__(self, block: Callable):
    self.block = block

  def forward(self, recomputed, inputs):
    returned, vjp = jax.vjp(self.block, *inputs)
    residuals, self.tree = jax.tree.flatten(vjp)
    recomputed = jax.tree.leaves(recomputed)
    self.places = [next((k for k, x in enumerate(recomputed) if x is residual), None) for residual in residuals]
    return returned, [residual for residual, place in zip(residuals, self.places) if place is None]

  def restore(self, kept, recomputed):
    recomputed = jax.tree.leaves(recomputed)
    kept = iter(kept)
    return jax.tree.unflatten(self.tree, [next(kept) if place is None else recomputed[place] for place in self.places])
