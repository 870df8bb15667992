"""Sources that are scored once, when they are made: each gets logits for the queries of all aggregates.

So a source is read once for all its logits. Some are never read: those for queries of earlier aggregates, and those of
a sum that a later one replaces.

Single layers hold them as a list, scanned layers as a buffer. A family derives from `ScoredConnection` and says which
sources an aggregate reads, and how their logits become weights.

Scanned layers keep the newest source of each block for the backward pass, as stock layers keep their input, and k-DCA
the sum of middle sources. Where it is also among the final sources, as with Full AttnRes and DeepCrossAttention, it is
kept twice.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from maxtext_mudd import kernels
from maxtext_mudd.connections.connection import Passed, where_first
from maxtext_mudd.connections.mesh import contract, source_sharding
from maxtext_mudd.connections.scan_buffer import Entries, ScanBuffer
from maxtext_mudd.connections.sublayers import LayerOutput, SublayerConnection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceList:
  """Sources of single layers.

  Attributes:
    sources: arrays [B,T,D], oldest first.
    logits: of each source for all H heads of all M queries, in float32 or wider.
  """

  sources: tuple[Float[Array, "B T D"], ...] = ()
  logits: tuple[Float[Array, "MH B T"], ...] = ()

  def put(self, index: int, source: Float[Array, "B T D"], logits: Float[Array, "MH B T"]) -> "SourceList":
    """Replaces the source at `index`, or appends it after the last one."""
    sources, of_sources = list(self.sources), list(self.logits)
    sources[index : index + 1], of_sources[index : index + 1] = [source], [logits]
    return SourceList(tuple(sources), tuple(of_sources))

  def take(self, index: int) -> tuple[Float[Array, "B T D"], "SourceList"]:
    """A source, and the sources for what reads them next."""
    return self.sources[index], self

  def take_logits(self, first: int, number: int, count: int) -> tuple[Float[Array, "N R B T"], "SourceList"]:
    """Some rows of the logits of all sources, and the sources for what reads them next.

    Args:
      first: the first row; m·H + h is that of head h of query m.
      number: R, how many rows are taken.
      count: how many sources there are.
    """
    return jnp.stack([x[first : first + number] for x in self.logits]), self

  def mix(
    self, passes: kernels.Passes, weights: kernels.Weights, count: int
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
  """Sources of scanned layers, with the methods of `SourceList`. Each is used once: see `scan_buffer`.

  Attributes:
    buffer: of two arrays: the sources [S,B,T,D], and their logits [S,M·H,B,T] for all H heads of all M queries, in
      float32 or wider.
  """

  buffer: ScanBuffer

  @classmethod
  def zeros(
    cls,
    like: Float[Array, "B T D"],
    queries: int,
    number: int,
    sharding: NamedSharding | None,
    rematerialise: Callable | None,
  ) -> "SourceBuffer":
    """A buffer for this number of sources, `sharding` being that of one source."""
    logits = jax.ShapeDtypeStruct((queries, *like.shape[:2]), kernels.accumulation_dtype(like.dtype))
    of_logits = None
    if sharding is not None:
      of_logits = NamedSharding(sharding.mesh, P(None, *(*sharding.spec, None, None)[:2]))
    return cls(ScanBuffer.zeros([like, logits], number, [sharding, of_logits], rematerialise))

  def put(self, index: Int[Array, ""], source: Float[Array, "B T D"], logits: Float[Array, "MH B T"]) -> "SourceBuffer":
    sources, of_sources = self.buffer.parts
    return self._with(sources.put(index, source), of_sources.put(index, logits))

  def take(self, index: Int[Array, ""]) -> tuple[Float[Array, "B T D"], "SourceBuffer"]:
    sources, logits = self.buffer.parts
    taken, sources = sources.take(index, 1)
    return taken[0], self._with(sources, logits)

  def take_logits(
    self, first: Int[Array, ""], number: int, count: Int[Array, ""]
  ) -> tuple[Float[Array, "S R B T"], "SourceBuffer"]:
    """Rows of the logits of all entries, those of entries that are no sources yet being -inf."""
    sources, logits = self.buffer.parts
    taken, logits = logits.take(first, number, axis=1)
    # Mixing wants the sources in the last dimension. In a buffer of this layout, XLA would pad them to 128.
    taken = with_layout_constraint(taken, Layout(major_to_minor=tuple(range(taken.ndim))))
    is_source = (jnp.arange(len(taken)) < count)[:, None, None, None]
    return jnp.where(is_source, taken, -jnp.inf), self._with(sources, logits)

  def mix(
    self, passes: kernels.Passes, weights: kernels.Weights, count: int | Int[Array, ""]
  ) -> tuple[list[Float[Array, "B T D"]], "SourceBuffer"]:
    sources, logits = self.buffer.parts
    streams, sources = sources.mix(passes, jnp.asarray(count), weights)
    return streams, self._with(sources, logits)

  def through(self, block: Callable, state: Any, carry: Any, arguments: Any) -> tuple[Any, Any]:
    """The carry that holds these sources after one block, and what else the block returned."""
    rematerialise = self.buffer.rematerialise

    def step(parts, others, state, arguments):
      sources = SourceBuffer(ScanBuffer(parts, rematerialise))
      after, _, rest = block(state, dataclasses.replace(others, sources=sources), arguments)
      return after.sources.buffer.parts, (dataclasses.replace(after, sources=None), rest)

    buffer, (carry, rest) = self.buffer.through(step, dataclasses.replace(carry, sources=None), state, arguments)
    return dataclasses.replace(carry, sources=SourceBuffer(buffer)), rest

  def finish(self, carry: Any, sown: Any) -> tuple[Any, Any]:
    """The carry after the last block, whose sources may be read once more, and `sown` as losses have to read it."""
    buffer, (carry, sown) = self.buffer.close((dataclasses.replace(carry, sources=None), sown))
    return dataclasses.replace(carry, sources=SourceBuffer(buffer)), sown

  def _with(self, *parts: Entries) -> "SourceBuffer":
    return SourceBuffer(dataclasses.replace(self.buffer, parts=list(parts)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredCarry:
  """What flows between blocks.

  Attributes:
    sources: those that an aggregate has read already.
    newest: the source that no aggregate has read yet; each aggregate puts it among the sources first.
    queries: of all aggregates, each times the scale of its key norm.
    blocks: how many blocks came before; None in single layers, whose connections know it.
    others: arrays [B,T,D] that the family carries besides.
  """

  sources: SourceList | SourceBuffer
  newest: Float[Array, "B T D"]
  queries: Float[Array, "M D"]
  blocks: Int[Array, ""] | None
  others: tuple[Float[Array, "B T D"], ...] = ()


class ScoredConnection(SublayerConnection):
  """The connection of one block, or of all blocks of a scanned stack. The queries of all blocks belong to the
  connection that starts, so that the logits of a source for later queries can be made when the source is made.

  A subclass brings `read`: it puts the newest source among the sources, takes logits, makes weights of them, mixes, and
  returns a `SublayerInput` or `Streams`, whose last `write` returns `layer_output`. It brings `finish`: it puts the
  newest source, calls `sources.finish`, and mixes.

  Args:
    queries: a module that returns the queries [M,D]; None where the connection does not start.
    number: of sources that there are after the last block.
    heads: parts of the channels of a source, each with its own logits.
  """

  rematerialises = True
  entry_axes = ("btd", "mbt")

  def __init__(
    self,
    config,
    blocks: Sequence[int],
    mesh: jax.sharding.Mesh,
    queries: Callable | None,
    number: int,
    *,
    heads: int = 1,
    starts: bool,
    finishes: bool,
  ):
    super().__init__(config, blocks, starts=starts, finishes=finishes)
    self.mesh = mesh
    self.number = number
    self.heads = heads
    if starts:
      self.depth_queries = queries

  def start(self, embedding: Float[Array, "B T D"], rematerialise: Callable | None = None) -> ScoredCarry:
    queries = self.depth_queries()
    if not self.config.scan_layers:
      return ScoredCarry(SourceList(), embedding, queries, None)
    sharding = source_sharding(self.config, self.mesh, embedding.shape)
    sources = SourceBuffer.zeros(embedding, len(queries) * self.heads, self.number, sharding, rematerialise)
    return ScoredCarry(sources, embedding, queries, jnp.zeros((), jnp.int32))

  def through(self, block: Callable, state: Any, carry: ScoredCarry, arguments: Any) -> tuple[ScoredCarry, Any]:
    return carry.sources.through(block, state, carry, arguments)

  def pass_on(self, carry: ScoredCarry) -> Passed:
    return Passed(carry.sources.buffer.arrays, (carry.newest, carry.others))

  def resume(self, start: ScoredCarry, passed: Passed, block: Int[Array, ""]) -> ScoredCarry:
    sources = SourceBuffer(start.sources.buffer.resumed(passed.entries, block))
    newest, others = where_first(block, (start.newest, start.others), passed.whole)
    return dataclasses.replace(start, sources=sources, newest=newest, blocks=block, others=others)

  def blocks_before(self, carry: ScoredCarry) -> int | Int[Array, ""]:
    return self.blocks[0] - 1 if carry.blocks is None else carry.blocks

  def layer_output(self, carry: ScoredCarry) -> LayerOutput:
    """What the layer returns, from the carry after its sublayers."""
    after = None if carry.blocks is None else carry.blocks + 1
    return LayerOutput(carry.newest, lambda newest: dataclasses.replace(carry, newest=newest, blocks=after))

  def put(self, carry: ScoredCarry, index: int | Int[Array, ""], source: Float[Array, "B T D"]) -> ScoredCarry:
    """The carry with another source at `index`."""
    config = self.config
    with jax.default_matmul_precision(config.matmul_precision.value):
      logits = source_logits(source, carry.queries, config.normalization_layer_epsilon, self.heads)
    return dataclasses.replace(carry, sources=carry.sources.put(index, source, logits))


def source_logits(
  source: Float[Array, "B T D"], queries: Float[Array, "M D"], epsilon: float, heads: int
) -> Float[Array, "MH B T"]:
  """q_s · (RMS(V) ⊙ g_s) for all queries q ⊙ g and the channels of each head, in float32 or wider. The norm, over all
  channels, is applied to the product."""
  source = source.astype(kernels.accumulation_dtype(source.dtype))
  inverse = jax.lax.rsqrt(jnp.square(source).mean(-1) + epsilon)
  if heads == 1:
    return contract("btd,md->mbt", source, queries.astype(source.dtype)) * inverse
  width = source.shape[-1] // heads
  parts, of_parts = (x.reshape(*x.shape[:-1], heads, width) for x in (source, queries.astype(source.dtype)))
  logits = jnp.einsum("bthd,mhd->mhbt", parts, of_parts)
  return logits.reshape(len(queries) * heads, *inverse.shape) * inverse
