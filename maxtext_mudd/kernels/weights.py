"""The weights of an aggregate: arrays, or what the weights of each token are made from (paper, Eq. 6).

Weights take four forms. Static weights, one array [C,N] for all tokens; an array [B,T,C,N]; a `WeightMLP`; and a
`HiddenLayer`, which is a `WeightMLP` whose first half was computed before. The gradient of weights has their form.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS = {
  # The exact GELU by erf, for which TPUs have instructions, not by erfc, for which they have none.
  "gelu": lambda z: 0.5 * z * (1 + jax.lax.erf(z * 0.5**0.5)),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightMLP:
  """W = act(RMSNorm(newest) @ w1) @ w2 + a, one C × N matrix for each token.

  Attributes:
    w1: first weight matrix.
    w2: second weight matrix.
    a: static weights.
    newest: what the weights are made from; None: a source.
    source: index of that source. `mix` takes -1, the newest. A backward pass that recomputes the streams of the
      aggregate below, whose newest source is older, sets another.
    activation: "gelu" (exact) or "gelu_tanh".
    epsilon: added to the mean square in RMSNorm.
  """

  w1: Float[Array, "D K"]
  w2: Float[Array, "K C N"]
  a: Float[Array, "C N"]
  newest: Float[Array, "B T D"] | None = None
  source: int = dataclasses.field(default=-1, metadata={"static": True})
  activation: str = dataclasses.field(default="gelu", metadata={"static": True})
  epsilon: float = dataclasses.field(default=1e-6, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HiddenLayer:
  """W = hidden @ w2 + a: what is left of a `WeightMLP` once its hidden layer is known."""

  hidden: Float[Array, "B T K"]
  w2: Float[Array, "K C N"]
  a: Float[Array, "C N"]


Weights = WeightMLP | HiddenLayer | Float[Array, "B T C N"] | Float[Array, "C N"]


def number_of_ways(weights: Weights) -> int:
  """C."""
  return (weights.a if isinstance(weights, WeightMLP | HiddenLayer) else weights).shape[-2]


def map_columns(weights: Weights, function: Callable) -> Weights:
  """Weights of other sources: `function` maps the last axis, that of the sources, of every array that has it."""
  if isinstance(weights, WeightMLP | HiddenLayer):
    return dataclasses.replace(weights, w2=function(weights.w2), a=function(weights.a))
  return function(weights)


def replace_static(weights: Weights, function: Callable) -> Weights:
  """Weights whose static part is `function` of what it was."""
  if isinstance(weights, WeightMLP | HiddenLayer):
    return dataclasses.replace(weights, a=function(weights.a))
  return function(weights)


class Activations(NamedTuple):
  """act(z) with what its gradient needs, in float32 or wider. `inverse`: one over the root mean square of the norm."""

  value: Float[Array, "*tokens K"]
  z: Float[Array, "*tokens K"]
  slope: Float[Array, "*tokens K"]
  inverse: Float[Array, "*tokens 1"]


def hidden_layer(
  newest: Float[Array, "*tokens D"],
  w1: Float[Array, "D K"],
  activation: str,
  epsilon: float,
  *,
  sum_parts: Callable = lambda x: x,
  parts: int = 1,
) -> Activations:
  """act(RMSNorm(newest) @ w1), the first half of Eq. 6.

  The norm has no scale, so it commutes with the product: `newest` is multiplied as it is, without another rounding.

  Args:
    newest: or the part of its D columns that this device holds, with the rows of `w1` that belong to it.
    sum_parts: sums over the devices that hold the parts.
    parts: their number.
  """
  wide = newest.astype(accumulation_dtype(newest.dtype))
  square = jnp.sum(wide * wide, axis=-1, keepdims=True)
  projected = product(newest, w1.astype(newest.dtype), newest.ndim - 1, 0)
  projected, square = sum_parts((projected, square))
  inverse = jax.lax.rsqrt(square / (newest.shape[-1] * parts) + epsilon)
  z = inverse * projected
  value, slope = jax.jvp(ACTIVATIONS[activation], (z,), (jnp.ones_like(z),))
  return Activations(value, z, slope, inverse)


def hidden_gradients(
  newest: Float[Array, "*tokens D"],
  w1: Float[Array, "D K"],
  hidden: Activations,
  to_hidden: Float[Array, "*tokens K"],
  *,
  sum_parts: Callable = lambda x: x,
  parts: int = 1,
) -> tuple[Float[Array, "*tokens D"], Float[Array, "D K"]]:
  """Gradients of `newest` and `w1` through `hidden_layer`, from that of its value; in float32 or wider."""
  dz = sum_parts(to_hidden) * hidden.slope
  through_norm = jnp.sum(dz * hidden.z, axis=-1, keepdims=True) / (newest.shape[-1] * parts)
  scaled = (dz * hidden.inverse).astype(newest.dtype)
  tokens = tuple(range(newest.ndim - 1))
  to_w1 = product(newest, scaled, tokens, tokens)
  to_newest = product(scaled, w1.astype(newest.dtype), newest.ndim - 1, 1)
  return to_newest - newest.astype(to_newest.dtype) * (hidden.inverse**2 * through_norm), to_w1


def product(x, y, axes_of_x, axes_of_y):
  """The tensor product summed over these axes, in at least float32. Operands of float32 are multiplied as such,
  whatever precision is set around.

  It binds the primitive, since quantization by interception (Qwix) replaces `lax.dot_general` while a model is called.
  Backward passes are traced later: weights that they recompute would not be those of the forward pass.
  """
  contracted = tuple((axes,) if isinstance(axes, int) else axes for axes in (axes_of_x, axes_of_y))
  wide = accumulation_dtype(x.dtype)
  precision = jax.lax.Precision.DEFAULT if wide != x.dtype else jax.lax.Precision.HIGHEST
  return jax.lax.dot_general_p.bind(
    x,
    y,
    dimension_numbers=(contracted, ((), ())),
    precision=(precision, precision),
    preferred_element_type=wide,
    out_sharding=None,
  )


def accumulation_dtype(dtype) -> jnp.dtype:
  """Statistics and sums are never kept in less than float32."""
  return jnp.promote_types(dtype, jnp.float32)
