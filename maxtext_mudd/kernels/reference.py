"""Depth-wise aggregation in plain JAX: the equations of the paper, nothing else.

Every faster implementation is held to this one. Sources in float64 give a float64 result, so it also serves as truth.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def accumulation_dtype(dtype) -> jnp.dtype:
  """Statistics and sums are never kept in less than float32."""
  return jnp.promote_types(dtype, jnp.float32)


def mixing_weights(
  newest: Float[Array, "B T D"],
  w1: Float[Array, "D K"] | None,
  w2: Float[Array, "K C N"] | None,
  a: Float[Array, "C N"],
  *,
  activation: str,
  epsilon: float,
) -> Float[Array, "B T C N"]:
  """W = act(RMSNorm(X_i) @ W1) @ W2 + a (paper, Eq. 6), in at least float32; only `a` when there are no W1 and W2."""
  wide = accumulation_dtype(newest.dtype)
  static = a.astype(wide)
  if w1 is None:
    return jnp.broadcast_to(static, newest.shape[:2] + static.shape)
  x = newest.astype(wide)
  x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
  hidden = jnp.einsum("btd,dk->btk", x.astype(newest.dtype), w1.astype(newest.dtype), preferred_element_type=wide)
  hidden = ACTIVATIONS[activation](hidden).astype(newest.dtype)
  return jnp.einsum("btk,kcn->btcn", hidden, w2.astype(newest.dtype), preferred_element_type=wide) + static


def aggregate(
  sources: Sequence[Float[Array, "B T D"]], weights: Float[Array, "B T C N"]
) -> list[Float[Array, "B T D"]]:
  """x^c = sum_j W[..., c, j] * X_j (paper, Eq. 5): summed in the dtype of `weights`, returned in the sources'."""
  streams = []
  for c in range(weights.shape[2]):
    total = sum(weights[:, :, c, j, None] * x.astype(weights.dtype) for j, x in enumerate(sources))
    streams.append(total.astype(sources[-1].dtype))
  return streams


def depth_aggregate(sources, newest, w1, w2, a, *, activation: str, epsilon: float) -> list[Float[Array, "B T D"]]:
  """The whole operation; shapes as in `maxtext_mudd.kernels.depth_aggregate`."""
  return aggregate(sources, mixing_weights(newest, w1, w2, a, activation=activation, epsilon=epsilon))


def depth_aggregate_buffer(
  buffer: Float[Array, "S B T D"], count, newest, w1, w2, a, *, activation: str, epsilon: float
) -> list[Float[Array, "B T D"]]:
  """The same of the first `count` entries of a buffer; `newest` None: entry count - 1.

  What is not valid is replaced by zero, not multiplied by it: neither a NaN nor a gradient passes.
  """
  if newest is None:
    newest = jax.lax.dynamic_index_in_dim(buffer, count - 1, keepdims=False)
  valid = jnp.arange(buffer.shape[0]) < count
  sources = [jnp.where(valid[j], x, 0) for j, x in enumerate(buffer)]
  w2 = None if w2 is None else jnp.where(valid, w2, 0)
  a = jnp.where(valid, a, 0)
  return depth_aggregate(sources, newest, w1, w2, a, activation=activation, epsilon=epsilon)
