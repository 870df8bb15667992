"""Mixing in depth, the operation that depth connections add to a Transformer: `mix(sources, weights)`.

README.md in this folder describes the operation, its fused TPU kernels and its cost.
"""

from maxtext_mudd.kernels.api import depth_aggregate, differentiable, gradients, mix, resolve
from maxtext_mudd.kernels.operands import Buffer, Gradients, Pending, Sources
from maxtext_mudd.kernels.passes import Passes
from maxtext_mudd.kernels.tpu import DTYPES
from maxtext_mudd.kernels.weights import (
  ACTIVATIONS,
  ChannelWeights,
  HiddenLayer,
  WeightMLP,
  Weights,
  accumulation_dtype,
  map_columns,
  replace_static,
)
from maxtext_mudd.kernels.xla import token_weights

__all__ = [
  "ACTIVATIONS",
  "DTYPES",
  "Buffer",
  "ChannelWeights",
  "Gradients",
  "HiddenLayer",
  "Passes",
  "Pending",
  "Sources",
  "WeightMLP",
  "Weights",
  "accumulation_dtype",
  "depth_aggregate",
  "differentiable",
  "gradients",
  "map_columns",
  "mix",
  "replace_static",
  "resolve",
  "token_weights",
]
