"""Statistics of the aggregates for MaxText's `record_internal_nn_metrics`."""

from collections.abc import Mapping
import re

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxtext_mudd import kernels

SOWN = re.compile(r"mudd_(older_weight|norm)_([a-z])")  # statistic and stream


def sow(
  module: nnx.Module,
  newest: Float[Array, "B T D"],
  weights: kernels.Weights,
  streams: Mapping[str, Float[Array, "B T D"]],
  column=-1,
) -> None:
  """Sows, per stream, scalars averaged over tokens:

  older_weight: share of the absolute weight that goes to other sources than the newest, which is in `column`;
  norm: root mean square of the stream.
  """
  weights = jnp.abs(kernels.token_weights([newest], weights)[0])
  older = 1 - jnp.take(weights, column, axis=-1) / (jnp.sum(weights, axis=-1) + jnp.finfo(weights.dtype).tiny)
  for c, (stream, x) in enumerate(streams.items()):
    module.sow(nnx.Intermediate, f"mudd_older_weight_{stream}", jnp.mean(older[:, :, c]))
    module.sow(nnx.Intermediate, f"mudd_norm_{stream}", jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))
