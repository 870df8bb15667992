"""The dense family: static or dynamic weights, one way or one per stream (DenseFormer, DDFormer, MUDD)."""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxtext_mudd import kernels
from maxtext_mudd.blocks import ATTENTION_NORMS
from maxtext_mudd.connections import metrics
from maxtext_mudd.connections.history import History
from maxtext_mudd.connections.norms import rms_norm
from maxtext_mudd.streams import Streams, decouple
from maxtext_mudd.topology import Aggregate, Topology

POST_NORM_INIT = 1e-3  # scale of the post-norm at the start (paper, Eq. 10)


class DepthAggregate(nnx.Module):
  """One DA (paper, Eqs. 5, 6 and 10): from the sources to the streams of the next block.

  Parameters, in `weight_dtype`: `w1` [D,K] from N(0, 1/D), `w2` [K,C,N] zero, `a` [C,N] one at the newest source; or
  zero where pre- and post-norm are both on, for then X_i is added after the sum. So the model starts as the plain
  Transformer, except with only one of the two norms (released: the same). Norm scales [D] where
  `mudd_weight_norm_scale` or `mudd_post_norm` ask for them.
  """

  def __init__(self, config, aggregate: Aggregate, rngs: nnx.Rngs):
    self.config = config
    self.aggregate = aggregate
    ways, sources = aggregate.ways, len(aggregate.sources)
    dtype = config.weight_dtype
    if config.mudd_dynamic:
      init = jax.nn.initializers.normal(stddev=config.emb_dim**-0.5)
      shape = (config.emb_dim, aggregate.hidden)
      self.w1 = nnx.Param(init(rngs.params(), shape, dtype), out_sharding=("embed", None))
      self.w2 = nnx.Param(jnp.zeros((aggregate.hidden, ways, sources), dtype), out_sharding=(None, None, None))
      if config.mudd_weight_norm_scale:
        self.weight_norm_scale = nnx.Param(jnp.ones((config.emb_dim,), dtype), out_sharding=("norm",))
    if config.mudd_static:
      self.a = nnx.Param(self._initial_static(dtype), out_sharding=(None, None))
    if config.mudd_post_norm:
      for stream in aggregate.streams:
        if self._is_post_normed(stream):
          norm = rms_norm(config, rngs, scale_init=jax.nn.initializers.constant(POST_NORM_INIT))
          setattr(self, f"post_norm_{stream}", norm)

  def _is_post_normed(self, stream: str) -> bool:
    return stream == "x" or stream in self.config.mudd_post_norm_streams

  def _initial_static(self, dtype) -> Float[Array, "C N"]:
    a = jnp.zeros((self.aggregate.ways, len(self.aggregate.sources)), dtype)
    both_norms = self.config.mudd_pre_norm and self.config.mudd_post_norm
    return a if both_norms else a.at[:, -1].set(1)

  def operands(self):
    """(w1, w2, a) as `depth_aggregate` takes them; the scale of the norm before W1 is folded into W1."""
    a = self.a[...] if self.config.mudd_static else self._initial_static(self.config.weight_dtype)
    if not self.config.mudd_dynamic:
      return None, None, a
    w1 = self.w1[...]
    if self.config.mudd_weight_norm_scale:
      w1 = self.weight_norm_scale[...][:, None] * w1
    return w1, self.w2[...], a

  def __call__(self, history: History) -> dict[str, Float[Array, "B T D"]]:
    """The streams this DA makes, by name; each [B,T,D] in the dtype of the sources."""
    config = self.config
    sources = [history.sources[j] for j in self.aggregate.sources]
    operands = self.operands()
    settings = {"activation": config.mudd_activation, "epsilon": config.normalization_layer_epsilon}
    with jax.default_matmul_precision(config.matmul_precision.value):
      outputs = kernels.depth_aggregate(
        sources,
        *operands,
        ways=self.aggregate.ways,
        newest=history.newest,
        implementation=config.mudd_kernel,
        **settings,
      )
      streams = {}
      for stream, x in zip(self.aggregate.streams, outputs):
        if config.mudd_post_norm:
          if self._is_post_normed(stream):
            x = getattr(self, f"post_norm_{stream}")(x)
          x = x + history.newest
        streams[stream] = x
      if config.record_internal_nn_metrics:
        metrics.sow(self, history.newest, operands, streams, **settings)
    return streams


class DenseConnection(nnx.Module):
  """The part of the connections that lives in one block: the DA that feeds it and, in the last block, DA_L.

  So the carry between blocks is the history alone: under rematerialisation a block saves X_0..X_i, which are there
  once, and its four streams are made again in the backward pass (the memory figure of the paper's Table 6). A custom
  policy that keeps `decoder_layer_input` keeps the four streams.
  """

  carry = History

  def __init__(self, config, topology: Topology, block: int, rngs: nnx.Rngs):
    self.config = config
    self.is_first = block == 1
    self.is_last = block == topology.num_blocks
    self.pre_normed = config.mudd_pre_norm
    before = topology.before(block)
    final = topology.aggregates.get(block) if self.is_last else None
    self.reads_streams = before is not None and before.streams != "x"
    if config.mudd_pre_norm:
      if self.is_first:
        self.embedding_norm = rms_norm(config, rngs)
      self.output_norm = rms_norm(config, rngs)
    self.depth_aggregate = DepthAggregate(config, before, rngs) if before else None
    self.final_depth_aggregate = DepthAggregate(config, final, rngs) if final else None

  def fit(self, layer: nnx.Module) -> None:
    if self.reads_streams or (self.is_first and self.config.mudd_first_block_norms == "separate"):
      decouple(layer, ATTENTION_NORMS[self.config.decoder_block.value])

  def start(self, embedding: Float[Array, "B T D"]) -> History:
    source = self.embedding_norm(embedding) if self.pre_normed else embedding
    return History((source,), embedding)

  def read(self, history: History) -> Streams | Float[Array, "B T D"]:
    """The input of this block: four streams, or one array where they are all the same."""
    if self.depth_aggregate is None:
      return history.newest
    made = self.depth_aggregate(history)
    if "x" in made:
      return made["x"]
    return Streams(*(made.get(stream, history.newest) for stream in "qkvr"))

  def write(self, history: History, output: Float[Array, "B T D"]) -> History:
    return history.append(self.output_norm(output) if self.pre_normed else output, output)

  def finish(self, history: History) -> Float[Array, "B T D"]:
    """The hidden state after the last block."""
    if self.final_depth_aggregate is None:
      return history.newest
    (hidden,) = self.final_depth_aggregate(history).values()
    return hidden
