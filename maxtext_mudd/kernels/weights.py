"""The mixing weights of an aggregate: an array, or the MLP that computes them for each token (paper, Eq. 6).

Weights have one of these types. A gradient of weights has the same type as the weights.

  array [C,N]        static weights, the same for all tokens
  array [B,T,C,N]    weights of each token
  WeightMLP          the MLP that computes the weights of each token
  HiddenLayer        a WeightMLP whose hidden layer has been computed
  ChannelWeights     weights that differ between channels; histories (`connections/history.py`) do not take them
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS = {
  # The exact GELU. It is computed by erf, for which TPUs have an instruction; jax.nn.gelu uses erfc, which has none.
  "gelu": lambda z: 0.5 * z * (1 + jax.lax.erf(z * 0.5**0.5)),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightMLP:
  """W = bounded(act(RMSNorm(newest) @ w1) @ w2) + a, one C × N matrix for each token.

  Attributes:
    w1: first matrix.
    w2: second matrix.
    a: static weights.
    newest: input of the MLP; None: one of the sources.
    source: index of that source. `mix` accepts only -1, the newest source. A backward pass that recomputes the streams
      of the aggregate before sets another index, because the newest source of that aggregate is older.
    activation: "gelu" (exact) or "gelu_tanh".
    epsilon: added to the mean square in RMSNorm.
    scale: see `bounded`; None: ones.
    cap: see `bounded`; None: what `w2` gives is not bounded.
  """

  w1: Float[Array, "D K"]
  w2: Float[Array, "K C N"]
  a: Float[Array, "C N"]
  newest: Float[Array, "B T D"] | None = None
  scale: Float[Array, "C N"] | None = None
  source: int = dataclasses.field(default=-1, metadata={"static": True})
  activation: str = dataclasses.field(default="gelu", metadata={"static": True})
  epsilon: float = dataclasses.field(default=1e-6, metadata={"static": True})
  cap: float | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HiddenLayer:
  """W = bounded(hidden @ w2) + a: a `WeightMLP` whose hidden layer has been computed."""

  hidden: Float[Array, "B T K"]
  w2: Float[Array, "K C N"]
  a: Float[Array, "C N"]
  scale: Float[Array, "C N"] | None = None
  cap: float | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChannelWeights:
  """W[b,t,c,d,j] = w[b,t,c,h(d),j] + a[c,d,j]: a source's channels have different weights. Head h has the channels
  h·D/H up to (h+1)·D/H. Only plain JAX mixes with several heads.

  Attributes:
    w: weights of each token and head.
    a: static weights of each channel; None: zeros.
  """

  w: Float[Array, "B T C H N"]
  a: Float[Array, "C D N"] | None = None


Weights = WeightMLP | HiddenLayer | ChannelWeights | Float[Array, "B T C N"] | Float[Array, "C N"]


def number_of_ways(weights: Weights) -> int:
  """C, the number of streams."""
  if isinstance(weights, ChannelWeights):
    return weights.w.shape[2]
  return (weights.a if isinstance(weights, WeightMLP | HiddenLayer) else weights).shape[-2]


def map_columns(weights: Weights, function: Callable) -> Weights:
  """Applies a function to every array whose last axis is that of the sources; it may select, mask or permute them."""
  if isinstance(weights, WeightMLP | HiddenLayer):
    scale = None if weights.scale is None else function(weights.scale)
    return dataclasses.replace(weights, w2=function(weights.w2), a=function(weights.a), scale=scale)
  if isinstance(weights, ChannelWeights):
    return jax.tree.map(function, weights)
  return function(weights)


def with_hidden(weights: WeightMLP, hidden: Float[Array, "B T K"]) -> HiddenLayer:
  """The same weights, from a hidden layer that has been computed."""
  return HiddenLayer(hidden, weights.w2, weights.a, weights.scale, weights.cap)


def replace_static(weights: Weights, function: Callable) -> Weights:
  """Applies a function to the static weights."""
  if isinstance(weights, WeightMLP | HiddenLayer):
    return dataclasses.replace(weights, a=function(weights.a))
  return function(weights)


def bounded(dynamic, scale, cap: float | None):
  """scale · cap · tanh(dynamic / cap), and its derivatives by `dynamic` and by `scale`.

  Args:
    dynamic: dynamic weights, in float32 or wider.
    scale: learned scales, that go with them; None: ones.
    cap: the largest absolute value before the scale; None: the dynamic weights are returned as they are, with None for
      the derivatives.
  """
  if cap is None:
    return dynamic, None, None
  share = jnp.tanh(dynamic / cap)
  scale = jnp.ones((), dynamic.dtype) if scale is None else scale.astype(dynamic.dtype)
  return scale * cap * share, scale * (1 - share * share), cap * share


class Activations(NamedTuple):
  """The hidden layer act(z), with what its gradient needs, in float32 or wider.

  Attributes:
    value: act(z).
    z: RMSNorm(newest) @ w1.
    slope: derivative of the activation at z.
    inverse: one over the root mean square of `newest`.
  """

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

  The norm has no scale, so it commutes with the product. `newest` is multiplied before it is normed: one rounding less.

  Args:
    newest: input of the MLP, or the part of its D columns that this device holds.
    w1: first matrix, or the rows of it that belong to these columns.
    activation: one of `ACTIVATIONS`.
    epsilon: added to the mean square.
    sum_parts: sums over the devices that hold the parts of D.
    parts: number of parts.
  """
  upcast = newest.astype(accumulation_dtype(newest.dtype))
  square = jnp.sum(upcast * upcast, axis=-1, keepdims=True)
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
  grad_hidden: Float[Array, "*tokens K"],
  *,
  sum_parts: Callable = lambda x: x,
  parts: int = 1,
) -> tuple[Float[Array, "*tokens D"], Float[Array, "D K"]]:
  """Gradients of `newest` and `w1` through `hidden_layer`, in float32 or wider.

  Args:
    newest: as in `hidden_layer`.
    w1: as in `hidden_layer`.
    hidden: what `hidden_layer` returned.
    grad_hidden: gradient of its value.
    sum_parts: as in `hidden_layer`.
    parts: as in `hidden_layer`.
  """
  dz = sum_parts(grad_hidden) * hidden.slope
  through_norm = jnp.sum(dz * hidden.z, axis=-1, keepdims=True) / (newest.shape[-1] * parts)
  scaled = (dz * hidden.inverse).astype(newest.dtype)
  tokens = tuple(range(newest.ndim - 1))
  grad_w1 = product(newest, scaled, tokens, tokens)
  grad_newest = product(scaled, w1.astype(newest.dtype), newest.ndim - 1, 1)
  return grad_newest - newest.astype(grad_newest.dtype) * (hidden.inverse**2 * through_norm), grad_w1


def product(x, y, axes_of_x, axes_of_y):
  """Contracts these axes of x and y, and accumulates in float32 or wider. Operands of float32 are multiplied in full
  precision, whatever precision is configured.

  The function binds the primitive `dot_general_p` because Qwix quantizes a model by replacing `lax.dot_general` while
  the model is called. The backward passes are traced after that call, so weights that they recompute would differ from
  the forward pass's.
  """
  contracted = tuple((axes,) if isinstance(axes, int) else axes for axes in (axes_of_x, axes_of_y))
  out_dtype = accumulation_dtype(x.dtype)
  precision = jax.lax.Precision.DEFAULT if out_dtype != x.dtype else jax.lax.Precision.HIGHEST
  return jax.lax.dot_general_p.bind(
    x,
    y,
    dimension_numbers=(contracted, ((), ())),
    precision=(precision, precision),
    preferred_element_type=out_dtype,
    out_sharding=None,
  )


def accumulation_dtype(dtype) -> jnp.dtype:
  """The dtype of statistics and sums over arrays of `dtype`: at least float32."""
  return jnp.promote_types(dtype, jnp.float32)
