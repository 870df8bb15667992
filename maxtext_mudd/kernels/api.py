"""The public operation, `mix`: it sums N sources into C streams, with different weights for every token."""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int
import numpy as np

from maxtext_mudd.kernels import tpu
from maxtext_mudd.kernels.operands import Buffer, Sources
from maxtext_mudd.kernels.passes import IMPLEMENTATIONS, Passes
from maxtext_mudd.kernels.weights import (
  ACTIVATIONS,
  ChannelWeights,
  HiddenLayer,
  WeightMLP,
  Weights,
  number_of_ways,
)


def mix(
  sources: Sequence[Float[Array, "B T D"]] | Float[Array, "S B T D"],
  weights: Weights,
  *,
  count: int | Int[Array, ""] | None = None,
  implementation: str = "auto",
  sharding: NamedSharding | None = None,
) -> list[Float[Array, "B T D"]]:
  """Mixes N sources into C streams, with different weights for every token (paper, Eq. 5).

      x^c = sum_j W[..., c, j] * sources[j]

  Sums are float32 or wider, whatever the dtype of the sources. Only reverse-mode differentiation works; its residuals
  are the arguments.

  Args:
    sources: N floating-point arrays of one shape and dtype, oldest first; or, with `count`, one buffer of S entries,
      for loops over layers that are traced once.
    weights: W as an array [B,T,C,N], or [C,N] for all tokens; or a `WeightMLP`, from which W is computed. The fused
      kernels compute it in fast memory and never write it to HBM. Or `ChannelWeights`; with several heads "xla" alone
      takes them. With a buffer, N is S.
    count: how many entries of the buffer are valid, from 1 to S. The newest source is entry count - 1. A traced count
      is clipped to this range. The other entries and their columns of the weights are ignored, even if they are NaN.
      Their gradients are zero.
    implementation: the name of an implementation:
      "xla": plain JAX, for every platform and dtype.
      "pallas": the fused TPU kernels, for bfloat16 and float32.
      "pallas_interpret": the same kernels, interpreted on any platform. It is slow, makes strict checks, and is for
        tests.
      "auto": "pallas" on TPU for bfloat16 and float32, "xla" otherwise.
    sharding: sharding of a source, for fused kernels on several devices: B, T and D may be sharded. "xla" does not read
      it: there the compiler partitions.

  Returns:
    C arrays of the shape and dtype of a source.

  Raises:
    ValueError: an argument does not fit the others, or a name is unknown.
  """
  operands, source = _check_sources(sources, count)
  _check_weights(weights, source, len(sources))
  if implementation == "auto" and isinstance(weights, ChannelWeights) and weights.w.shape[3] > 1:
    implementation = "xla"
  platform = jax.default_backend() if sharding is None else sharding.mesh.devices.flat[0].platform
  resolved = resolve(implementation, platform, source.dtype)
  passes = Passes(resolved, None if resolved == "xla" else sharding, strict=implementation == "pallas_interpret")
  if passes.implementation != "xla" and source.dtype.name not in tpu.DTYPES:
    dtypes = " or ".join(tpu.DTYPES)
    raise ValueError(f"the sources are {source.dtype}; implementation={implementation!r} takes {dtypes}.")
  return differentiable(passes, operands, weights)


