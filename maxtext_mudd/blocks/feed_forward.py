"""A feed-forward block computed in parts of its width, which needs less memory in the backward pass."""

import itertools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.layers.linears import MlpBlock

from maxtext_mudd.blocks.classes import change_class


class SplitMlpBlock(MlpBlock):
  """The sum of `mudd_ffn_parts` narrower blocks, each with its columns of the kernels.

  It computes the same function as one block, except that the sum is rounded once more in `dtype` for each further part.
  Only the arrays [B,T,F/parts] of one part have to exist at a time. The gradient of a kernel consists of those of its
  columns, so that devices exchange no more than for one block. In decoding, where arrays are short, it is one block.
  """

  def __call__(self, inputs: Float[Array, "B T D"], *args, **kwargs) -> Float[Array, "B T D"]:
    if self.model_mode != MODEL_MODE_TRAIN:
      return super().__call__(inputs, *args, **kwargs)
    output = None
    for begin, end in bounds(self.intermediate_dim, self.config.mudd_ffn_parts):
      graphdef, params, others = nnx.split(self, nnx.Param, ...)
      part = nnx.merge(graphdef, _columns(params, begin, end), others)
      part.wo.in_features_shape = (end - begin,)
      part_output = MlpBlock.__call__(part, inputs, *args, **kwargs)
      nnx.update(self, nnx.state(part, nnx.Not(nnx.Param)))  # so that each part draws its own dropout mask
      output = part_output if output is None else output + part_output
    return output


def split_feed_forward(layer: nnx.Module) -> None:
  """Makes a decoder layer compute its feed-forward block in parts. Its parameters keep their shapes."""
  change_class(layer.mlp, SplitMlpBlock)


def bounds(width: int, parts: int) -> list[tuple[int, int]]:
  """First column of each part, and the one after its last. Widths differ by at most one: XLA can reuse the memory of a
  part's arrays for the next if they have the same size."""
  return list(itertools.pairwise(width * i // parts for i in range(parts + 1)))


def _columns(params: nnx.State, begin: int, end: int) -> nnx.State:
  """The parameters of the columns `begin` to `end` - 1. The output's bias is in the first part, and zero in others."""

  def of_columns(path, variable):
    module, name = path[0], path[-1]
    value = variable.get_value()
    if module == "wo":
      value = value[begin:end] if name == "kernel" else value if begin == 0 else jnp.zeros_like(value)
    elif module.startswith("wi"):
      value = jax.lax.slice_in_dim(value, begin, end, axis=-1)
    return variable.replace(value)

  return nnx.from_flat_state((path, of_columns(path, variable)) for path, variable in nnx.to_flat_state(params))
