"""What families of n residual streams share: blocks read a mix of the streams and write to all of them.

For a sublayer (attention or FFN) with function F, streams H [n,D] and, for each token, W [n+1,n] and β [n]:

  M = W H;  H' = M[1:] + β ⊗ F(M[0])

A family says how W and β are computed from H, and how the streams become one hidden state after the last block.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxtext_mudd.connections import kept, metrics
from maxtext_mudd.connections.connection import Passed, where_first
from maxtext_mudd.connections.sublayers import LayerOutput, SublayerConnection, SublayerInput
from maxtext_mudd.kernels import accumulation_dtype, mix

StreamList = Sequence[Float[Array, "B T D"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamsCarry:
  """What flows between blocks.

  Attributes:
    streams: H: n residual streams, one array each, never stacked.
    sublayer: number of the sublayer that reads them next, from 0; known at run time only where layers are scanned.
    product: of M[1:] over all sublayers so far, each as a matrix [target, source]; None unless metrics are recorded.
  """

  streams: tuple[Float[Array, "B T D"], ...]
  sublayer: Int[Array, ""]
  product: Float[Array, "B T n n"] | None = None


class SublayerWeights(Protocol):
  """The module of a family at one sublayer."""

  def __call__(
    self, streams: StreamList, sublayer: Int[Array, ""]
  ) -> tuple[Float[Array, "B T n+1 n"], list[Float[Array, "B T 1"]]]:
    """W and the entries of β, in at least float32.

    Args:
      sublayer: its number, from 0: attention of block 1, its FFN, attention of block 2, ...
    """


class StreamsConnection(SublayerConnection):
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
    super().__init__(config, blocks, starts=starts, finishes=finishes)
    if blocks:
      first = 2 * (blocks[0] - 1)
      self.attention = make(first)
      self.feed_forward = make(first + 1)
    if finishes:
      self.head = head

  def start(self, embedding: Float[Array, "B T D"], rematerialise: Callable | None = None) -> StreamsCarry:
    n, product = self.config.mudd_expansion_rate, None
    if self.config.record_internal_nn_metrics:
      wide = accumulation_dtype(embedding.dtype)
      product = jnp.broadcast_to(jnp.eye(n, dtype=wide), (*embedding.shape[:2], n, n))
    return StreamsCarry((embedding,) * n, jnp.zeros((), jnp.int32), product)

  def read(self, carry: StreamsCarry) -> SublayerInput:
    self._keep_history(carry)

    def after_feed_forward(carry):
      return LayerOutput(carry.streams, lambda streams: dataclasses.replace(carry, streams=streams))

    def after_attention(carry):
      return self.sublayer_input("ffn", self.feed_forward, carry, after_feed_forward)

    return self.sublayer_input("attention", self.attention, carry, after_attention)

  def sublayer_input(
    self, name: str, weights: SublayerWeights, carry: StreamsCarry, after: Callable[[StreamsCarry], Any]
  ) -> SublayerInput:
    """M[0] and M[1:] of one sublayer.

    Args:
      name: of the sublayer, for metrics.
      after: takes the carry that the sublayer's output makes.
    """
    with jax.default_matmul_precision(self.config.matmul_precision.value):
      w, beta = weights(carry.streams, carry.sublayer)
    # In plain JAX: XLA can fuse this with the writes before it, which are n times as many bytes as a sublayer's output.
    mixed = mix(carry.streams, w, implementation="xla")
    kept.keep(self, "streams", {name: mixed[0]})
    if kept.is_on("weights"):
      kept.keep(self, "weights", {name: w})
      kept.keep(self, "written", {name: jnp.concatenate(beta, -1)})
    product = carry.product
    if product is not None:
      product = jnp.einsum("...ij,...jk->...ik", w[..., 1:, :], product, precision=jax.lax.Precision.HIGHEST)
      self._sow(name, w, beta, mixed[0], product)
    carry = dataclasses.replace(carry, sublayer=carry.sublayer + 1, product=product)

    def write(carried, output):
      kept.keep_norms(self, [output], [name])
      added = (m.astype(w.dtype) + b * output.astype(w.dtype) for m, b in zip(carried, beta))
      return after(dataclasses.replace(carry, streams=tuple(x.astype(output.dtype) for x in added)))

    return SublayerInput(mixed[0], tuple(mixed[1:]), write)

  def _sow(self, name: str, w, beta, read: Float[Array, "B T D"], product: Float[Array, "B T n n"]) -> None:
    """Sows, of one sublayer: the sums of its absolute weights W[0] and β, averaged over tokens; the root mean square of
    its input; and the largest sums of absolute entries of a row and of a column, among all tokens of a microbatch, of
    the product of mixing matrices so far: how much a stream, or its gradient, may have grown (Section 3.1 of arXiv
    2512.24880)."""
    statistics = {
      "read_weight": jnp.abs(w[..., 0, :]).sum(-1).mean(),
      "write_weight": sum(jnp.abs(b).mean() for b in beta),
      "norm": metrics.root_mean_square(read),
      "row_sum": jnp.abs(product).sum(-1).max(),
      "column_sum": jnp.abs(product).sum(-2).max(),
    }
    metrics.sow(self, name, statistics)

  def finish(self, carry: StreamsCarry, sown: Any = ()) -> tuple[Float[Array, "B T D"], StreamsCarry, Any]:
    hidden = self.head(carry.streams)
    self._keep_history(carry, last=True)
    kept.keep(self, "streams", {"x": hidden}, last=True)
    if kept.is_on("weights"):
      kept.keep(self, "weights", {"x": head_weights(self.head, carry.streams)}, last=True)
    return hidden, carry, sown

  def pass_on(self, carry: StreamsCarry) -> Passed:
    return Passed((), carry.streams)

  def resume(self, start: StreamsCarry, passed: Passed, block: Int[Array, ""]) -> StreamsCarry:
    return StreamsCarry(where_first(block, start.streams, passed.whole), 2 * block)

  def _keep_history(self, carry: StreamsCarry, last: bool = False) -> None:
    if kept.is_on("history"):
      kept.keep(self, "history", {"x": jnp.stack(carry.streams, 2)}, last=last)


def head_weights(head: Callable, streams: StreamList) -> Float[Array, "B T n"]:
  """How a head mixes the streams."""
  if head in (total, mean):
    return jnp.full((*streams[0].shape[:2], len(streams)), 1 if head is total else 1 / len(streams))
  return head.weights(streams)


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
