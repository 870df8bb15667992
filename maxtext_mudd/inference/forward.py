"""Functions of a model, compiled, which leave the model as it was."""

from collections.abc import Callable
import functools

from flax import nnx
from flax.core.spmd import logical_axis_rules
import jax


def pure(function: Callable) -> Callable:
  """The same of (model, *arrays), compiled once for each structure of the model and shapes of the arrays.

  `nnx.jit` would write back what layers sow, as the load balance losses of experts: the model would be another one
  after each call, and be compiled again. What `function` changes in the model is lost.

  Args:
    function: of a model that has `mesh` and `config`, and of arrays; returns arrays.
  """

  @jax.jit
  def compiled(graph, state, *arrays):
    return function(nnx.merge(graph, state), *arrays)

  @functools.wraps(function)
  def call(model, *arrays):
    with jax.set_mesh(model.mesh), logical_axis_rules(model.config.logical_axis_rules):
      # The graph goes as a tree without leaves: as a static argument, all that is in a model would have to be hashable.
      return compiled(*nnx.split(model), *arrays)

  return call
