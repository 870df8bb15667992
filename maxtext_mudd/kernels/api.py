"""The public operation, `mix`: N sources, C streams, and the weights of every token between them."""

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
from maxtext_mudd.kernels.weights import ACTIVATIONS, HiddenLayer, WeightMLP, Weights, number_of_ways


def mix(
  sources: Sequence[Float[Array, "B T D"]] | Float[Array, "S B T D"],
  weights: Weights,
  *,
  count: int | Int[Array, ""] | None = None,
  implementation: str = "auto",
  sharding: NamedSharding | None = None,
) -> list[Float[Array, "B T D"]]:
  """Mixes N sources into C streams, each token with weights of its own (paper, Eq. 5).

      x^c = sum_j W[..., c, j] * sources[j]

  Sums are float32 or wider, whatever the sources are. The derivative is reverse-mode only, and keeps the arguments
  alone.

  Args:
    sources: N floating-point arrays of one shape and dtype, oldest first; or, with `count`, one buffer of S entries,
      for loops over layers that are traced once.
    weights: W as an array [B,T,C,N], or [C,N] for all tokens; or a `WeightMLP`, from which the fused kernel makes W by
      itself, without a pass over memory. With a buffer, N is S.
    count: how many entries of the buffer are valid, 1 to S, the newest being entry count - 1; where it is traced, it is
      clipped to that range. Whatever the others hold, and the columns of weights from `count` on, is ignored, NaN
      included, and gets a gradient of zero.
    implementation: "xla", plain JAX; "pallas", the fused kernels of TPUs, for bfloat16 and float32; "pallas_interpret",
      the same anywhere, slowly and strictly, for tests; "auto": "pallas" on TPU, "xla" elsewhere.
    sharding: of a source, where fused kernels run on several devices: batch and length may be split, and D. The axes of
      its mesh are of `AxisType.Auto`.

  Returns:
    C arrays of the shape and dtype of a source.

  Raises:
    ValueError: an argument that does not fit the others, or an unknown name; one sentence.
  """
  operands, like = _sources(sources, count)
  _check_weights(weights, like, len(sources))
  platform = jax.default_backend() if sharding is None else sharding.mesh.devices.flat[0].platform
  passes = Passes(resolve(implementation, platform, like.dtype), sharding, strict=implementation == "pallas_interpret")
  if passes.implementation != "xla" and like.dtype.name not in tpu.DTYPES:
    dtypes = " or ".join(tpu.DTYPES)
    raise ValueError(f"the sources are {like.dtype}; implementation={implementation!r} takes {dtypes}.")
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
  """`mix` with the weights of MUDD, made from the newest source (paper, Eq. 6).

      W = act(RMSNorm(newest) @ w1) @ w2 + a

  Args:
    w1, w2: None, both, for static weights: `a` alone.
    ways: C, the number of streams.
    newest: what the weights are made from, where that is not the newest source: X_i, where sources are pre-normed.
    activation, epsilon: as of `WeightMLP`; the rest as of `mix`.

  Raises:
    ValueError: as `mix`.
  """
  if a is None:
    raise ValueError("a is missing; the static weights [C,N] are needed, zeros at the least.")
  if (w1 is None) != (w2 is None):
    raise ValueError("w1 and w2 go together; give both, or neither for static weights.")
  if a.ndim != 2 or len(a) != ways:
    wanted = [ways, len(sources)]
    raise ValueError(f"a has shape {list(a.shape)}; {ways} ways and {len(sources)} sources need {wanted}.")
  weights = a if w1 is None else WeightMLP(w1, w2, a, newest, activation=activation, epsilon=epsilon)
  return mix(sources, weights, count=count, implementation=implementation, sharding=sharding)


