"""The dense family: static or dynamic weights, one way or one per stream (DenseFormer, DDFormer, MUDD)."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from maxtext.utils import sharding

from maxtext_mudd import kernels
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.blocks.streams import Streams, decouple
from maxtext_mudd.connections import history, metrics
from maxtext_mudd.connections.history import History
from maxtext_mudd.connections.mudd.topology import STREAMS, Aggregate, Topology
from maxtext_mudd.connections.norms import rms_norm

POST_NORM_INIT = 1e-3  # scale of the post-norm at the start (paper, Eq. 10)


class DepthAggregate(nnx.Module):
  """One DA (paper, Eqs. 5, 6 and 10): from the sources to the streams of the next block.

  Parameters, in `weight_dtype`: `w1` [D,K] from N(0, 1/D), `w2` [K,C,N] zero, `a` [C,N] one at the newest source; or
  zero where pre- and post-norm are both on, for then X_i is added after the sum. With both norms or neither, the model
  starts as the plain Transformer. With one of them it does not; neither does the released code. Norm scales [D] where
  `mudd_weight_norm_scale` or `mudd_post_norm` ask for them.
  """

  def __init__(self, config, aggregate: Aggregate, mesh: jax.sharding.Mesh, rngs: nnx.Rngs):
    self.config = config
    self.aggregate = aggregate
    self.mesh = mesh
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

  def weights(self, newest: Float[Array, "B T D"] | None = None) -> kernels.Weights:
    """What `kernels.mix` takes; the scale of the norm before W1 is folded into W1.

    Args:
      newest: X_i; None: it is the newest source.
    """
    config = self.config
    a = self.a[...] if config.mudd_static else self._initial_static(config.weight_dtype)
    if not config.mudd_dynamic:
      return a
    w1 = self.w1[...]
    if config.mudd_weight_norm_scale:
      w1 = self.weight_norm_scale[...][:, None] * w1
    return kernels.WeightMLP(
      self._by_width(w1),
      self.w2[...],
      a,
      newest,
      activation=config.mudd_activation,
      epsilon=config.normalization_layer_epsilon,
    )

  def _by_width(self, w1: Float[Array, "D K"]) -> Float[Array, "D K"]:
    """W1, sharded over D as sources are. Otherwise the compiler would gather X_i, which is many times larger."""
    layout = source_sharding(self.config, self.mesh, (1, 1, w1.shape[0]))
    if layout is None or len(layout.spec) < 3 or layout.spec[2] is None:
      return w1
    return jax.lax.with_sharding_constraint(w1, NamedSharding(self.mesh, P(layout.spec[2], None)))

  def streams(
    self, sums, output: Float[Array, "B T D"], weights: kernels.Weights | None = None, column=-1
  ) -> dict[str, Float[Array, "B T D"]]:
    """The streams by name, from the sums of Eq. 5 and X_i: post-normed where that is on.

    Args:
      weights: those of the sums; None: `self.weights(output)`.
      column: of the newest source in them.
    """
    config = self.config
    streams = {}
    for stream, x in zip(self.aggregate.streams, sums):
      if config.mudd_post_norm:
        if self._is_post_normed(stream):
          x = getattr(self, f"post_norm_{stream}")(x)
        x = x + output
      streams[stream] = x
    if config.record_internal_nn_metrics:
      metrics.sow(self, output, self.weights(output) if weights is None else weights, streams, column)
    return streams


def has_own_norms(config, topology: Topology, block: int) -> bool:
  """Whether a block has LN_q, LN_k and LN_v."""
  before = topology.before(block)
  reads_streams = before is not None and before.streams != "x"
  return reads_streams or (block == 1 and config.mudd_first_block_norms == "separate")


class DenseConnection(nnx.Module):
  """The part of the connections that lives in one block: the DA that feeds it and, in the last block, DA_L.

  The carry between blocks is the history alone. Under rematerialisation a block keeps X_0..X_i, which exist once, and
  its four streams are recomputed in the backward pass (memory in Table 6 of the paper). A custom policy that keeps
  `decoder_layer_input` keeps the four streams.
  """

  carry = History

  def __init__(self, config, topology: Topology, block: int, mesh: jax.sharding.Mesh, rngs: nnx.Rngs):
    self.config = config
    self.topology = topology
    self.mesh = mesh
    self.is_first = block == 1
    self.is_last = block == topology.num_blocks
    self.pre_normed = config.mudd_pre_norm
    before = topology.before(block)
    final = topology.aggregates.get(block) if self.is_last else None
    # Where the whole block is recomputed in the backward pass, the pass of the next aggregate recomputes its streams. A
    # decoder whose policy is overridden, as MaxText's retry without dropping does, recomputes blocks by itself.
    self.recomputed = before is not None and config.remat_policy == "full"
    self.has_own_norms = has_own_norms(config, topology, block)
    if config.mudd_pre_norm:
      if self.is_first:
        self.embedding_norm = rms_norm(config, rngs)
      self.output_norm = rms_norm(config, rngs)
    self.depth_aggregate = DepthAggregate(config, before, mesh, rngs) if before else None
    self.final_depth_aggregate = DepthAggregate(config, final, mesh, rngs) if final else None

  def fit(self, layer: nnx.Module) -> None:
    if self.has_own_norms:
      decouple(layer, block_spec(self.config).attention_norm)

  def start(self, embedding: Float[Array, "B T D"]) -> History:
    if self.pre_normed:
      return History((self.embedding_norm(embedding),), embedding)
    return History((embedding,))

  def read(self, carry: History) -> tuple[Streams | Float[Array, "B T D"], History]:
    """The input of this block: four streams, or one array where they are all the same."""
    sums, after = self._aggregate(self.depth_aggregate, carry)
    return self.block_input(sums, carry.output), after

  def block_input(self, sums, output: Float[Array, "B T D"]) -> Streams | Float[Array, "B T D"]:
    """The input of this block, from the sums of Eq. 5 and X_i."""
    if self.depth_aggregate is None:
      return output
    streams = self.depth_aggregate.streams(sums, output)
    if "x" in streams:
      return streams["x"]
    return Streams(*(streams.get(stream, output) for stream in STREAMS))

  def write(self, carry: History, output: Float[Array, "B T D"]) -> History:
    return carry.append(self.source(output), output)

  def source(self, output: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """What later aggregates mix."""
    return self.output_norm(output) if self.pre_normed else output

  def finish(self, carry: History) -> Float[Array, "B T D"]:
    """The hidden state after the last block."""
    if self.final_depth_aggregate is None:
      return carry.output
    sums, _ = self._aggregate(self.final_depth_aggregate, history.name_last(carry))
    (hidden,) = self.final_depth_aggregate.streams(sums, carry.output).values()
    return hidden

  def _aggregate(self, module: DepthAggregate | None, carry: History):
    if module is None:
      return None, carry
    return history.aggregate(self._link(module, carry), carry, module.weights(carry.newest))

  def through(self, block: Callable, state, carry: History, arguments) -> tuple[History, Any]:
    """The carry behind this block, which is recomputed in the backward pass: `history.through_block`."""
    module = self.depth_aggregate
    link = self._link(module, carry)
    return history.through_block(link, block, state, carry, module.weights(carry.newest), arguments)

  def _link(self, module: DepthAggregate, carry: History) -> history.Link:
    return history.Link(
      history.place(self.topology, module.aggregate.block), passes(self.config, self.mesh, carry.output.shape)
    )


def passes(config, mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> kernels.Passes:
  """How the passes over [B,T,D] sources run on this mesh."""
  implementation = kernels.resolve(config.mudd_kernel, mesh.devices.flat[0].platform, config.dtype)
  sharding = None if implementation == "xla" else source_sharding(config, mesh, shape)
  return kernels.Passes(implementation, sharding)


def source_sharding(config, mesh, shape) -> NamedSharding | None:
  """How block outputs lie on the mesh; None on one device."""
  if mesh.size == 1:
    return None
  names = ("activation_batch", "activation_norm_length", "activation_embed")
  rules = sharding.get_logical_axis_rules() or config.logical_axis_rules  # evaluation may have its own
  spec = sharding.logical_to_mesh_axes(names, mesh, rules=rules)
  return NamedSharding(mesh, sharding.adjust_pspec_for_indivisible_shapes(spec, shape, mesh))
