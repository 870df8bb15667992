"""Statistics of connections for MaxText's `record_internal_nn_metrics`."""

from collections.abc import Mapping
import re

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxtext_mudd import kernels

# Whether it is of what follows the last block; statistic; stream, or sublayer.
SOWN = re.compile(r"mudd_(last_)?([a-z_]+)_([a-z]+)")


def sow(module: nnx.Module, stream: str, statistics: Mapping[str, Float[Array, ""]], *, last: bool = False) -> None:
  """Sows scalars.

  Args:
    stream: what they belong to: a stream, or a sublayer.
    last: whether they are of what follows the last block; the connection of the last block may have both.
  """
  for statistic, value in statistics.items():
    module.sow(nnx.Intermediate, f"mudd_{'last_' if last else ''}{statistic}_{stream}", value)


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


def root_mean_square(x: Float[Array, "B T D"]) -> Float[Array, ""]:
  return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
