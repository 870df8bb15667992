"""DeepCrossAttention (DCA, Heddes et al., arXiv 2502.06785).

Sources G_0, the embedding, and G_i, what block i adds to its residual stream. For each of the streams o = q, k, v of a
block, and once before the final norm, a generalised residual network (GRN) sums them:

  GRN_o(G) = Σ_j (b_oj + relu(w_o · (RMS(G_j) ⊙ g))) ⊙ G_j        b_oj [D]: GRN-v3, with the relu; GRN-v2, without it
                                                                 b_oj a number: GRN-v1

  a = Attention(LN_q(q), LN_k(k), LN_v(v));    G_{i+1} = a + FFN(LN(a + q))

so q is also the residual stream, which is no part of the source. With b = 1 and w = 0, as at the start, all streams are
the sum of all sources, and the model is the plain Transformer; not so with `first_and_last`, which leaves sources out.

The formula of GRN and `mudd_dca_sources: first_and_last`, its k-DCA, are those of the public code (lucidrains, at
35a0046; the authors released none), whose norm has the machine's ε where this one has `normalization_layer_epsilon`,
and where the derivative of relu at zero is 0, so that w keeps its initial value, zero; here it is 1/2. The norm's scale
g is one vector for q, k and v of a block.
`middle_sum` is k-DCA as descriptions of the paper have it; the paper's full text was not at hand.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from maxtext_mudd.blocks import num_blocks, stacks
from maxtext_mudd.blocks.streams import Streams
from maxtext_mudd.connections import kept, layout, metrics
from maxtext_mudd.connections.base import Site
from maxtext_mudd.connections.dca import keys
from maxtext_mudd.connections.mesh import passes, split_as
from maxtext_mudd.connections.scored_sources import ScoredCarry, ScoredConnection
from maxtext_mudd.connections.sublayers import SublayerInput
from maxtext_mudd.kernels import ChannelWeights, Weights, accumulation_dtype, differentiable


class GrnQueries(nnx.Module):
  """The queries of all M aggregates: q, k and v of each block, and the hidden state. Only GRN-v3 has any.

  Parameters, in `weight_dtype`: `w` [M,D] zero, `key_norm` [L+1,D] one.
  """

  def __init__(self, config):
    self.config = config
    if keys.count_queries(config):
      width, dtype = config.emb_dim, config.weight_dtype
      self.w = nnx.Param(jnp.zeros((keys.count_queries(config), width), dtype), out_sharding=(None, "embed"))
      self.key_norm = nnx.Param(jnp.ones((num_blocks(config) + 1, width), dtype), out_sharding=(None, "embed"))

  def __call__(self) -> Float[Array, "M D"]:
    """w_o ⊙ g, in float32 or wider."""
    if not keys.count_queries(self.config):
      return jnp.zeros((0, self.config.emb_dim))
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


class Reading(NamedTuple):
  """Which R sources an aggregate reads.

  Attributes:
    slots: int [R], where they are among those that are carried.
    columns: int [R], which columns of b are for them.
    is_there: bool [R]; false for padding at the front, since all blocks of a scanned stack read equally many.
  """

  slots: Any
  columns: Any
  is_there: Any


class DcaConnection(ScoredConnection):
  """The connection of one block, or of all blocks of a scanned stack. `newest` of its carry is G_i. Where middle
  sources are summed, the sum is the first of the sources, zero as long as there are none, and in `others`."""

  decouples = True

  def __init__(self, config, blocks: Sequence[int], mesh: jax.sharding.Mesh, *, starts: bool, finishes: bool):
    queries = GrnQueries(config) if starts else None
    self.has_sum = config.mudd_dca_sources == "middle_sum"
    number = num_blocks(config) + 1 + self.has_sum
    super().__init__(config, blocks, mesh, queries, number, starts=starts, finishes=finishes)
    plan = keys.plan(config)
    if blocks:
      site = layout.table(plan, blocks, padded=config.scan_layers).padded
      self.depth_aggregate = StaticWeights(config, site)
    if finishes:
      self.final_depth_aggregate = StaticWeights(config, plan.sites[plan.num_blocks])

  def start(self, embedding: Float[Array, "B T D"], rematerialise=None) -> ScoredCarry:
    carry = super().start(embedding, rematerialise)
    return dataclasses.replace(carry, others=(jnp.zeros_like(embedding),)) if self.has_sum else carry

  def read(self, carry: ScoredCarry) -> Streams:
    kept.keep(self, "history", {"x": carry.newest})
    block = self.blocks_before(carry)
    reading = self.reading(block) if carry.blocks is None else self._reading_in_stack(block + 1)
    (q, k, v), carry = self.mix("qkv", self.put_newest(carry, block), block, self.depth_aggregate, reading)

    def after_attention(carried, attention):
      return SublayerInput(carried[0] + attention, (attention,), after_feed_forward)

    def after_feed_forward(carried, output):
      return self.layer_output(dataclasses.replace(carry, newest=carried[0] + output))

    return Streams(q, k, v, SublayerInput(q, (q,), after_attention))

  def finish(self, carry: ScoredCarry, sown: Any = ()) -> tuple[Float[Array, "B T D"], ScoredCarry, Any]:
    kept.keep(self, "history", {"x": carry.newest}, last=True)
    blocks, others = num_blocks(self.config), carry.others
    carry = self.put_newest(carry, blocks)
    carry, sown = carry.sources.finish(carry, sown)
    (hidden,), carry = self.mix("x", carry, blocks, self.final_depth_aggregate, self.reading(blocks))
    return hidden, dataclasses.replace(carry, others=others), sown

  def put_newest(self, carry: ScoredCarry, block: int | Int[Array, ""]) -> ScoredCarry:
    """The carry with G_block among the sources, and with the source that this makes a middle one in the sum."""
    newest = carry.newest
    if not self.has_sum:
      return self.put(carry, block, newest)
    (total,) = carry.others
    leaves = block - self.config.mudd_dca_k
    if carry.blocks is not None:  # as block is an array
      taken, sources = carry.sources.take(1 + jnp.maximum(leaves, 1))
      carry, total = dataclasses.replace(carry, sources=sources), jnp.where(leaves >= 1, total + taken, total)
    elif leaves >= 1:
      taken, sources = carry.sources.take(1 + leaves)
      carry, total = dataclasses.replace(carry, sources=sources), total + taken
    carry = self.put(dataclasses.replace(carry, others=(total,)), 0, total)
    return self.put(carry, 1 + block, newest)

  def mix(
    self, names: str, carry: ScoredCarry, block: int | Int[Array, ""], module: StaticWeights, reading: Reading
  ) -> tuple[list[Float[Array, "B T D"]], ScoredCarry]:
    """The streams of one aggregate, and the carry for what reads the sources next.

    Args:
      names: of the streams.
      block: how many blocks came before.
    """
    config, sources, b = self.config, carry.sources, module.b[...]
    if config.mudd_dca_weights != "v1":
      b = split_as(b, 1, carry.newest)
    how = passes(config, self.mesh, carry.newest.shape)
    count = block + 1 + self.has_sum
    shape = (*carry.newest.shape[:2], len(names))
    dynamic = jnp.zeros((*shape, self.number), accumulation_dtype(carry.newest.dtype))
    if keys.count_queries(config):
      logits, sources = sources.take_logits(3 * block, len(names), count)
      # Unlike jax.nn.relu, maximum has a gradient at zero, so that w can leave its initial value.
      dynamic = jnp.maximum(jnp.moveaxis(logits, (0, 1), (3, 2)), 0)
    used = dynamic
    if config.scan_layers and config.mudd_dca_sources == "all":
      b = jnp.pad(b, [(0, 0), (0, 0), (0, self.number - b.shape[-1])])
      weights = self._weights(dynamic, b)
      streams, sources = sources.mix(how, weights, count)
    else:
      slots, columns, is_there = reading
      chosen = []
      for k in range(len(slots)):
        source, sources = sources.take(slots[k])
        chosen.append(source)
      used, b = (jnp.where(is_there, x, 0) for x in (dynamic[..., slots], b[..., columns]))
      weights = self._weights(used, b)
      streams = differentiable(how, chosen, weights)
      kept.keep_norms(self, chosen, names, last=names == "x")
    kept.keep(self, "streams", dict(zip(names, streams)), last=names == "x")
    if kept.is_on("weights"):
      of_streams = {name: used[:, :, c] + b[c].astype(used.dtype).mean(0) for c, name in enumerate(names)}
      kept.keep(self, "weights", of_streams, last=names == "x")
      if keys.count_queries(config):
        kept.keep(self, "gates", {name: used[:, :, c] for c, name in enumerate(names)}, last=names == "x")
    if keys.count_queries(config):
      metrics.sow_largest(self, metrics.sample(used), last=names == "x")
    if config.record_internal_nn_metrics:
      self._sow(names, carry.newest, weights, streams, count)
    return streams, dataclasses.replace(carry, sources=sources)

  def _weights(self, dynamic: Float[Array, "B T C N"], b: Float[Array, "C D N"]) -> Weights:
    return b[:, 0] if self.config.mudd_dca_weights == "v1" else ChannelWeights(dynamic[:, :, :, None], b)

  def _sow(self, names: str, newest, weights: Weights, streams, count) -> None:
    """The statistics of the mean over channels of absolute weights."""
    if isinstance(weights, ChannelWeights):
      weights = jnp.abs(weights.w + weights.a).mean(-2)
    is_buffer = self.config.scan_layers and self.config.mudd_dca_sources == "all"
    column = count - 1 if is_buffer else -1
    metrics.sow_aggregate(self, newest, weights, dict(zip(names, streams)), column, last=names == "x")

  def reading(self, block: int, number: int | None = None) -> Reading:
    """What is read after a block, of a single layer.

    Args:
      number: of sources, to which those that are not there are added at the front, so that the newest is the last.
    """
    numbers = keys.sources(self.config, block)
    middle = block - self.config.mudd_dca_k if keys.has_middle_sum(self.config, block) else None
    slots = [0 if j == middle else j + self.has_sum for j in numbers]
    missing = 0 if number is None else number - len(slots)
    columns = range(len(slots)) if number is None else numbers  # b has a column for each source where it is padded
    front = [0] * missing
    return Reading(
      np.array([*front, *slots]), np.array([*front, *columns]), np.array([False] * missing + [True] * len(slots))
    )

  def _reading_in_stack(self, block: Int[Array, ""]) -> Reading:
    """What a block of the stack reads, by its number."""
    number = max(len(keys.sources(self.config, block - 1)) for block in self.blocks)
    readings = [self.reading(block - 1, number) for block in self.blocks]
    return Reading(*(jnp.asarray(np.stack(x))[stacks.index(self.blocks, block)] for x in zip(*readings)))
