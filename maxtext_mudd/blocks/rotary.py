"""Rotary embeddings by a table in half precision, as the released PyTorch models have it, to be exact with these."""

import functools

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float


def round_table(layer: nnx.Module, dtype: str) -> None:
  """Makes the rotary embedding of a decoder layer round its cosines and sines to `dtype`."""
  rotary = layer.self_attention.rotary_embedding
  rotary.__class__ = _rounded(type(rotary), dtype)


@functools.cache
def _rounded(rotary_class: type[nnx.Module], dtype: str) -> type[nnx.Module]:
  class RoundedRotaryEmbedding(rotary_class):
    """Adds no state."""

    def apply_rotary(
      self, inputs: Float[Array, "B T H d"], cos: Float[Array, "B T 1 d"], sin: Float[Array, "B T 1 d"]
    ) -> Float[Array, "B T H d"]:
      return super().apply_rotary(inputs, *(x.astype(jnp.dtype(dtype)).astype(x.dtype) for x in (cos, sin)))

  return RoundedRotaryEmbedding
