"""The dense family where the layers are scanned: all blocks of a stack alike, which one it is known at run time only.

Parameters of aggregates are padded to one shape. Columns count sources from X_0 on, whichever an aggregate sees; hidden
widths are filled up at the end. What is not there in a block is zero, gets a gradient of zero and so stays zero.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
import numpy as np

from maxtext_mudd import kernels
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.blocks.streams import Streams, decouple
from maxtext_mudd.connections import buffer as buffers
from maxtext_mudd.connections.buffer import Buffer, Link
from maxtext_mudd.connections.mudd.aggregate import DepthAggregate, has_own_norms, passes, source_sharding
from maxtext_mudd.connections.mudd.topology import Aggregate, Topology
from maxtext_mudd.connections.norms import rms_norm


@dataclasses.dataclass(frozen=True)
class Table:
  """What holds for each block of a stack, looked up by its number.

  Attributes:
    blocks: numbers of the blocks.
    padded: the aggregates in front of them, padded to one; None where there are none.
    connected: whether an aggregate stands in front, by block.
    visible: the sources it sees, by block.
    hidden: its hidden width, by block.
    has_own_norms: whether the block has LN_q, LN_k and LN_v, by block.
  """

  blocks: tuple[int, ...]
  padded: Aggregate | None
  connected: tuple[bool, ...]
  visible: tuple[tuple[bool, ...], ...]
  hidden: tuple[int, ...]
  has_own_norms: tuple[bool, ...]

  def at(self, name: str, count):
    """An entry of the block whose number is `count`."""
    return jnp.asarray(np.array(getattr(self, name)))[count - self.blocks[0]]


def table(config, topology: Topology, blocks: Sequence[int]) -> Table:
  before = [topology.before(block) for block in blocks]
  there = [aggregate for aggregate in before if aggregate]
  columns = range(blocks[-1])
  padded = None
  if there:
    hidden = max(aggregate.hidden for aggregate in there)
    padded = Aggregate(blocks[-1] - 1, tuple(columns), there[0].streams, hidden)
  return Table(
    tuple(blocks),
    padded,
    tuple(aggregate is not None for aggregate in before),
    tuple(tuple(aggregate is not None and j in aggregate.sources for j in columns) for aggregate in before),
    tuple(aggregate.hidden if aggregate else 0 for aggregate in before),
    tuple(has_own_norms(config, topology, block) for block in blocks),
  )


class ScannedConnection(nnx.Module):
  """The part of the connections that lives in a stack of blocks: of each, the DA that feeds it. For the interface see
  `connections`; what is before and behind all blocks is in `Ends`."""

  carry = Buffer
  recomputed = True
  is_last = False

  def __init__(self, config, topology: Topology, blocks: Sequence[int], mesh: jax.sharding.Mesh, rngs: nnx.Rngs):
    self.config = config
    self.entries = topology.num_blocks + 1
    self.mesh = mesh
    self.table = table(config, topology, blocks)
    if config.mudd_pre_norm:
      self.output_norm = rms_norm(config, rngs)
    padded = self.table.padded
    self.depth_aggregate = DepthAggregate(config, padded, mesh, rngs) if padded else None

  def fit(self, layer: nnx.Module) -> None:
    if any(self.table.has_own_norms):
      decouple(layer, block_spec(self.config).attention_norm)

  def through(self, block: Callable, state: Any, carry: Buffer, arguments: Any) -> tuple[Buffer, Any]:
    """The carry behind a block; `block` takes its number before the streams."""
    graphdef, own = nnx.split(self.depth_aggregate) if self.depth_aggregate else (None, None)

    def weights(own, count, newest) -> kernels.Weights:
      return self._weights(nnx.merge(graphdef, own), count, newest)

    aggregates = passes(self.config, self.mesh, carry.sources.shape[1:])
    link = Link(aggregates, weights if self.depth_aggregate else None, block)
    return buffers.through_block(link, state, own, carry, arguments)

  def _weights(self, aggregate: DepthAggregate, count, newest: Float[Array, "B T D"] | None) -> kernels.Weights:
    """Of all entries of the buffer. Without an aggregate: the newest source, once."""
    config, own = self.config, self.table
    at_newest = jnp.arange(self.entries) == count - 1
    visible = self._fill(own.at("visible", count))
    weights = kernels.map_columns(aggregate.weights(newest), self._fill)
    if not config.mudd_static:
      start = 0 if config.mudd_pre_norm and config.mudd_post_norm else at_newest
      weights = kernels.replace_static(weights, lambda a: jnp.zeros_like(a) + start)
    weights = kernels.map_columns(weights, lambda x: jnp.where(visible, x, 0))
    if not all(own.connected) and not self._is_normed:
      connected = own.at("connected", count)
      weights = kernels.replace_static(weights, lambda a: jnp.where(connected, a, at_newest.astype(a.dtype)))
    return weights

  def _fill(self, x):
    """Columns up to the number of entries."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.entries - x.shape[-1])])

  @property
  def _is_normed(self) -> bool:
    return self.config.mudd_pre_norm or self.config.mudd_post_norm

  def block_input(self, count, sums, output: Float[Array, "B T D"]) -> Streams | Float[Array, "B T D"]:
    """The input of block `count` from the sums of Eq. 5 and X_i."""
    own, made = self.table, {"x": output}
    if self.depth_aggregate is not None:
      is_recorded = self.config.record_internal_nn_metrics
      weights = self._weights(self.depth_aggregate, count, output) if is_recorded else None
      made = self.depth_aggregate.streams(sums, output, weights, count - 1)
      if not all(own.connected) and self._is_normed:
        connected = own.at("connected", count)
        made = {stream: jnp.where(connected, x, output) for stream, x in made.items()}
    if "x" in made and not any(own.has_own_norms):
      return made["x"]
    choose = None
    if not all(own.has_own_norms):
      here = own.at("has_own_norms", count)

      def choose(parameter, of_q):
        return jnp.where(here, parameter, of_q)

    return Streams(*(made.get(stream, made.get("x", output)) for stream in "qkvr"), choose)

  def source(self, output: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """What later aggregates mix."""
    return self.output_norm(output) if self.config.mudd_pre_norm else output


class Ends(nnx.Module):
  """What stands before and behind the stacks: the norm of X_0, and DA_L."""

  def __init__(self, config, topology: Topology, mesh: jax.sharding.Mesh, rngs: nnx.Rngs):
    self.config = config
    self.num_blocks = topology.num_blocks
    self.mesh = mesh
    final = topology.aggregates.get(topology.num_blocks)
    self.embedding_norm = rms_norm(config, rngs) if config.mudd_pre_norm else None
    self.final_depth_aggregate = DepthAggregate(config, final, mesh, rngs) if final else None

  def start(self, embedding: Float[Array, "B T D"], rematerialise: Callable | None) -> Buffer:
    source = embedding if self.embedding_norm is None else self.embedding_norm(embedding)
    shape = (self.num_blocks + 1, *source.shape)
    sources, mirror = jnp.zeros(shape, source.dtype).at[0].set(source), jnp.zeros(shape, source.dtype)
    sharding = source_sharding(self.config, self.mesh, source.shape)
    if sharding is not None:
      sharding = NamedSharding(self.mesh, P(None, *sharding.spec))
      sources, mirror = (jax.lax.with_sharding_constraint(x, sharding) for x in (sources, mirror))
    newest = None if self.embedding_norm is None else embedding
    return Buffer(sources, mirror, jnp.ones((), jnp.int32), newest, rematerialise)

  def finish(self, carry: Buffer, sown: Any) -> tuple[Float[Array, "B T D"], Any]:
    """The hidden state after the last block, and what blocks left beside it, both to be read from here alone."""
    sources, newest, sown = buffers.close(carry, sown)
    return self._hidden(sources, newest), sown

  def _hidden(self, sources, newest) -> Float[Array, "B T D"]:
    output = sources[-1] if newest is None else newest
    module = self.final_depth_aggregate
    if module is None:
      return output
    count = jnp.asarray(self.num_blocks + 1)
    at = jnp.asarray(module.aggregate.sources)
    weights = kernels.map_columns(
      module.weights(newest), lambda x: jnp.zeros((*x.shape[:-1], self.num_blocks + 1), x.dtype).at[..., at].set(x)
    )
    buffer = kernels.Buffer(sources, count)
    sums = kernels.differentiable(passes(self.config, self.mesh, output.shape), buffer, weights)
    (hidden,) = module.streams(sums, output).values()
    return hidden


def pad(layers: nnx.Module, connection: ScannedConnection, axis: int) -> None:
  """Sets what does not exist in a block to zero, and the static weights to their start, in a stack of new layers.

  Args:
    axis: of the blocks, where a parameter has that many.
  """
  state = nnx.state(layers, nnx.Param)
  for path, param in nnx.to_flat_state(state):
    exists = existing(connection.config, connection.table, tuple(map(str, path)))
    if exists is None:
      continue
    value = param.get_value()
    value = jnp.moveaxis(value, axis, 0)
    if path[-1] == "a":
      value = jnp.zeros_like(value) + _initial_static(connection)
    value = jnp.where(exists.reshape(exists.shape + (1,) * (value.ndim - exists.ndim)), value, 0)
    param.set_value(jnp.moveaxis(value, 0, axis))
  nnx.update(layers, state)


def _initial_static(connection: ScannedConnection):
  """One at the newest source, [L,1,N]."""
  config, blocks = connection.config, np.array(connection.table.blocks)
  if config.mudd_pre_norm and config.mudd_post_norm:
    return 0
  return (np.arange(blocks[-1]) == blocks[:, None] - 1)[:, None]


def existing(config, own: Table, path: tuple[str, ...]) -> np.ndarray | None:
  """Which entries of a parameter exist, blocks first, as far as that is not the same for all that follow; None: all."""
  norm = block_spec(config).attention_norm
  if norm in path and path[path.index(norm) + 1] in "kv":
    return np.array(own.has_own_norms)
  if "depth_aggregate" not in path:
    return None
  hidden = np.array(own.hidden)[:, None] > np.arange(own.padded.hidden)
  visible = np.array(own.visible)
  name = path[-1]
  if name == "w1":
    return hidden[:, None]
  if name == "w2":
    return hidden[:, :, None, None] & visible[:, None, None]
  if name == "a":
    return visible[:, None]
  return np.array(own.connected)
