"""The public entry to depth-wise aggregation: checks the shapes, picks the implementation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int
import numpy as np

from maxtext_mudd.kernels import buffer, fused, reference
from maxtext_mudd.kernels.choice import DTYPES, IMPLEMENTATIONS, STRICTLY, is_fused
from maxtext_mudd.kernels.tpu import Settings, Weights


@jax.named_scope("depth_aggregate")
def depth_aggregate(
  sources: Sequence[Float[Array, "B T D"]] | Float[Array, "N B T D"],
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
  """Mixes the outputs of earlier blocks into `ways` streams, each token with weights of its own (paper, Eqs. 5 and 6).

      W   = act(RMSNorm(newest) @ w1) @ w2 + a
      x^c = sum_j W[..., c, j] * sources[j]

  Matrix products run in the dtype of the sources; statistics and sums in float32 or wider.

  Args:
    sources: N arrays of one shape and dtype, oldest first; or, with `count`, one buffer of N entries, for loops over
      layers that are traced once.
    w1: first weight matrix; None, together with w2, for static weights (`a` alone).
    w2: second weight matrix.
    a: static weights.
    ways: C, the number of streams.
    newest: what the weights are made from, when that is not the newest source: X_i itself, where the sources are
      pre-normed.
    count: how many entries of the buffer are valid, 1 to N, the newest being entry count - 1; where it is traced, it is
      clipped to that range. Whatever the others hold, and w2[..., count:] and a[:, count:], is ignored, NaN included,
      and gets a gradient of zero.
    activation: "gelu" (exact) or "gelu_tanh".
    epsilon: added to the mean square in RMSNorm.
    implementation: "xla", plain JAX; "pallas", the fused kernel of TPUs, for bfloat16 and float32; "pallas_interpret",
      the same anywhere, slowly and strictly, for tests; "auto": "pallas" on TPU, "xla" elsewhere.
    sharding: of a source, where the fused kernel runs on several devices: batch and length may be split, and D.

  Returns:
    C arrays of the shape and dtype of a source.

  Raises:
    ValueError: an argument that does not fit the others, or an unknown name; one sentence.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r} does not exist; use one of {', '.join(IMPLEMENTATIONS)}.")
  if activation not in reference.ACTIVATIONS:
    raise ValueError(f"activation={activation!r} does not exist; use one of {', '.join(reference.ACTIVATIONS)}.")
  is_buffer = hasattr(sources, "shape")
  if is_buffer:
    _check_buffer(sources, count)
  elif count is not None:
    raise ValueError("count goes with one buffer [N,B,T,D]; leave it out where sources are a list.")
  if not len(sources):
    raise ValueError("sources is empty; depth_aggregate needs at least the newest block output.")
  shape, dtype = (sources.shape[1:], sources.dtype) if is_buffer else (sources[-1].shape, sources[-1].dtype)
  alike = [] if newest is None else [("newest", newest)]
  alike += [] if is_buffer else [(f"sources[{j}]", x) for j, x in enumerate(sources)]
  for name, x in alike:
    if x.shape != shape or x.dtype != dtype:
      raise ValueError(f"{name} is {x.dtype}{list(x.shape)}, sources[-1] is {dtype}{list(shape)}; make them equal.")
  if len(shape) != 3 or not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"a source is {dtype}{list(shape)}; give floating-point arrays [B,T,D].")
  if a is None:
    raise ValueError("a is missing; the static weights [C,N] are needed, zeros at the least.")
  if a.shape != (ways, len(sources)):
    wanted = [ways, len(sources)]
    raise ValueError(f"a has shape {list(a.shape)}; {ways} ways and {len(sources)} sources need {wanted}.")
  if (w1 is None) != (w2 is None):
    raise ValueError("w1 and w2 go together; give both, or neither for static weights.")
  if w1 is not None:
    for name, found, wanted in (
      ("w1", w1.shape, (shape[-1], w2.shape[0])),
      ("w2", w2.shape, (w1.shape[-1], ways, len(sources))),
    ):
      if found != wanted:
        raise ValueError(f"{name} has shape {list(found)}; the other arguments need {list(wanted)}.")
  if is_buffer:
    count = jnp.clip(jnp.asarray(count, jnp.int32), 1, len(sources))
  elif newest is None:
    newest = sources[-1]
  platform = jax.default_backend() if sharding is None else sharding.mesh.devices.flat[0].platform
  runs_fused = is_fused(implementation, platform, dtype)
  if runs_fused and dtype.name not in DTYPES:
    raise ValueError(f"the sources are {dtype}; implementation={implementation!r} takes {' or '.join(DTYPES)}.")
  settings = Settings(activation, epsilon, STRICTLY if implementation == "pallas_interpret" else False)
  if is_buffer:
    passes = buffer.Passes(runs_fused, settings, sharding)
    return buffer.depth_aggregate(passes, sources, count, newest if w1 is not None else None, Weights(a, w2, w1))
  if runs_fused:
    return fused.depth_aggregate(sources, newest, w1, w2, a, settings, sharding)
  return reference.depth_aggregate(sources, newest, w1, w2, a, activation=activation, epsilon=epsilon)


def _check_buffer(buffer, count) -> None:
  if buffer.ndim != 4:
    raise ValueError(f"sources has shape {list(buffer.shape)}; a buffer of sources is [N,B,T,D].")
  if count is None:
    raise ValueError("sources is one buffer; give count, the number of its valid entries, or a list of sources.")
  if isinstance(count, int | np.integer):
    if not 1 <= count <= buffer.shape[0]:
      raise ValueError(f"count={count} is not in 1..{buffer.shape[0]}, the number of entries in the buffer.")
  elif jnp.shape(count) or not jnp.issubdtype(jnp.result_type(count), jnp.integer):
    raise ValueError(f"count is {jnp.result_type(count)}{list(jnp.shape(count))}; give one int.")
