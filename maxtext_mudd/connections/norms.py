"""The norms that connections use."""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from maxtext.layers.normalizations import RMSNorm

from maxtext_mudd.kernels import accumulation_dtype


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


class StreamNorm(nnx.Module):
  """RMSNorm or LayerNorm over the model width, in at least float32 up to the cast of its result. MaxText's RMSNorm
  computes in float32 whatever it is given, and its LayerNorm rounds before it scales.

  Parameters, in `weight_dtype`: `scale` [D] one; `bias` [D] zero where it subtracts the mean.
  """

  def __init__(self, config, epsilon: float, *, subtracts_mean: bool):
    self.epsilon = epsilon
    self.dtype = config.dtype
    self.scale = nnx.Param(jnp.ones((config.emb_dim,), config.weight_dtype), out_sharding=("norm",))
    if subtracts_mean:
      self.bias = nnx.Param(jnp.zeros((config.emb_dim,), config.weight_dtype), out_sharding=("norm",))
    self.subtracts_mean = subtracts_mean

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    x = x.astype(accumulation_dtype(x.dtype))
    if self.subtracts_mean:
      x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) * self.scale[...]
    if self.subtracts_mean:
      x = x + self.bias[...]
    return x.astype(self.dtype)
