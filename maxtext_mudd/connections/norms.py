"""The norm that connections use."""

from flax import nnx
from maxtext.layers.normalizations import RMSNorm


def rms_norm(config, rngs: nnx.Rngs, **kwargs) -> RMSNorm:
  """MaxText's RMSNorm over the model width, with the settings of the configuration."""
  return RMSNorm(
    num_features=config.emb_dim,
    dtype=config.dtype,
    weight_dtype=config.weight_dtype,
    shard_mode=config.shard_mode,
    kernel_axes=("norm",),
    epsilon=config.normalization_layer_epsilon,
    rngs=rngs,
    **kwargs,
  )