def depth_aggregate(
  sources: Sequence[Float[Array, "B T D"]] | Float[Array, "S B T D"],
  w1: Float[Array, "D K"] | None,
  w2: Float[Array, "K C N"] | None,
  a: Float[Array, "C N"],
  *,
  ways: int,
  newest: Float[Array, "B T D"] | None = None,
  count: int | Int[Array, ""] | None = None,
  activation: str = "gelu",
  epsilon: float = 1e-6,
  implementation: str = "auto",
  sharding: NamedSharding | None = None,
) -> list[Float[Array, "B T D"]]:
  """`mix` with the weights of MUDD, which an MLP computes from the newest source (paper, Eq. 6).

      W = act(RMSNorm(newest) @ w1) @ w2 + a

  Args:
    sources: as in `mix`.
    w1: first matrix of the weight MLP. If `w1` and `w2` are None, the weights are static: W = a.
    w2: second matrix of the weight MLP.
    a: static weights.
    ways: C, the number of streams.
    newest: the input of the weight MLP; default: the newest source. If the sources are pre-normed, pass X_i as it is
      before the norm.
    count: as in `mix`.
    activation: "gelu" (exact) or "gelu_tanh".
    epsilon: added to the mean square in RMSNorm.
    implementation: as in `mix`.
    sharding: as in `mix`.

  Raises:
    ValueError: as in `mix`.
  """
  if a is None:
    raise ValueError("a is missing; give static weights [C,N], zeros if there are none.")
  if (w1 is None) != (w2 is None):
    raise ValueError("w1 and w2 go together; give both, or neither for static weights.")
  if a.ndim != 2 or len(a) != ways:
    expected = [ways, len(sources)]
    raise ValueError(f"a has shape {list(a.shape)}; {ways} ways and {len(sources)} sources need {expected}.")
  weights = a if w1 is None else WeightMLP(w1, w2, a, newest, activation=activation, epsilon=epsilon)
  return mix(sources, weights, count=count, implementation=implementation, sharding=sharding)


def resolve(implementation: str, platform: str, dtype) -> str:
  """Resolves an `implementation` argument to one of `IMPLEMENTATIONS`.

  "auto" is "pallas" on TPU for the dtypes that the kernels support, and "xla" elsewhere.

  Raises:
    ValueError: there is no such implementation.
  """
  if implementation == "auto":
    return "pallas" if platform == "tpu" and jnp.dtype(dtype).name in tpu.DTYPES else "xla"
  if implementation not in IMPLEMENTATIONS:
    known = ", ".join(("auto", *IMPLEMENTATIONS))
    raise ValueError(f"implementation={implementation!r} does not exist; use one of {known}.")
  return implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(passes: Passes, sources: Sources, weights: Weights) -> list[Float[Array, "B T D"]]:
  """`passes.forward`, whose derivative is `passes.backward`."""
  return passes.forward(sources, weights)


def _forward(passes, sources, weights):
  return passes.forward(sources, weights), (sources, weights)


def gradients(
  passes: Passes,
  sources: Sources,
  weights: Weights,
  of_streams: Sequence[Float[Array, "B T D"]],
  totals: Float[Array, "S B T D"] | None = None,
) -> tuple[Sources, Weights]:
  """Gradients of the sources, added to `totals`, and of the weights, in their dtypes, from those of the streams."""
  grads = passes.backward(sources, weights, of_streams, totals=totals)
  of_weights = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), grads.weights, weights)
  return Buffer(grads.sources, None) if isinstance(sources, Buffer) else grads.sources, of_weights


differentiable.defvjp(_forward, lambda passes, inputs, of_streams: gradients(passes, *inputs, of_streams))


def _check_sources(sources, count) -> tuple[Sources, jax.Array | jax.ShapeDtypeStruct]:
  """Checks the sources. Returns them, and an array or `ShapeDtypeStruct` with the shape and dtype of one source."""
  if hasattr(sources, "shape"):
    return _check_buffer(sources, count)
  if count is not None:
    raise ValueError("count goes with one buffer [S,B,T,D]; leave it out where sources are a list.")
  if not len(sources):
    raise ValueError("sources is empty; give at least the newest block output.")
  newest = sources[-1]
  for j, x in enumerate(sources):
    _check_equal(f"sources[{j}]", x, newest)
  _check_source(newest)
  return list(sources), newest


def _check_buffer(entries, count) -> tuple[Buffer, jax.ShapeDtypeStruct]:
  if entries.ndim != 4:
    raise ValueError(f"sources has shape {list(entries.shape)}; a buffer of sources is [S,B,T,D].")
  if count is None:
    raise ValueError("sources is one buffer; give count, the number of its valid entries, or a list of sources.")
  if isinstance(count, int | np.integer) and not isinstance(count, bool):
    if not 1 <= count <= len(entries):
      raise ValueError(f"count={count} is not in 1..{len(entries)}, the number of entries in the buffer.")
  elif jnp.shape(count) or not jnp.issubdtype(jnp.result_type(count), jnp.integer):
    raise ValueError(f"count is {jnp.result_type(count)}{list(jnp.shape(count))}; give one int.")
  source = jax.eval_shape(lambda x: x[0], entries)
  _check_source(source)
  return Buffer(entries, jnp.clip(jnp.asarray(count, jnp.int32), 1, len(entries))), source


