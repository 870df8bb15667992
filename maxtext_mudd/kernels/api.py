"""The public entry to depth-wise aggregation: checks the shapes, picks the implementation."""

from collections.abc import Sequence

from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from maxtext_mudd.kernels import reference, tpu

IMPLEMENTATIONS = ("auto", "xla", "pallas", "pallas_interpret")

# Interpreted as strictly as can be: what the kernel never wrote reads as NaN, and races are looked for.
_INTERPRETED = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True, out_of_bounds_reads="uninitialized")


def depth_aggregate(
  sources: Sequence[Float[Array, "B T D"]],
  w1: Float[Array, "D K"] | None,
  w2: Float[Array, "K C N"] | None,
  a: Float[Array, "C N"],
  *,
  ways: int,
  newest: Float[Array, "B T D"] | None = None,
  activation: str = "gelu",
  epsilon: float = 1e-6,
  implementation: str = "auto",
) -> list[Float[Array, "B T D"]]:
  """Mixes the outputs of earlier blocks into `ways` streams, each token with weights of its own (paper, Eqs. 5 and 6).

      W   = act(RMSNorm(newest) @ w1) @ w2 + a
      x^c = sum_j W[..., c, j] * sources[j]

  Matrix products run in the dtype of the sources; statistics and sums in float32 or wider.

  Args:
    sources: N arrays of one shape and dtype, oldest first.
    w1: first weight matrix; None, together with w2, for static weights (`a` alone).
    w2: second weight matrix.
    a: static weights.
    ways: C, the number of streams.
    newest: what the weights are made from, when that is not sources[-1]: X_i itself, where the sources are pre-normed.
    activation: "gelu" (exact) or "gelu_tanh".
    epsilon: added to the mean square in RMSNorm.
    implementation: "xla", also for "auto"; "pallas", the fused kernel of TPUs, for bfloat16 and float32 on one device;
      "pallas_interpret", the same anywhere, slowly, for tests.

  Returns:
    C arrays of the shape and dtype of a source.

  Raises:
    ValueError: an argument that does not fit the others, or an unknown name; one sentence.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r} does not exist; use one of {', '.join(IMPLEMENTATIONS)}.")
  if activation not in reference.ACTIVATIONS:
    raise ValueError(f"activation={activation!r} does not exist; use one of {', '.join(reference.ACTIVATIONS)}.")
  if not sources:
    raise ValueError("sources is empty; depth_aggregate needs at least the newest block output.")
  newest = sources[-1] if newest is None else newest
  shape, dtype = sources[-1].shape, sources[-1].dtype
  for name, x in [("newest", newest), *((f"sources[{j}]", x) for j, x in enumerate(sources))]:
    if x.shape != shape or x.dtype != dtype:
      raise ValueError(f"{name} is {x.dtype}{list(x.shape)}, sources[-1] is {dtype}{list(shape)}; make them equal.")
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
  if not implementation.startswith("pallas"):
    return reference.depth_aggregate(sources, newest, w1, w2, a, activation=activation, epsilon=epsilon)
  if dtype.name not in ("bfloat16", "float32"):
    raise ValueError(f"the sources are {dtype}; implementation={implementation!r} takes bfloat16 or float32.")
  interpret = _INTERPRETED if implementation == "pallas_interpret" else False
  return tpu.depth_aggregate(sources, newest, w1, w2, a, activation=activation, epsilon=epsilon, interpret=interpret)
