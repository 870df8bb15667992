"""Sources whose logits for the queries of all later aggregates are made once, when the source is made.

Single layers hold them as a list, scanned layers as a buffer; both have the same methods.
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
from maxtext_mudd.connections import scan_buffer
from maxtext_mudd.connections.scan_buffer import ScanBuffer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceList:
  """Sources of single layers.

  Attributes:
    sources: arrays [B,T,D], oldest first.
    logits: of each source for all M queries, in float32 or wider.
  """

  sources: tuple[Float[Array, "B T D"], ...] = ()
  logits: tuple[Float[Array, "M B T"], ...] = ()

  def put(self, index: int, source: Float[Array, "B T D"], logits: Float[Array, "M B T"]) -> "SourceList":
    """With another source at `index`, the last or the one after it."""
    return SourceList((*self.sources[:index], source), (*self.logits[:index], logits))

  def take_logits(self, query: int, count: int) -> tuple[Float[Array, "N B T"], "SourceList"]:
    """The logits of the sources for one query, and the sources for what reads them next."""
    return jnp.stack([x[query] for x in self.logits]), self

  def mix(
    self, passes: kernels.Passes, weights: Float[Array, "B T C N"], count: int
  ) -> tuple[list[Float[Array, "B T D"]], "SourceList"]:
    """Streams, and the sources for what reads them next."""
    return kernels.differentiable(passes, list(self.sources), weights), self

  def through(self, block: Callable, state: Any, carry: Any, arguments: Any) -> tuple[Any, Any]:
    """The carry that holds these sources after one block, and what else the block returned."""
    carry, _, rest = block(state, carry, arguments)
    return carry, rest

  def finish(self, carry: Any, sown: Any) -> tuple[Any, Any]:
    """The carry after the last block, and `sown`, as they are."""
    return carry, sown


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceBuffer:
  """Sources of scanned layers, as one block reads them. Methods are those of `SourceList`."""

  sources: Float[Array, "S B T D"]
  logits: Float[Array, "S M B T"]

  def put(self, index: Int[Array, ""], source: Float[Array, "B T D"], logits: Float[Array, "M B T"]) -> "SourceBuffer":
    """With another source at `index`, the last or the one after it."""
    return SourceBuffer(scan_buffer.put(self.sources, index, source), scan_buffer.put(self.logits, index, logits))

  def take_logits(self, query: Int[Array, ""], count: Int[Array, ""]) -> tuple[Float[Array, "S B T"], "SourceBuffer"]:
    """Logits of all entries, those of entries that are no sources yet being -inf."""
    taken, logits = scan_buffer.take(self.logits, query, axis=1)
    is_source = (jnp.arange(len(taken)) < count)[:, None, None]
    return jnp.where(is_source, taken, -jnp.inf), dataclasses.replace(self, logits=logits)

  def mix(self, passes: kernels.Passes, weights: Float[Array, "B T C S"], count: Int[Array, ""]):
    streams, sources = kernels.chained(passes, kernels.Buffer(self.sources, jnp.asarray(count)), weights)
    return streams, dataclasses.replace(self, sources=sources)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScannedSources:
  """Sources between scanned layers."""

  buffer: ScanBuffer

  @classmethod
  def zeros(
    cls,
    like: Float[Array, "B T D"],
    queries: int,
    number: int,
    sharding: NamedSharding | None,
    rematerialise: Callable | None,
  ) -> "ScannedSources":
    """A buffer for this number of sources, `sharding` being that of one source."""
    logits = jax.ShapeDtypeStruct((queries, *like.shape[:2]), kernels.accumulation_dtype(like.dtype))
    of_logits = None
    if sharding is not None:
      of_logits = NamedSharding(sharding.mesh, P(None, *(*sharding.spec, None, None)[:2]))
    return cls(ScanBuffer.zeros([like, logits], number, [sharding, of_logits], rematerialise))

  def put(
    self, index: Int[Array, ""], source: Float[Array, "B T D"], logits: Float[Array, "M B T"]
  ) -> "ScannedSources":
    """With another source at `index`, the last or the one after it."""
    entries = SourceBuffer(*self.buffer.entries).put(index, source, logits)
    return ScannedSources(dataclasses.replace(self.buffer, entries=[entries.sources, entries.logits]))

  def through(self, block: Callable, state: Any, carry: Any, arguments: Any) -> tuple[Any, Any]:
    """The carry that holds these sources after one block, and what else the block returned."""

    def step(entries, others, state, arguments):
      after, _, rest = block(state, dataclasses.replace(others, sources=SourceBuffer(*entries)), arguments)
      entries = [after.sources.sources, after.sources.logits]
      return entries, (dataclasses.replace(after, sources=None), rest)

    buffer, (carry, rest) = self.buffer.through(step, dataclasses.replace(carry, sources=None), state, arguments)
    return dataclasses.replace(carry, sources=ScannedSources(buffer)), rest

  def finish(self, carry: Any, sown: Any) -> tuple[Any, Any]:
    """The carry after the last block with its sources as a `SourceBuffer`, and `sown` as losses have to read it."""
    entries, (carry, sown) = self.buffer.close((dataclasses.replace(carry, sources=None), sown))
    return dataclasses.replace(carry, sources=SourceBuffer(*entries)), sown