def _check_source(x) -> None:
  if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"a source is {x.dtype}{list(x.shape)}; give floating-point arrays [B,T,D].")


def _check_equal(name: str, x, newest) -> None:
  if x.shape != newest.shape or x.dtype != newest.dtype:
    expected = f"{newest.dtype}{list(newest.shape)}"
    raise ValueError(f"{name} is {x.dtype}{list(x.shape)}, sources[-1] is {expected}; make them equal.")


def _check_weights(weights: Weights, source, num_sources: int) -> None:
  """Checks that the weights fit `num_sources` sources with the shape and dtype of `source`."""
  if isinstance(weights, HiddenLayer):
    raise ValueError("weights is a HiddenLayer, which only `Passes` accepts; give an array or a WeightMLP.")
  arrays = {"weights": weights}
  if isinstance(weights, WeightMLP):
    arrays = {"w1": weights.w1, "w2": weights.w2, "a": weights.a}
    arrays |= {} if weights.scale is None else {"scale": weights.scale}
  elif isinstance(weights, ChannelWeights):
    arrays = {"w": weights.w} | ({} if weights.a is None else {"a": weights.a})
  for name, x in arrays.items():
    dtype = getattr(x, "dtype", type(x).__name__)
    if not hasattr(x, "dtype") or not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(f"{name} is {dtype}; give a floating-point array.")
  if isinstance(weights, ChannelWeights):
    if weights.w.ndim != 5 or weights.w.shape[3] < 1 or source.shape[-1] % weights.w.shape[3]:
      raise ValueError(f"w has shape {list(weights.w.shape)}; give [B,T,C,H,N] with H that divides {source.shape[-1]}.")
    ways, heads = weights.w.shape[2:4]
    shapes = {"w": (*source.shape[:2], ways, heads, num_sources), "a": (ways, source.shape[-1], num_sources)}
    for name, x in arrays.items():
      if x.shape != shapes[name]:
        raise ValueError(f"{name} has shape {list(x.shape)}; the other arguments need {list(shapes[name])}.")
    return
  if not isinstance(weights, WeightMLP):
    fits = weights.shape[-1:] == (num_sources,) and weights.shape[:-2] in ((), source.shape[:2])
    if len(weights.shape) < 2 or not fits:
      batch, length, _ = source.shape
      expected = f"[{batch}, {length}, C, {num_sources}], or [C, {num_sources}] for all tokens"
      raise ValueError(f"weights has shape {list(weights.shape)}; the sources need {expected}.")
    return
  if weights.source != -1:
    raise ValueError(f"weights has source={weights.source}, which only `Passes` accepts; give that source as newest.")
  if weights.scale is not None and weights.cap is None:
    raise ValueError("scale goes with cap; give cap=1.0 for scale · tanh(W).")
  if weights.cap is not None and not weights.cap > 0:
    raise ValueError(f"cap={weights.cap}; give a positive number, or None for weights without a bound.")
  if weights.activation not in ACTIVATIONS:
    raise ValueError(f"activation={weights.activation!r} does not exist; use one of {', '.join(ACTIVATIONS)}.")
  ways = number_of_ways(weights)
  hidden = weights.w1.shape[-1]
  for name, shape, expected in (
    ("a", weights.a.shape, (ways, num_sources)),
    ("scale", None if weights.scale is None else weights.scale.shape, (ways, num_sources)),
    ("w1", weights.w1.shape, (source.shape[-1], weights.w2.shape[0])),
    ("w2", weights.w2.shape, (hidden, ways, num_sources)),
  ):
    if shape is not None and shape != expected:
      raise ValueError(f"{name} has shape {list(shape)}; the other arguments need {list(expected)}.")
  if weights.newest is not None:
    _check_equal("newest", weights.newest, source)
