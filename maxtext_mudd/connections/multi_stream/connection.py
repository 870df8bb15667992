"""What families of n residual streams share: blocks read a mix of the streams and write to all of them.

For a sublayer (attention or FFN) with function F, streams H [n,D] and, for each token, W [n+1,n] and β [n]:

  M = W H;  H' = M[1:] + β ⊗ F(M[0])

A family says how W and β are computed from H, and how the streams become one hidden state after the last block.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Protocol

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxtext_mudd.connections.connection import PlainConnection
from maxtext_mudd.connections.sublayers import SublayerInput, read_sublayer_inputs
from maxtext_mudd.kernels import accumulation_dtype, mix

StreamList = Sequence[Float[Array, "B T D"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResidualStreams:
  """H: n residual streams, one [B,T,D] array each, never stacked. Not a tuple: stock layers unpack tuples."""

  streams: tuple[Float[Array, "B T D"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamsCarry:
  """What flows between blocks. Stock layers see `residual` alone: they shard every array that they take or return as a
  [B,T,D] array.

  Attributes:
    residual: the residual streams.
    sublayer: number of the sublayer that reads them next, from 0; known at run time only where layers are scanned.
  """

  residual: ResidualStreams
  sublayer: Int[Array, ""]


class SublayerWeights(Protocol):
  """The module of a family at one sublayer."""

  def __call__(
    self, streams: StreamList, sublayer: Int[Array, ""]
  ) -> tuple[Float[Array, "B T n+1 n"], list[Float[Array, "B T 1"]]]:
    """W and the entries of β, in at least float32.

    Args:
      sublayer: its number, from 0: attention of block 1, its FFN, attention of block 2, ...
    """


class StreamsConnection(PlainConnection):
  """The connection of one block: W and β before attention, and before the FFN. Where layers are scanned, those of all
  blocks of a stack; the carry knows the number of the sublayer.

  Args:
    make: from the number of a sublayer to its `SublayerWeights`.
    head: from the streams to the hidden state after the last block; an `nnx.Module`, or a function of a module.
  """

  def __init__(
    self,
    config,
    blocks: Sequence[int],
    make: Callable[[int], SublayerWeights],
    head: Callable[[StreamList], Float[Array, "B T D"]],
    *,
    starts: bool,
    finishes: bool,
  ):
    super().__init__(blocks, starts=starts, finishes=finishes)
    self.config = config
    if blocks:
      first = 2 * (blocks[0] - 1)
      self.attention = make(first)
      self.feed_forward = make(first + 1)
    if finishes:
      self.head = head

  def adapt(self, layer: nnx.Module) -> None:
    read_sublayer_inputs(layer, self.config)

  def start(self, embedding: Float[Array, "B T D"], rematerialise: Callable | None = None) -> StreamsCarry:
    streams = ResidualStreams((embedding,) * self.config.mudd_expansion_rate)
    return StreamsCarry(streams, jnp.zeros((), jnp.int32))

  def through(self, block: Callable, state: Any, carry: StreamsCarry, arguments: Any) -> tuple[StreamsCarry, Any]:
    residual, _, rest = block(state, carry.residual, carry.sublayer, arguments)
    return StreamsCarry(residual, carry.sublayer + 2), rest

  def read(self, residual: ResidualStreams, sublayer: Int[Array, ""]) -> SublayerInput:
    """M[0] and M[1:] of attention. Adding attention's output makes those of the FFN, and adding the FFN's the
    streams."""

    def feed_forward_input(residual):
      return self.sublayer_input(self.feed_forward, residual, sublayer + 1, after=lambda streams: streams)

    return self.sublayer_input(self.attention, residual, sublayer, after=feed_forward_input)

  def sublayer_input(
    self, weights: SublayerWeights, residual: ResidualStreams, sublayer: Int[Array, ""], after: Callable
  ) -> SublayerInput:
    """M of one sublayer; `after` takes the streams that the sublayer's output makes."""
    with jax.default_matmul_precision(self.config.matmul_precision.value):
      w, beta = weights(residual.streams, sublayer)
    # In plain JAX: XLA can fuse this with the writes before it, which are n times as many bytes as a sublayer's output.
    mixed = mix(residual.streams, w, implementation="xla")

    def write(carried, output):
      added = (m.astype(w.dtype) + b * output.astype(w.dtype) for m, b in zip(carried, beta))
      return after(ResidualStreams(tuple(x.astype(output.dtype) for x in added)))

    return SublayerInput(mixed[0], tuple(mixed[1:]), write)

  def finish(self, carry: StreamsCarry, sown: Any = ()) -> tuple[Float[Array, "B T D"], Any]:
    return self.head(carry.residual.streams), sown


def total(streams: StreamList) -> Float[Array, "B T D"]:
  """The sum of the streams."""
  wide = accumulation_dtype(streams[0].dtype)
  return sum(h.astype(wide) for h in streams).astype(streams[0].dtype)


def mean(streams: StreamList) -> Float[Array, "B T D"]:
  """The mean of the streams; equal streams give their value exactly."""
  first, *others = streams
  wide = accumulation_dtype(first.dtype)
  excess = sum((h.astype(wide) - first.astype(wide) for h in others), jnp.zeros((), wide))
  return (first.astype(wide) + excess / len(streams)).astype(first.dtype)
