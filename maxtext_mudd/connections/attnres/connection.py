"""Attention Residuals (AttnRes, Kimi team, arXiv 2603.15031), full and block.

Sources are V_0, the embedding, and sums of the outputs of S consecutive sublayers without any residual added; S = 1 is
Full AttnRes. Sublayer s, and the final norm as the last, reads

  h_s = Σ_j p_j V_j,    p = softmax_j(q_s · (RMS(V_j) ⊙ g_s))

over the embedding, the sums of finished blocks of S sublayers, and the sum of its own block so far. Values are not
normed and logits are not scaled. With q_s = 0, as at the start, all weights are equal: h_s is the residual stream of
the plain model divided by the number of sources, which the norm of the sublayer removes up to its ε.

The paper calls a sublayer a layer, and counts S in sublayers. This is `naive_attnres` of flash-linear-attention
(bc3b101), and the pseudo-code in the authors' README with `layer_number` from 0 and `blocks=[]` at the start, with one
more aggregate before the final norm.
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
from maxtext_mudd.connections.mesh import passes
from maxtext_mudd.connections.scored_sources import ScoredCarry, ScoredConnection
from maxtext_mudd.connections.sublayers import SublayerInput
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


class AttnResConnection(ScoredConnection):
  """The connection of one Transformer block, or of all of a scanned stack.

  `newest` of its carry is the sum of S sublayers as far as it goes, or the last finished sum. An aggregate puts it
  after the sources, or in place of the last one where that is an earlier value of the same sum.
  """

  def __init__(self, config, blocks: Sequence[int], mesh: jax.sharding.Mesh, *, starts: bool, finishes: bool):
    queries = DepthQueries(config) if starts else None
    number = keys.count_sources(config, keys.sublayers(config))
    super().__init__(config, blocks, mesh, queries, number, starts=starts, finishes=finishes)

  def read(self, carry: ScoredCarry) -> SublayerInput:
    first = 2 * self.blocks_before(carry)

    def after_attention(carry):
      return self._sublayer_input("ffn", carry, first + 1, self.layer_output)

    return self._sublayer_input("attention", carry, first, after_attention)

  def finish(self, carry: ScoredCarry, sown: Any = ()) -> tuple[Float[Array, "B T D"], Any]:
    sublayers = keys.sublayers(self.config)
    carry = self.put_newest(carry, sublayers)
    carry, sown = carry.sources.finish(carry, sown)
    return self.mix("x", carry, sublayers)[0], sown

  def put_newest(self, carry: ScoredCarry, sublayer: int | Int[Array, ""]) -> ScoredCarry:
    """The carry with its newest source among the sources, for a sublayer that reads it."""
    return self.put(carry, keys.count_sources(self.config, sublayer) - 1, carry.newest)

  def mix(
    self, reader: str, carry: ScoredCarry, sublayer: int | Int[Array, ""]
  ) -> tuple[Float[Array, "B T D"], ScoredCarry]:
    """h_s, and the carry for what reads the sources next.

    Args:
      reader: what reads h_s, for metrics: attention, ffn; x after the last block.
    """
    config, newest = self.config, carry.newest
    count = keys.count_sources(config, sublayer)
    logits, sources = carry.sources.take_logits(sublayer, 1, count)
    weights = jnp.moveaxis(jax.nn.softmax(logits, axis=0), (0, 1), (3, 2))
    (hidden,), sources = sources.mix(passes(config, self.mesh, newest.shape), weights, count)
    if config.record_internal_nn_metrics:
      metrics.sow_aggregate(self, newest, weights, {reader: hidden}, count - 1, last=reader == "x")
    return hidden, dataclasses.replace(carry, sources=sources)

  def _sublayer_input(
    self, reader: str, carry: ScoredCarry, sublayer: int | Int[Array, ""], after: Callable
  ) -> SublayerInput:
    """The input of one sublayer; `after` takes the carry that the sublayer's output makes."""
    hidden, carry = self.mix(reader, self.put_newest(carry, sublayer), sublayer)

    def write(carried, output):
      (newest,) = carried
      newest = jnp.where(sublayer % self.config.mudd_attnres_block == 0, output, newest + output)
      return after(dataclasses.replace(carry, newest=newest))

    return SublayerInput(hidden, (carry.newest,), write)
