"""Statistics of connections: totals of every train step, and more with MaxText's `record_internal_nn_metrics`."""

from collections.abc import Iterator, Mapping
import contextlib
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxtext_mudd import kernels

# Whether it is of what follows the last block; statistic; stream, or sublayer.
SOWN = re.compile(r"mudd_(last_)?([a-z_]+)_([a-z]+)")

LARGEST_WEIGHT = "max_weight"
ALL = "all"  # in place of a stream, for statistics of a whole aggregate

# The largest weight is that of the last 1/16 of the positions.
_POSITIONS_PER_SAMPLE = 16

_totals: dict[str, Array] | None = None


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Array]]:
  """A context in which a train step is traced. Connections then sow what `sow_largest` says, and an optimizer adds
  "grad_norm" to the dictionary. Elsewhere, as in decoding, nothing would remove what is sown."""
  global _totals
  before, _totals = _totals, {}
  try:
    yield _totals
  finally:
    _totals = before


def totals() -> dict[str, Array] | None:
  """The dictionary of the train step that is being traced; None outside `recording`."""
  return _totals


def sow(module: nnx.Module, stream: str, statistics: Mapping[str, Float[Array, ""]], *, last: bool = False) -> None:
  """Sows scalars without their derivatives, with which XLA would compute although nothing reads them. That of the norm
  of a stream of zeros, which scanned layers have, is NaN.

  Args:
    stream: what they belong to: a stream, a sublayer, or `ALL`.
    last: whether they are of what follows the last block; the connection of the last block may have both.
  """
  for statistic, value in statistics.items():
    module.sow(nnx.Intermediate, f"mudd_{'last_' if last else ''}{statistic}_{stream}", jax.lax.stop_gradient(value))


def sample(x: Float[Array, "B T *rest"]) -> Float[Array, "B S *rest"]:
  """The last sixteenth of the positions, and at least one. Without the barrier XLA would compute with all positions."""
  return jax.lax.optimization_barrier(x[:, -max(1, x.shape[1] // _POSITIONS_PER_SAMPLE) :])


def sow_largest(module: nnx.Module, dynamic: Float[Array, "B S C N"], *, last: bool = False) -> None:
  """Sows the largest absolute value of dynamic weights while a train step is traced.

  Args:
    dynamic: weights without static weights, and zeros, of the tokens of `sample`.
    last: as for `sow`.
  """
  if _totals is not None:
    sow(module, ALL, {LARGEST_WEIGHT: jnp.max(jnp.abs(dynamic))}, last=last)


def sow_aggregate(
  module: nnx.Module,
  newest: Float[Array, "B T D"],
  weights: kernels.Weights,
  streams: Mapping[str, Float[Array, "B T D"]],
  column,
  *,
  last: bool = False,
) -> None:
  """Sows, per stream, scalars averaged over tokens:

  older_weight: share of the absolute weight that goes to other sources than the newest, which is in `column`;
  norm: root mean square of the stream.
  """
  weights = jnp.abs(kernels.token_weights([newest], weights)[0])
  older = 1 - jnp.take(weights, column, axis=-1) / (jnp.sum(weights, axis=-1) + jnp.finfo(weights.dtype).tiny)
  for c, (stream, x) in enumerate(streams.items()):
    sow(module, stream, {"older_weight": jnp.mean(older[:, :, c]), "norm": root_mean_square(x)}, last=last)


def sow_dynamic(
  module: nnx.Module,
  dynamic: Float[Array, "B T C N"],
  streams: str,
  visible: Bool[Array, " N"] | None,
  *,
  last: bool = False,
) -> None:
  """Sows, per stream, the largest absolute value, the mean and the deviation of dynamic weights.

  Args:
    dynamic: weights of each token without static weights.
    streams: a letter for each of the C streams.
    visible: which sources there are; weights of others are zero. None: all.
    last: as for `sow`.
  """
  visible = jnp.ones(dynamic.shape[-1], bool) if visible is None else visible
  share = visible / (jnp.sum(visible) * dynamic.shape[0] * dynamic.shape[1])
  for c, stream in enumerate(streams):
    weights = dynamic[:, :, c]
    mean = jnp.sum(share * weights)
    statistics = {
      "dynamic_weight_max": jnp.max(jnp.abs(weights)),
      "dynamic_weight_mean": mean,
      "dynamic_weight_deviation": jnp.sqrt(jnp.sum(share * jnp.square(weights - mean))),
    }
    sow(module, stream, statistics, last=last)


def root_mean_square(x: Float[Array, "B T D"]) -> Float[Array, ""]:
  return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
