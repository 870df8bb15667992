"""Attention Residuals (AttnRes, Kimi team, arXiv 2603.15031), full and block.

Sources are V_0, the embedding, and sums of the outputs of S consecutive sublayers without any residual added; S = 1 is
Full AttnRes. Sublayer s, and the final norm as the last, reads

  h_s = Σ_j p_j V_j,    p = softmax_j(q_s · (RMS(V_j) ⊙ g_s))

over the embedding, the sums of finished blocks of S sublayers, and the sum of its own block so far. Values are not
normed and logits are not scaled. With q_s = 0, as at the start, all weights are equal: h_s is the residual stream of
the plain model divided by the number of sources, which the norm of the sublayer removes up to its ε.

The paper calls a sublayer a layer, and counts S in sublayers.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxtext_mudd.connections import metrics
from maxtext_mudd.connections.attnres import keys
from maxtext_mudd.connections.mesh import passes, source_sharding
from maxtext_mudd.connections.scored_sources import ScannedSources, SourceBuffer, SourceList
from maxtext_mudd.connections.sublayers import LayerOutput, SublayerConnection, SublayerInput
from maxtext_mudd.kernels import accumulation_dtype


class DepthQueries(nnx.Module):
  """The queries of all M aggregates: of each sublayer, and of the final norm.

  Parameters, in `weight_dtype`: `query` [M,D] zero, `key_norm` [M,D] one.
  """

  def __init__(self, config):
    shape, dtype = (keys.sublayers(config) + 1, config.emb_dim), config.weight_dtype
    self.query = nnx.Param(jnp.zeros(shape, dtype), out_sharding=(None, "embed"))
    self.key_norm = nnx.Param(jnp.ones(shape, dtype), out_sharding=(None, "embed"))

  def __call__(self) -> Float[Array, "M D"]:
    """q_s ⊙ g_s, in float32 or wider. The logits depend on this product only."""
    wide = accumulation_dtype(self.query[...].dtype)
    return self.query[...].astype(wide) * self.key_norm[...].astype(wide)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttnResCarry:
  """What flows between blocks.

  Attributes:
    sources: that aggregates have read so far, the embedding first.
    newest: the sum of the block of S sublayers so far, or the last finished one: the source that no aggregate has read
      yet. Every aggregate puts it after the sources, or in place of the last one, an earlier value of the same sum.
    queries: of all aggregates.
    sublayer: number of the sublayer that comes next; None in single layers, whose connections know it.
  """

  sources: SourceList | ScannedSources | SourceBuffer
  newest: Float[Array, "B T D"]
  queries: Float[Array, "M D"]
  sublayer: Int[Array, ""] | None


class AttnResConnection(SublayerConnection):
  """The connection of one block, or of all blocks of a scanned stack. All queries belong to the connection that starts:
  the logits of a source for every later query are made when the source is made."""

  rematerialises = True

  def __init__(self, config, blocks: Sequence[int], mesh: jax.sharding.Mesh, *, starts: bool, finishes: bool):
    super().__init__(config, blocks, starts=starts, finishes=finishes)
    self.mesh = mesh
    if starts:
      self.depth_queries = DepthQueries(config)

  def start(self, embedding: Float[Array, "B T D"], rematerialise: Callable | None = None) -> AttnResCarry:
    queries = self.depth_queries()
    if not self.config.scan_layers:
      return AttnResCarry(SourceList(), embedding, queries, None)
    number = keys.count_sources(self.config, keys.sublayers(self.config))
    sharding = source_sharding(self.config, self.mesh, embedding.shape)
    sources = ScannedSources.zeros(embedding, len(queries), number, sharding, rematerialise)
    return AttnResCarry(sources, embedding, queries, jnp.zeros((), jnp.int32))

  def through(self, block: Callable, state: Any, carry: AttnResCarry, arguments: Any) -> tuple[AttnResCarry, Any]:
    return carry.sources.through(block, state, carry, arguments)

  def read(self, carry: AttnResCarry) -> SublayerInput:
    first = 2 * (self.blocks[0] - 1) if carry.sublayer is None else carry.sublayer

    def after_feed_forward(carry):
      after = None if carry.sublayer is None else carry.sublayer + 2
      return LayerOutput(carry.newest, lambda newest: dataclasses.replace(carry, newest=newest, sublayer=after))

    def after_attention(carry):
      return self._sublayer_input("ffn", carry, first + 1, after_feed_forward)

    return self._sublayer_input("attention", carry, first, after_attention)

  def finish(self, carry: AttnResCarry, sown: Any = ()) -> tuple[Float[Array, "B T D"], Any]:
    sublayers = keys.sublayers(self.config)
    carry = self.put_newest(carry, sublayers)
    carry, sown = carry.sources.finish(carry, sown)
    return self.mix("x", carry, sublayers)[0], sown

  def put_newest(self, carry: AttnResCarry, sublayer: int | Int[Array, ""]) -> AttnResCarry:
    """The carry with its newest source among the sources, for a sublayer that reads it."""
    config, newest = self.config, carry.newest
    logits = source_logits(newest, carry.queries, config.normalization_layer_epsilon, config.matmul_precision.value)
    sources = carry.sources.put(keys.count_sources(config, sublayer) - 1, newest, logits)
    return dataclasses.replace(carry, sources=sources)

  def mix(
    self, reader: str, carry: AttnResCarry, sublayer: int | Int[Array, ""]
  ) -> tuple[Float[Array, "B T D"], AttnResCarry]:
    """h_s, and the carry for what reads the sources next.

    Args:
      reader: what reads h_s, for metrics: attention, ffn; x after the last block.
    """
    config, newest = self.config, carry.newest
    count = keys.count_sources(config, sublayer)
    logits, sources = carry.sources.take_logits(sublayer, count)
    weights = jnp.moveaxis(jax.nn.softmax(logits, axis=0), 0, -1)[..., None, :]
    (hidden,), sources = sources.mix(passes(config, self.mesh, newest.shape), weights, count)
    if config.record_internal_nn_metrics:
      metrics.sow_aggregate(self, newest, weights, {reader: hidden}, count - 1, last=reader == "x")
    return hidden, dataclasses.replace(carry, sources=sources)

  def _sublayer_input(
    self, reader: str, carry: AttnResCarry, sublayer: int | Int[Array, ""], after: Callable
  ) -> SublayerInput:
    """The input of one sublayer; `after` takes the carry that the sublayer's output makes."""
    hidden, carry = self.mix(reader, self.put_newest(carry, sublayer), sublayer)

    def write(carried, output):
      (newest,) = carried
      newest = jnp.where(sublayer % self.config.mudd_attnres_block == 0, output, newest + output)
      return after(dataclasses.replace(carry, newest=newest))

    return SublayerInput(hidden, (carry.newest,), write)


def source_logits(
  source: Float[Array, "B T D"], queries: Float[Array, "M D"], epsilon: float, precision: str
) -> Float[Array, "M B T"]:
  """q_s · (RMS(V) ⊙ g_s) for all queries q ⊙ g, in float32 or wider. The norm is applied to the product."""
  source = source.astype(accumulation_dtype(source.dtype))
  inverse = jax.lax.rsqrt(jnp.square(source).mean(-1) + epsilon)
  with jax.default_matmul_precision(precision):
    return jnp.einsum("btd,md->mbt", source, queries.astype(source.dtype)) * inverse
