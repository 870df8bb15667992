"""The history of a scanned decoder: one buffer that every block appends to, kept once for the backward pass.

Where sources are pre-normed, each block's own X_i is kept besides, as stock layers keep their input.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from maxtext_mudd import kernels
from maxtext_mudd.connections.base import Link
from maxtext_mudd.connections.scan_buffer import ScanBuffer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HistoryBuffer:
  """What flows between scanned blocks. Not a tuple: stock layers unpack tuples.

  Attributes:
    buffer: extra embeddings, oldest first, X_0 to X_i, pre-normed where `mudd_pre_norm` is on, and zeros after them.
    count: the number of sources, m + i + 1 with m extra embeddings.
    newest: X_i as the block returned it, where that is not the last source.
    of_mtp: sources after X_L, which is the last in the buffer: of MTP blocks, pre-normed like others.
  """

  buffer: ScanBuffer
  count: Int[Array, ""]
  newest: Float[Array, "B T D"] | None
  of_mtp: tuple[Float[Array, "B T D"], ...] = ()

  @classmethod
  def start(
    cls,
    sources: Sequence[Float[Array, "B T D"]],
    newest: Float[Array, "B T D"] | None,
    num_blocks: int,
    sharding: NamedSharding | None,
    rematerialise: Callable | None,
  ) -> "HistoryBuffer":
    """The buffer before the first block, `sharding` being that of one source."""
    buffer = ScanBuffer.zeros(sources[-1:], len(sources) + num_blocks, [sharding], rematerialise)
    for k, source in enumerate(sources):
      buffer = _append(buffer, jnp.asarray(k, jnp.int32), source)
    return cls(buffer, jnp.asarray(len(sources), jnp.int32), newest)

  @property
  def output(self) -> Float[Array, "B T D"]:
    """After the last block: the newest block output."""
    if self.newest is not None:
      return self.newest
    return self.of_mtp[-1] if self.of_mtp else self.buffer.parts[0].array[-1]

  @property
  def output_shape(self) -> tuple[int, ...]:
    return self.buffer.parts[0].array.shape[1:]

  def through(self, link: Link, parameters: Any, state: Any, arguments: Any) -> tuple["HistoryBuffer", Any]:
    """The buffer after a block, and what else the block returned. Sums are recomputed in the backward pass.

    Args:
      parameters: of the aggregate, state: of the block; they may hold the same arrays.
    """

    def step(parts, parameters, count, newest, state, arguments):
      (sources,), output, sums = parts, newest, []
      number = count + link.plan.oldest
      if newest is None:
        taken, sources = sources.take(count - 1, 1)
        output = taken[0]
      if link.weights is not None:
        weights = link.weights(parameters, number, output, newest is None)
        sums, sources = sources.mix(link.passes, count, weights)
      source, output, rest = link.block(state, number, sums, output, arguments)
      return [sources], (source, None if newest is None else output, rest)

    inputs = (parameters, self.count, self.newest, state, arguments)
    buffer, (source, newest, rest) = self.buffer.through(step, *inputs)
    # What the block sowed may have been read from the buffer. Without the barrier XLA copies the buffer for that, which
    # was 5 % of the bytes of a train step (405M with 8 blocks).
    index, rest = jax.lax.optimization_barrier((self.count, rest))
    return HistoryBuffer(_append(buffer, index, source), self.count + 1, newest), rest

  def close(self, sown: Any) -> tuple["HistoryBuffer", Any]:
    """The buffer after the last block, and `sown`.

    Args:
      sown: floating arrays that blocks left beside the buffer, such as the losses of routers. A loss has to read them
        as they are returned.
    """
    buffer, (newest, sown) = self.buffer.close((self.newest, sown))
    return dataclasses.replace(self, buffer=buffer, newest=newest), sown

  def mix(self, link: Link, parameters: Any) -> tuple[list[Float[Array, "B T D"]], "HistoryBuffer"]:
    """After the last block: the sums of a site that no block reads, such as DA_L, and the buffer for the next such
    site."""
    (sources,) = self.buffer.parts
    end = len(sources.array)
    number = end + len(self.of_mtp) + link.plan.oldest
    weights = link.weights(parameters, number, self.output, self.newest is None)
    if not self.of_mtp:
      sums, sources = sources.mix(link.passes, jnp.asarray(end), weights)
    else:  # an appended source would be a copy of the buffer, which the backward pass of blocks needs as it is
      weights, _ = kernels.token_weights([self.output], weights)
      sums, sources = sources.mix(link.passes, jnp.asarray(end), weights[..., :end])
      of_mtp = kernels.differentiable(link.passes, list(self.of_mtp), weights[..., end:])
      sums = [x + y for x, y in zip(sums, of_mtp)]
    return sums, dataclasses.replace(self, buffer=dataclasses.replace(self.buffer, parts=[sources]))

  def append(self, source: Float[Array, "B T D"], output: Float[Array, "B T D"]) -> "HistoryBuffer":
    """After the last block: the history with the output of an MTP block."""
    newest = None if self.newest is None else output
    return dataclasses.replace(self, of_mtp=(*self.of_mtp, source), newest=newest)


def _append(buffer: ScanBuffer, index: Int[Array, ""], source: Float[Array, "B T D"]) -> ScanBuffer:
  (sources,) = buffer.parts
  return dataclasses.replace(buffer, parts=[sources.append(index, source)])
