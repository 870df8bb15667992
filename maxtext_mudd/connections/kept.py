"""Arrays that a forward pass keeps, and changes that it makes to the weights of aggregates.

Both are on in a context only, `observing`, in which the pass is traced. `inference.inspection` uses it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import contextvars
import dataclasses
import re
import types
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
  """A change of the weights of aggregates. Entry [i,s,n] of its arrays is of DA_i, the letter s of `STREAMS` and the
  source n - m, with m extra embeddings; I is larger than all i, and N than all n.

  Attributes:
    replaced: which weights are replaced.
    values: what they are replaced by; NaN: by their static part.
  """

  replaced: Bool[Array, "I S N"]
  values: Float[Array, "I S N"]

  def __call__(self, weights: kernels.Weights, site: Site, oldest: int, newest: Float[Array, "B T D"]):
    """The weights of one aggregate, after the change.

    Args:
      oldest: number of the oldest source.
    """
    static = weights.a if isinstance(weights, kernels.WeightMLP) else weights
    rows, columns = jnp.array([STREAMS.index(x) for x in site.streams]), jnp.array(site.sources) - oldest
    replaced, values = (x[site.block][rows[:, None], columns] for x in (self.replaced, self.values))
    values = jnp.where(jnp.isnan(values), static, values)
    return jnp.where(replaced, values, kernels.token_weights([newest], weights)[0])


_functions = contextvars.ContextVar("functions", default=types.MappingProxyType({}))
_edit = contextvars.ContextVar("edit", default=None)


@contextlib.contextmanager
def observing(functions: Mapping[str, Callable[[Array], Any]], edit: Edit | None = None) -> Iterator[None]:
  """A context in which models keep arrays, as variables of the type `Kept` in the modules that made them.

  Args:
    functions: by the kind of an array, such as "weights", what is kept of it. Other kinds are not kept.
    edit: a change of the weights of aggregates.
  """
  tokens = _functions.set(functions), _edit.set(edit)
  try:
    yield
  finally:
    _functions.reset(tokens[0])
    _edit.reset(tokens[1])


def is_on(kind: str) -> bool:
  """Whether arrays of this kind are kept."""
  return kind in _functions.get()


def keep(module: nnx.Module, kind: str, arrays: Mapping[str, Array], *, last: bool = False) -> None:
  """Keeps arrays of a kind, if that kind is kept.

  Args:
    arrays: by stream or sublayer.
    last: whether they are of what follows the last block; the connection of the last block may have both.
  """
  if not is_on(kind):
    return
  for stream, x in arrays.items():
    name = f"kept_{'last_' if last else ''}{kind}_{stream}"
    module.sow(Kept, name, _functions.get()[kind](x), reduce_fn=lambda _, new: new, init_fn=lambda: None)


def keep_norms(
  module: nnx.Module, sources: Sequence[Float[Array, "B T D"]], streams: Iterable[str], *, last: bool = False
) -> None:
  """Keeps the norms of the sources that the weights of these streams mix, [B,T,N], if norms are kept."""
  if is_on("norms"):
    norms = jnp.stack([jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in sources], -1)
    keep(module, "norms", dict.fromkeys(streams, norms), last=last)


def edited(weights: kernels.Weights, site: Site, oldest: int, newest: Float[Array, "B T D"]) -> kernels.Weights:
  """The weights of an aggregate, changed where there is an `Edit`."""
  edit = _edit.get()
  return weights if edit is None else edit(weights, site, oldest, newest)
