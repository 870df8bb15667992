"""Compiles functions of a model, such as its forward pass. The compiled function does not change the model."""

from collections.abc import Callable
import functools

from flax import nnx
from flax.core.spmd import logical_axis_rules
import jax


def pure(function: Callable) -> Callable:
  """A decorator that compiles a function of (model, *arrays), once for each structure of the model and array shapes.

  Changes that `function` makes to the model are lost. `nnx.jit` would keep them: layers sow values, such as the load
  balance losses of experts, so the model would change in each call and would be compiled again.

  Args:
    function: takes a model that has `mesh` and `config`, and arrays. Returns arrays.
  """

  @jax.jit
  def compiled(graph, state, *arrays):
    return function(nnx.merge(graph, state), *arrays)

  @functools.wraps(function)
  def call(model, *arrays):
    with jax.set_mesh(model.mesh), logical_axis_rules(model.config.logical_axis_rules):
      # The graph is passed as a tree without leaves. In a static argument, everything would have to be hashable.
      return compiled(*nnx.split(model), *arrays)

  return call
