"""DeepCrossAttention (DCA, Heddes et al., arXiv 2502.06785).

Sources G_0, the embedding, and G_i, what block i adds to its residual stream. For each of the streams o = q, k, v of a
block, and once before the final norm, a generalised residual network (GRN) sums them:

  GRN_o(G) = Σ_j (b_oj + relu(w_o · (RMS(G_j) ⊙ g))) ⊙ G_j        b_oj [D]: GRN-v3, with the relu; GRN-v2, without it
                                                                 b_oj a number: GRN-v1

  a = Attention(LN_q(q), LN_k(k), LN_v(v));    G_{i+1} = a + FFN(LN(a + q))

so q is also the residual stream, which is no part of the source. With b = 1 and w = 0, as at the start, all streams are
the sum of all sources, and the model is the plain Transformer.

k-DCA reads fewer sources. `mudd_dca_sources: middle_sum` is how the paper describes it, as later sources report it; its
full text was not at hand. `first_and_last` is the public code (lucidrains, at 35a0046).
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.blocks.streams import Streams, decouple
from maxtext_mudd.connections import layout, metrics
from maxtext_mudd.connections.base import Site
from maxtext_mudd.connections.dca import keys
from maxtext_mudd.connections.scored_sources import ScoredCarry, ScoredConnection
from maxtext_mudd.connections.sublayers import SublayerInput, read_sublayer_input
from maxtext_mudd.kernels import ChannelWeights, Passes, Weights, accumulation_dtype


class DepthQueries(nnx.Module):
  """The queries of all M aggregates of GRN-v3: q, k and v of each block, and the hidden state.

  Parameters, in `weight_dtype`: `w` [M,D] zero, `key_norm` [L+1,D] one.
  """

  def __init__(self, config):
    width, dtype = config.emb_dim, config.weight_dtype
    self.w = nnx.Param(jnp.zeros((keys.queries(config), width), dtype), out_sharding=(None, "embed"))
    self.key_norm = nnx.Param(jnp.ones((config.num_decoder_layers + 1, width), dtype), out_sharding=(None, "embed"))

  def __call__(self) -> Float[Array, "M D"]:
    """w_o ⊙ g, in float32 or wider."""
    w, scale = self.w[...], self.key_norm[...]
    wide = accumulation_dtype(w.dtype)
    of_blocks = jnp.repeat(scale[:-1], 3, axis=0)
    return w.astype(wide) * jnp.concatenate([of_blocks, scale[-1:]]).astype(wide)


class StaticWeights(nnx.Module):
  """The static weights of one aggregate.

  Parameters, in `weight_dtype`: `b` [C,D,N] one; [C,1,N] for GRN-v1.
  """

  def __init__(self, config, site: Site):
    is_scalar = config.mudd_dca_weights == "v1"
    shape = (site.ways, 1 if is_scalar else config.emb_dim, len(site.sources))
    self.b = nnx.Param(jnp.ones(shape, config.weight_dtype), out_sharding=(None, None if is_scalar else "embed", None))


class DcaConnection(ScoredConnection):
  """The connection of one block, or of all blocks of a scanned stack. `newest` of its carry is G_i. Where middle
  sources are summed, the sum is the first of the sources, zero as long as there are none, and in `others`."""

  def __init__(self, config, blocks: Sequence[int], mesh: jax.sharding.Mesh, *, starts: bool, finishes: bool):
    has_queries = starts and keys.queries(config)
    queries = DepthQueries(config) if has_queries else lambda: jnp.zeros((0, config.emb_dim))
    self.has_sum = config.mudd_dca_sources == "middle_sum"
    number = config.num_decoder_layers + 1 + self.has_sum
    super().__init__(config, blocks, mesh, queries, number, starts=starts, finishes=finishes)
    plan = keys.plan(config)
    if blocks:
      self.table = layout.table(plan, blocks, padded=config.scan_layers)
      self.depth_aggregate = StaticWeights(config, self.table.padded)
    if finishes:
      self.final_site = plan.sites[plan.num_blocks]
      self.final_depth_aggregate = StaticWeights(config, self.final_site)

  def adapt(self, layer: nnx.Module) -> None:
    """Attention has three norms, each of which reads a stream; the FFN's norm reads the sum with attention."""
    block = block_spec(self.config)
    decouple(layer, block.attention_norm)
    read_sublayer_input(layer, block.feed_forward_norm)

  def start(self, embedding: Float[Array, "B T D"], rematerialise=None) -> ScoredCarry:
    carry = super().start(embedding, rematerialise)
    return dataclasses.replace(carry, others=(jnp.zeros_like(embedding),)) if self.has_sum else carry

  def read(self, carry: ScoredCarry) -> Streams:
    block = self.blocks_before(carry)
    slots = self._slots(block) if carry.blocks is None else jnp.asarray(self._all_slots())[block + 1 - self.blocks[0]]
    carry = self.put_newest(carry, block)
    (q, k, v), carry = self.mix("qkv", carry, block, self.depth_aggregate, slots)

    def after_attention(_, attention):
      return SublayerInput(q + attention, (attention,), after_feed_forward)

    def after_feed_forward(carried, output):
      (attention,) = carried
      return self.layer_output(dataclasses.replace(carry, newest=attention + output))

    return Streams(q, k, v, SublayerInput(q, (), after_attention))

  def finish(self, carry: ScoredCarry, sown: Any = ()) -> tuple[Float[Array, "B T D"], Any]:
    blocks = self.config.num_decoder_layers
    carry = self.put_newest(carry, blocks)
    carry, sown = carry.sources.finish(carry, sown)
    (hidden,), _ = self.mix("x", carry, blocks, self.final_depth_aggregate, self._slots(blocks))
    return hidden, sown

  def put_newest(self, carry: ScoredCarry, block: int | Int[Array, ""]) -> ScoredCarry:
    """The carry with G_block among the sources, and with the source that this makes a middle one in the sum."""
    newest = carry.newest
    if not self.has_sum:
      return self.put(carry, block, newest)
    (total,) = carry.others
    leaves = block - self.config.mudd_dca_last
    if not isinstance(block, int):
      taken, sources = carry.sources.take(1 + jnp.maximum(leaves, 1))
      carry, total = dataclasses.replace(carry, sources=sources), jnp.where(leaves >= 1, total + taken, total)
    elif leaves >= 1:
      taken, sources = carry.sources.take(1 + leaves)
      carry, total = dataclasses.replace(carry, sources=sources), total + taken
    carry = self.put(dataclasses.replace(carry, others=(total,)), 0, total)
    return self.put(carry, 1 + block, newest)

  def mix(
    self, names: str, carry: ScoredCarry, block: int | Int[Array, ""], module: StaticWeights, slots
  ) -> tuple[list[Float[Array, "B T D"]], ScoredCarry]:
    """The streams of one aggregate, and the carry for what reads the sources next.

    Args:
      names: of the streams.
      block: how many blocks came before.
      slots: which of the carried sources each column of b is for; more than there are, where it is for none.
    """
    newest, sources, b = carry.newest, carry.sources, module.b[...]
    count = block + 1 + self.has_sum
    logits = jnp.zeros((self.number, len(names), *newest.shape[:2]), accumulation_dtype(newest.dtype))
    if keys.queries(self.config):
      logits, sources = sources.take_logits(3 * block, len(names), count)
    # Unlike jax.nn.relu, maximum has a gradient at zero, so that w can leave its initial value.
    dynamic = jnp.maximum(jnp.moveaxis(logits, (0, 1), (3, 2)), 0)
    if self.config.scan_layers:
      slots = jnp.asarray(slots)
      b = jnp.zeros((*b.shape[:2], self.number), b.dtype).at[..., slots].set(b, mode="drop")
      is_read = jnp.zeros((self.number,), bool).at[slots].set(True, mode="drop")
      weights = self._weights(jnp.where(is_read, dynamic, 0), b)
      streams, sources = sources.mix(Passes("xla"), weights, count)
    else:
      weights = self._weights(dynamic[..., np.array(slots)], b)
      streams, sources = sources.mix(Passes("xla"), weights, count, slots)
    if self.config.record_internal_nn_metrics:
      total = weights if isinstance(weights, jax.Array) else weights.w + weights.a.mean(1)
      column = count - 1 if self.config.scan_layers else -1
      metrics.sow_aggregate(self, newest, total, dict(zip(names, streams)), column, last=names == "x")
    return streams, dataclasses.replace(carry, sources=sources)

  def _weights(self, dynamic: Float[Array, "B T C N"], b) -> Weights:
    return b[:, 0] if self.config.mudd_dca_weights == "v1" else ChannelWeights(dynamic, b)

  def _slots(self, block: int) -> tuple[int, ...]:
    """Where the sources that are mixed after a block are among those that are carried."""
    middle = block - self.config.mudd_dca_last if keys.has_middle_sum(self.config, block) else None
    return tuple(0 if j == middle else j + self.has_sum for j in keys.sources(self.config, block))

  def _all_slots(self) -> np.ndarray:
    """For each block of the stack, the slots of all columns of the padded b."""
    table = np.full((len(self.blocks), len(self.table.padded.sources)), self.number)
    for row, block in zip(table, self.blocks):
      row[list(keys.sources(self.config, block - 1))] = self._slots(block - 1)
    return table