def resolve(implementation: str, platform: str, dtype) -> str:
  """One of `IMPLEMENTATIONS`: "auto" means "pallas" on TPU, for dtypes that it takes, and "xla" elsewhere.

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


def _backward(passes, inputs, gradients):
  sources, weights = inputs
  is_buffer = isinstance(sources, Buffer)
  made = passes.backward(sources, weights, gradients)
  to_weights = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), made.weights, weights)
  return Buffer(made.sources, None) if is_buffer else made.sources, to_weights


differentiable.defvjp(_forward, _backward)


def _sources(sources, count) -> tuple[Sources, jax.Array]:
  """(the sources, checked; one of them)."""
  if hasattr(sources, "shape"):
    return _buffer(sources, count)
  if count is not None:
    raise ValueError("count goes with one buffer [S,B,T,D]; leave it out where sources are a list.")
  if not len(sources):
    raise ValueError("sources is empty; give at least the newest block output.")
  like = sources[-1]
  for j, x in enumerate(sources):
    _check_alike(f"sources[{j}]", x, like)
  _check_source(like)
  return list(sources), like


def _buffer(entries, count) -> tuple[Buffer, jax.Array]:
  if entries.ndim != 4:
    raise ValueError(f"sources has shape {list(entries.shape)}; a buffer of sources is [S,B,T,D].")
  if count is None:
    raise ValueError("sources is one buffer; give count, the number of its valid entries, or a list of sources.")
  if isinstance(count, int | np.integer) and not isinstance(count, bool):
    if not 1 <= count <= len(entries):
      raise ValueError(f"count={count} is not in 1..{len(entries)}, the number of entries in the buffer.")
  elif jnp.shape(count) or not jnp.issubdtype(jnp.result_type(count), jnp.integer):
    raise ValueError(f"count is {jnp.result_type(count)}{list(jnp.shape(count))}; give one int.")
  like = jax.eval_shape(lambda x: x[0], entries)
  _check_source(like)
  return Buffer(entries, jnp.clip(jnp.asarray(count, jnp.int32), 1, len(entries))), like


def _check_source(x) -> None:
  if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"a source is {x.dtype}{list(x.shape)}; give floating-point arrays [B,T,D].")


def _check_alike(name: str, x, like) -> None:
  if x.shape != like.shape or x.dtype != like.dtype:
    wanted = f"{like.dtype}{list(like.shape)}"
    raise ValueError(f"{name} is {x.dtype}{list(x.shape)}, sources[-1] is {wanted}; make them equal.")


def _check_weights(weights: Weights, like, number: int) -> None:
  """Whether the weights fit `number` sources of this shape."""
  if isinstance(weights, HiddenLayer):
    raise ValueError("weights is a HiddenLayer, which is for passes alone; give an array or a WeightMLP.")
  arrays = {"weights": weights}
  if isinstance(weights, WeightMLP):
    arrays = {"w1": weights.w1, "w2": weights.w2, "a": weights.a}
  for name, x in arrays.items():
    dtype = getattr(x, "dtype", type(x).__name__)
    if not hasattr(x, "dtype") or not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(f"{name} is {dtype}; give a floating-point array.")
  if not isinstance(weights, WeightMLP):
    fits = weights.shape[-1:] == (number,) and weights.shape[:-2] in ((), like.shape[:2])
    if len(weights.shape) < 2 or not fits:
      batch, length, _ = like.shape
      wanted = f"[{batch}, {length}, C, {number}], or [C, {number}] for all tokens"
      raise ValueError(f"weights has shape {list(weights.shape)}; the sources need {wanted}.")
    return
  if weights.source != -1:
    raise ValueError(f"weights has source={weights.source}, which is for passes alone; give that source as newest.")
  if weights.activation not in ACTIVATIONS:
    raise ValueError(f"activation={weights.activation!r} does not exist; use one of {', '.join(ACTIVATIONS)}.")
  ways = number_of_ways(weights)
  hidden = weights.w1.shape[-1]
  for name, shape, wanted in (
    ("a", weights.a.shape, (ways, number)),
    ("w1", weights.w1.shape, (like.shape[-1], weights.w2.shape[0])),
    ("w2", weights.w2.shape, (hidden, ways, number)),
  ):
    if shape != wanted:
      raise ValueError(f"{name} has shape {list(shape)}; the other arguments need {list(wanted)}.")
  if weights.newest is not None:
    _check_alike("newest", weights.newest, like)
