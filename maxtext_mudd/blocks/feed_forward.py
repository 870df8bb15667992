"""A feed-forward block computed in parts of its width, which bounds the memory of wide ones in the backward pass."""

import itertools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.layers.linears import MlpBlock


class MlpBlockInParts(MlpBlock):
  """The sum of `mudd_ffn_parts` narrower blocks, each with its columns of the kernels.

  The function is the same but for the rounding of the sum: one addition in `dtype` for each further part. Only one
  part's arrays [B,T,F/parts] have to be there at a time, and gradients of the kernels are those of their columns, so
  that nothing more is sent between devices. Decoding has short arrays and computes the whole.
  """

  def __call__(self, inputs: Float[Array, "B T D"], *args, **kwargs) -> Float[Array, "B T D"]:
    if self.model_mode != MODEL_MODE_TRAIN:
      return super().__call__(inputs, *args, **kwargs)
    output = None
    for begin, end in bounds(self.intermediate_dim, self.config.mudd_ffn_parts):
      graphdef, params, others = nnx.split(self, nnx.Param, ...)
      part = nnx.merge(graphdef, _columns(params, begin, end), others)
      part.wo.in_features_shape = (end - begin,)
      added = MlpBlock.__call__(part, inputs, *args, **kwargs)
      nnx.update(self, nnx.state(part, nnx.Not(nnx.Param)))  # each part draws its own dropout
      output = added if output is None else output + added
    return output


def compute_in_parts(layer: nnx.Module) -> None:
  """Makes a decoder layer compute its feed-forward block in parts; parameters keep their paths and shapes."""
  layer.mlp.__class__ = MlpBlockInParts


def bounds(width: int, parts: int) -> list[tuple[int, int]]:
  """First and last column of each part, as equal as can be: arrays of one size take each other's place in memory."""
  return list(itertools.pairwise(width * i // parts for i in range(parts + 1)))


def _columns(params: nnx.State, begin: int, end: int) -> nnx.State:
  """The parameters of the columns `begin` to `end`; the output's bias comes with the first."""

  def cut(path, variable):
    module, name = path[0], path[-1]
    value = variable.get_value()
    if module == "wo":
      value = value[begin:end] if name == "kernel" else value if begin == 0 else jnp.zeros_like(value)
    elif module.startswith("wi"):
      value = jax.lax.slice_in_dim(value, begin, end, axis=-1)
    return variable.replace(value)

  return nnx.from_flat_state((path, cut(path, variable)) for path, variable in nnx.to_flat_state(params))
