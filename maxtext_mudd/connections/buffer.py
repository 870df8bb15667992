"""The history of a scanned decoder: one buffer that every block appends to, kept once for the backward pass.

Where sources are pre-normed, each block's own X_i is kept besides, as stock layers keep their input.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from maxtext_mudd.connections.base import Link
from maxtext_mudd.connections.scan_buffer import ScanBuffer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HistoryBuffer:
  """What flows between scanned blocks. Not a tuple: stock layers unpack tuples.

  Attributes:
    buffer: X_0 to X_i, pre-normed where `mudd_pre_norm` is on, and zeros after them.
    count: i + 1; also the number of the block that comes next.
    newest: X_i as the block returned it, where that is not the last source.
  """

  buffer: ScanBuffer
  count: Int[Array, ""]
  newest: Float[Array, "B T D"] | None

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
    buffer = ScanBuffer.zeros([source], num_blocks + 1, [sharding], rematerialise)
    return cls(_append(buffer, jnp.zeros((), jnp.int32), source), jnp.ones((), jnp.int32), newest)

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
      if newest is None:
        taken, sources = sources.take(count - 1, 1)
        output = taken[0]
      if link.weights is not None:
        weights = link.weights(parameters, count, output, newest is None)
        sums, sources = sources.mix(link.passes, count, weights)
      source, output, rest = link.block(state, count, sums, output, arguments)
      return [sources], (source, None if newest is None else output, rest)

    inputs = (parameters, self.count, self.newest, state, arguments)
    buffer, (source, newest, rest) = self.buffer.through(step, *inputs)
    # What the block sowed may have been read from the buffer. Without the barrier XLA copies the buffer for that, which
    # was 5 % of the bytes of a train step (405M with 8 blocks).
    index, rest = jax.lax.optimization_barrier((self.count, rest))
    return HistoryBuffer(_append(buffer, index, source), self.count + 1, newest), rest

  def finish(self, link: Link | None, parameters: Any, sown: Any):
    """(sums of the site after the last block or None, X_L, `sown`).

    Args:
      sown: floating arrays that blocks left beside the buffer, such as the losses of routers. A loss has to read them
        as they are returned.
    """
    buffer, (newest, sown) = self.buffer.close((self.newest, sown))
    (sources,) = buffer.parts
    output = sources.array[-1] if newest is None else newest
    if link is None:
      return None, output, sown
    count = jnp.asarray(len(sources.array))
    weights = link.weights(parameters, count, output, newest is None)
    return sources.mix(link.passes, count, weights)[0], output, sown


def _append(buffer: ScanBuffer, index: Int[Array, ""], source: Float[Array, "B T D"]) -> ScanBuffer:
  (sources,) = buffer.parts
  return dataclasses.replace(buffer, parts=[sources.append(index, source)])
