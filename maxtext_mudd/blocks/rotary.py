"""Rotary embeddings with cosines and sines in half precision, as in the released PyTorch models."""

import functools

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxtext_mudd.blocks.classes import change_class


def round_rotary_table(layer: nnx.Module, dtype: str) -> None:
  """Makes the rotary embedding of a decoder layer round its cosines and sines to `dtype`."""
  rotary = layer.self_attention.rotary_embedding
  change_class(rotary, _rounded(type(rotary), dtype))


@functools.cache
def _rounded(rotary_class: type[nnx.Module], dtype: str) -> type[nnx.Module]:
  class RoundedRotaryEmbedding(rotary_class):
    """Rotates in the precision of its stock class, by rounded cosines and sines."""

    def apply_rotary(
      self, inputs: Float[Array, "B T H d"], cos: Float[Array, "B T 1 d"], sin: Float[Array, "B T 1 d"]
    ) -> Float[Array, "B T H d"]:
      return super().apply_rotary(inputs, *(x.astype(jnp.dtype(dtype)).astype(x.dtype) for x in (cos, sin)))

  return RoundedRotaryEmbedding
