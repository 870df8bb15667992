"""Arrays that a forward pass keeps, and changes that it makes to the weights of aggregates.

Both are on in a context only, `observing`, in which the pass is traced. `inference.inspection` uses it.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxtext_mudd import kernels
from maxtext_mudd.connections.base import Site

STREAMS = "qkvrxm"  # all letters that `Site.streams` may have
NAME = re.compile(r"kept_(last_)?([a-z]+)_([a-z0-9]+)")  # is it after the last block; kind; stream or sublayer


class Kept(nnx.Intermediate):
  """An array that was kept."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
  """A change of the weights of aggregates. Arrays are of all DAs, all letters of `STREAMS` and all sources.

  Attributes:
    replaced: which weights are replaced, by [i, letter, source number + number of extra embeddings].
    values: what they are replaced by; None: by their static part.
  """

  replaced: Bool[Array, "I S N"]
  values: Float[Array, "I S N"] | None = None

  def __call__(self, weights: kernels.Weights, site: Site, oldest: int, newest: Float[Array, "B T D"]):
    """The weights of one aggregate, after the change.

    Args:
      oldest: number of the oldest source.
    """
    static = weights.a if isinstance(weights, kernels.WeightMLP) else weights
    rows, columns = jnp.array([STREAMS.index(x) for x in site.streams]), jnp.array(site.sources) - oldest
    replaced, values = (x if x is None else x[site.block][rows[:, None], columns] for x in (self.replaced, self.values))
    values = static if values is None else values
    return jnp.where(replaced, values, kernels.token_weights([newest], weights)[0])


_functions: Mapping[str, Callable[[Array], Any]] = {}
_edit: Edit | None = None


@contextlib.contextmanager
def observing(functions: Mapping[str, Callable[[Array], Any]], edit: Edit | None = None) -> Iterator[None]:
  """A context in which models keep arrays, as variables of the type `Kept` in the modules that made them.

  Args:
    functions: by the kind of an array, such as "weights", what is kept of it. Other kinds are not kept.
    edit: a change of the weights of aggregates.
  """
  global _functions, _edit
  before = _functions, _edit
  _functions, _edit = functions, edit
  try:
    yield
  finally:
    _functions, _edit = before


def is_on(*kinds: str) -> bool:
  """Whether arrays of one of these kinds are kept."""
  return any(kind in _functions for kind in kinds)


def keep(module: nnx.Module, kind: str, arrays: Mapping[str, Array], *, last: bool = False) -> None:
  """Keeps arrays of a kind, if that kind is kept.

  Args:
    arrays: by stream or sublayer.
    last: whether they are of what follows the last block; the connection of the last block may have both.
  """
  for stream, x in arrays.items() if kind in _functions else ():
    name = f"kept_{'last_' if last else ''}{kind}_{stream}"
    module.sow(Kept, name, _functions[kind](x), reduce_fn=lambda _, new: new, init_fn=lambda: None)


def edited(weights: kernels.Weights, site: Site, oldest: int, newest: Float[Array, "B T D"]) -> kernels.Weights:
  """The weights of an aggregate, changed where there is an `Edit`."""
  return weights if _edit is None else _edit(weights, site, oldest, newest)
