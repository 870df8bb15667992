"""Pipeline parallelism with depth connections, without repeats: MaxText's pipeline, in which a microbatch takes along
what later blocks read.

MaxText's loop runs all S stages as one batch, each on another microbatch, and then moves what they return one stage on.
With connections a stage returns entries of the buffer of its carry besides arrays [B,T,D]. An entry crosses a boundary
only if a later stage reads it (`connections.routes`). Those that a stage was given do not wait for its blocks, although
XLA sends them after these in programs for v5p; those that it makes do. All stages hold whole buffers, zero where an
entry does not exist or is not read.

Every stage computes the hidden state as if its blocks were the last ones, since all stages have the same code. Only
that of the last stage is used.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from maxtext.layers.pipeline import NNXPipeline
import numpy as np

from maxtext_mudd.blocks import num_blocks
from maxtext_mudd.blocks.classes import change_class
from maxtext_mudd.config.changed import changed
from maxtext_mudd.connections.base import Connection
from maxtext_mudd.connections.connection import Passed
from maxtext_mudd.connections.routes import Pairs, Routes, routes


def connect_stages(pipeline: NNXPipeline, connection: Connection) -> None:
  """Makes a new pipeline pass on carries.

  Args:
    connection: the one that starts and finishes.
  """
  pipeline.connection = connection  # whose parameters are the decoder's: NNX has them under the first of their paths
  if connection.rematerialises:
    # Blocks recompute what they need from the buffer as a stage leaves it, which is kept. MaxText would keep the buffer
    # as a stage finds it instead, and run all its blocks once more.
    pipeline.config = changed(pipeline.config, set_remat_policy_on_pipeline_iterations=False)
  change_class(pipeline, ConnectedPipeline)


def rematerialisation(name: str | None, policy: Callable | None) -> Callable | None:
  """The argument `rematerialise` of `Connection.start` for a policy. None recomputes everything. MaxText treats the
  policy "none", which a configuration holds as None, like "full".

  Args:
    name: of the policy.
    policy: what MaxText makes of the name.
  """
  if name in (None, "full", "none"):
    return None
  return functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)


def is_floating_state(path, variable) -> bool:
  """Whether a variable is floating-point state that layers sow or update. A loss may read such state."""
  if isinstance(variable, nnx.Param):
    return False
  return all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(nnx.pure(variable)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StageInput:
  """What the S stages read.

  Attributes:
    embedding: X_0 of the microbatch in stage 0; anything in others.
    passed: from the stage before.
    block: number of blocks before the stage.
  """

  embedding: Float[Array, "S B T D"]
  passed: Passed
  block: Int[Array, " S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StageOutput:
  """What the S stages return, each array with S in front.

  Attributes:
    given: the entries before the stages' blocks.
    made: of each array of the buffer, the entries that a stage made.
    whole: other arrays of the carry.
    hidden: the hidden state, in the last stage.
  """

  given: Sequence[Float[Array, "S N ..."]]
  made: Sequence[Float[Array, "S K ..."]]
  whole: Any
  hidden: Float[Array, "S B T D"]


class ConnectedPipeline(NNXPipeline):
  """MaxText's pipeline without repeats, whose stages are layers with connections.

  Attributes:
    connection: the one that starts and finishes, with parameters that all stages share.
  """

  connection: Connection

  def init_states(self, inputs):
    states = super().init_states(inputs)
    empty = self._empty(states["shift"])
    states["shift"] = Passed(empty.given, empty.whole)
    if states["prev_outputs"] is not None:
      states["prev_outputs"] = empty
    return states

  def get_iteration_inputs(self, loop_iteration, state_io, circ_storage, shift):
    nothing = jnp.zeros_like(state_io[:, 0])  # in place of what the stage before passed on
    embedding = super().get_iteration_inputs(loop_iteration, state_io, circ_storage, nothing)
    return StageInput(embedding, shift, self._blocks_before())

  def get_main_vmap_func_for_iterations(self):
    of_connection, values = nnx.split(self.connection)
    rematerialise = rematerialisation(self.config.remat_policy, self.remat_policy)

    def run(values, graph, state, given: StageInput, segment_ids, positions, deterministic, model_mode):
      connection, stage = nnx.merge(of_connection, values), nnx.merge(graph, state)
      carry = connection.resume(connection.start(given.embedding, rematerialise), given.passed, given.block)
      before = connection.pass_on(carry)
      returned = stage(carry, segment_ids, positions, deterministic, model_mode)
      carry = returned[0] if isinstance(returned, tuple) else returned
      hidden, carry, sown = connection.finish(carry, nnx.state(stage, is_floating_state))
      nnx.update(stage, sown)
      for path, variable in nnx.to_flat_state(nnx.state(connection, nnx.Intermediate)):
        setattr(stage, path[-1], variable)  # what `finish` sowed; of the connection nothing else is returned
      after = connection.pass_on(carry)
      start = jnp.asarray(self._routes.starts)[given.block // self._length]
      made = tuple(jax.lax.dynamic_slice_in_dim(x, start, len(self._routes.made)) for x in after.entries)
      output = StageOutput(before.entries, made, after.whole, hidden)
      return (output, None) if self.config.scan_layers else output, nnx.state(stage)

    axis = {} if self.spmd_axis_name is None else {"spmd_axis_name": self.spmd_axis_name}
    mapped = jax.vmap(run, in_axes=(0, None, 0, 0, 0, 0, None, None), out_axes=(0, 0), **axis)
    # Each stage has them for itself. Of an operand that all stages share, `jax.vmap` adds up over the stages whatever a
    # `custom_vjp` returns, also what is the sum over the stages already.
    return functools.partial(mapped, jax.tree.map(self._of_each_stage, nnx.pure(values)))

  def get_new_loop_state(self, output: StageOutput, loop_state):
    before = loop_state["prev_outputs"]
    of_hidden = loop_state | {"prev_outputs": None if before is None else before.hidden}
    states = super().get_new_loop_state(output.hidden, of_hidden)  # its own `shift`, of hidden states, is dropped
    states["shift"] = self._move(output if before is None else before)
    states["prev_outputs"] = None if before is None else output
    return states

  @property
  def _length(self) -> int:
    """How many blocks a stage has."""
    return num_blocks(self.config) // self.num_stages

  @property
  def _routes(self) -> Routes:
    return routes(self.config)

  def _of_each_stage(self, x: Array) -> Float[Array, "S ..."]:
    return jnp.broadcast_to(x, (self.num_stages, *jnp.shape(x)))

  def _blocks_before(self) -> Int[Array, " S"]:
    return self._length * jnp.arange(self.num_stages, dtype=jnp.int32)

  def _empty(self, hidden: Float[Array, "S B T D"]) -> StageOutput:
    """Zeros, as the stages return before they get a microbatch."""
    passed = jax.eval_shape(lambda x: self.connection.pass_on(self.connection.start(x)), hidden[0])

    def zeros(shape, spec):
      x = jnp.zeros((self.num_stages, *shape.shape), shape.dtype)
      return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    given = tuple(map(zeros, passed.entries, self._entry_specs))
    made = tuple(jnp.zeros_like(x[:, : len(self._routes.made)]) for x in given)
    whole = jax.tree.map(lambda x: zeros(x, self.stages_in_spec), passed.whole)
    return StageOutput(given, made, whole, hidden)

  @property
  def _entry_specs(self) -> list[P]:
    """How the arrays of buffers lie on the mesh: [S,N,...]."""
    stage, *of_source = (*self.stages_in_spec, None, None, None)[:4]
    of_axis = dict(zip("btd", of_source))
    return [P(stage, None, *(of_axis.get(axis) for axis in axes)) for axes in self.connection.entry_axes]

  def _move(self, output: StageOutput) -> Passed:
    """What each stage is given by the one before."""

    def move(given, made, whole):
      stage = jax.lax.axis_index("stage")
      start = jnp.asarray(self._routes.starts)[jnp.maximum(stage - 1, 0)]
      entries = tuple(_arrange(self._routes, start, *x) for x in zip(given, made))
      boundaries = tuple((s, s + 1) for s in range(self.num_stages - 1))
      return Passed(entries, jax.tree.map(lambda x: jax.lax.ppermute(x, "stage", boundaries), whole))

    specs = tuple(self._entry_specs)
    mapped = jax.shard_map(
      move,
      mesh=self.mesh,
      in_specs=(specs, specs, self.stages_in_spec),
      out_specs=Passed(specs, self.stages_in_spec),
      check_vma=False,
    )
    return mapped(output.given, output.made, output.whole)


def _arrange(
  routes: Routes, start: Int[Array, ""], given: Float[Array, "1 N ..."], made: Float[Array, "1 K ..."]
) -> Float[Array, "1 N ..."]:
  """The buffer of a stage, zero where the stage before sends nothing.

  Args:
    start: the first entry that the stage before made.
  """
  buffer = jnp.zeros_like(given)
  for pairs, entries in routes.given.items():
    at = _slice(entries)
    buffer = buffer.at[:, at].set(jax.lax.ppermute(given[:, at], "stage", pairs))
  arrived = [_send(made[:, k : k + 1], pairs) for k, pairs in enumerate(routes.made)]
  return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.concatenate(arrived, 1), start, 1)


def _send(x: Array, pairs: Pairs) -> Array:
  return jax.lax.ppermute(x, "stage", pairs) if pairs else jnp.zeros_like(x)


def _slice(entries: Sequence[int]) -> slice | np.ndarray:
  """An index of these entries; a slice where they follow each other, which XLA copies at once."""
  first, last = entries[0], entries[-1]
  return slice(first, last + 1) if last - first + 1 == len(entries) else np.array(entries)
