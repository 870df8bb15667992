"""Attention Residuals (AttnRes, Kimi team, arXiv 2603.15031), full and block.

Sources are V_0, the embedding, and sums of the outputs of S consecutive sublayers without any residual added; S = 1 is
Full AttnRes. Sublayer s, and the final norm as the last, reads

  h_s = Σ_j p_j V_j,    p = softmax_j(q_s · (RMS(V_j) ⊙ g_s))

over the embedding, the sums of finished blocks of S sublayers, and the sum of its own block so far. Values are not
normed and logits are not scaled. With q_s = 0, as at the start, all weights are equal: h_s is the residual stream of
the plain model divided by the number of sources, which the norm of the sublayer removes up to its ε.

With H heads (`mudd_attnres_heads`) the channels are H equal parts, and p is a softmax for each part. The logit of a
head is the product over its part; RMS is over all channels. The paper's main models have one head; its Table 4 tries
16. With `mudd_attnres_value_route` the values of attention read an aggregate with a query of its own, as in MUDD's
streams; this is not in the paper.

The paper calls a sublayer a layer, and counts S in sublayers. This is `naive_attnres` of flash-linear-attention
(bc3b101), and for even S the pseudo-code in the authors' README with `layer_number` from 0 and `blocks=[]` at the
start, with one more aggregate before the final norm. The last block may have fewer sublayers.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxtext_mudd.blocks.streams import Streams
from maxtext_mudd.connections import kept, metrics
from maxtext_mudd.connections.attnres import keys
from maxtext_mudd.connections.mesh import passes
from maxtext_mudd.connections.scored_sources import ScoredCarry, ScoredConnection
from maxtext_mudd.connections.sublayers import SublayerInput
from maxtext_mudd.kernels import ChannelWeights, accumulation_dtype


class DepthQueries(nnx.Module):
  """The M queries: one for each stream of the aggregate of a sublayer, and one for the final aggregate.

  Parameters, in `weight_dtype`: `query` [M,D] zero, `key_norm` [M,D] one.
  """

  def __init__(self, config):
    shape, dtype = (keys.count_queries(config), config.emb_dim), config.weight_dtype
    self.query = nnx.Param(jnp.zeros(shape, dtype), out_sharding=(None, "embed"))
    self.key_norm = nnx.Param(jnp.ones(shape, dtype), out_sharding=(None, "embed"))

  def __call__(self) -> Float[Array, "M D"]:
    """q_s ⊙ g_s, in float32 or wider. The logits depend on this product only."""
    wide = accumulation_dtype(self.query[...].dtype)
    return self.query[...].astype(wide) * self.key_norm[...].astype(wide)


class AttnResConnection(ScoredConnection):
  """The connection of one Transformer block, or of all of a scanned stack.

  `newest` of its carry is the sum of S sublayers as far as it goes, or the last finished sum. An aggregate puts it
  after the sources, or in place of the last one where that is an earlier value of the same sum.
  """

  def __init__(self, config, blocks: Sequence[int], mesh: jax.sharding.Mesh, *, starts: bool, finishes: bool):
    queries = DepthQueries(config) if starts else None
    number = keys.count_sources(config, keys.sublayers(config))
    super().__init__(
      config, blocks, mesh, queries, number, heads=config.mudd_attnres_heads, starts=starts, finishes=finishes
    )
    self.decouples = config.mudd_attnres_value_route

  def read(self, carry: ScoredCarry) -> SublayerInput | Streams:
    kept.keep(self, "history", {"x": carry.newest})
    first = 2 * self.blocks_before(carry)

    def after_attention(carry):
      return self._sublayer_input(["ffn"], carry, first + 1, self.layer_output)[0]

    if not self.decouples:
      return self._sublayer_input(["attention"], carry, first, after_attention)[0]
    x, (q, v) = self._sublayer_input(["attention", "value"], carry, first, after_attention)
    return Streams(q, q, v, x)

  def finish(self, carry: ScoredCarry, sown: Any = ()) -> tuple[Float[Array, "B T D"], ScoredCarry, Any]:
    kept.keep(self, "history", {"x": carry.newest}, last=True)
    sublayers = keys.sublayers(self.config)
    carry = self.put_newest(carry, sublayers)
    carry, sown = carry.sources.finish(carry, sown)
    (hidden,), carry = self.mix(["x"], carry, sublayers)
    return hidden, carry, sown

  def put_newest(self, carry: ScoredCarry, sublayer: int | Int[Array, ""]) -> ScoredCarry:
    """The carry with its newest source among the sources, for a sublayer that reads it."""
    return self.put(carry, keys.count_sources(self.config, sublayer) - 1, carry.newest)

  def mix(
    self, readers: Sequence[str], carry: ScoredCarry, sublayer: int | Int[Array, ""]
  ) -> tuple[list[Float[Array, "B T D"]], ScoredCarry]:
    """h_s, and with a value route that of values; and the carry for what reads the sources next.

    Args:
      readers: what reads each of them, for metrics: attention, value, ffn; x after the last block.
    """
    config, newest, heads = self.config, carry.newest, self.heads
    count, query = keys.count_sources(config, sublayer), keys.first_query(config, sublayer)
    logits, sources = carry.sources.take_logits(query * heads, len(readers) * heads, count)
    of_rows = jnp.moveaxis(jax.nn.softmax(logits, axis=0), (0, 1), (3, 2))
    per_head = of_rows.reshape(*of_rows.shape[:2], len(readers), heads, -1)
    if heads == 1:
      streams, sources = sources.mix(passes(config, self.mesh, newest.shape), of_rows, count)
    else:
      how = dataclasses.replace(passes(config, self.mesh, newest.shape), implementation="xla", sharding=None)
      streams, sources = sources.mix(how, ChannelWeights(per_head), count)
    by_name, last = dict(zip(readers, streams)), "x" in readers
    kept.keep(self, "streams", by_name, last=last)
    if kept.is_on("norms"):  # in single layers
      kept.keep_norms(self, sources.sources, readers, last=last)
    kept.keep(self, "weights", {name: _of_reader(per_head, k) for k, name in enumerate(readers)}, last=last)
    if config.record_internal_nn_metrics:
      per_reader = per_head.mean(3)
      metrics.sow_aggregate(self, newest, per_reader, by_name, count - 1, last=last)
    return streams, dataclasses.replace(carry, sources=sources)

  def _sublayer_input(
    self, readers: Sequence[str], carry: ScoredCarry, sublayer: int | Int[Array, ""], after: Callable
  ) -> tuple[SublayerInput, list[Float[Array, "B T D"]]]:
    """The input of one sublayer, and all streams that are read; `after` takes the carry that its output makes."""
    streams, carry = self.mix(readers, self.put_newest(carry, sublayer), sublayer)

    def write(carried, output):
      (newest,) = carried
      newest = jnp.where(sublayer % self.config.mudd_attnres_block == 0, output, newest + output)
      return after(dataclasses.replace(carry, newest=newest))

    return SublayerInput(streams[0], (carry.newest,), write), streams


def _of_reader(weights: Float[Array, "B T R H N"], k: int) -> Float[Array, "B T N"] | Float[Array, "B T H N"]:
  """The weights of one reader; with one head without the axis of heads."""
  return weights[:, :, k, 0] if weights.shape[3] == 1 else weights[:, :, k]
