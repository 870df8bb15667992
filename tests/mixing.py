"""Random cases of `kernels.mix`, run by an implementation, and their errors beside the float64 oracle."""

import contextlib
import dataclasses
import functools
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxtext_mudd import kernels
from tests import kernel_oracle

# Of weights; "newest": an MLP on an array that is not among the sources; "bounded": an MLP with cap and scale.
FORMS = ("static", "array", "channels", "mlp", "newest", "bounded")


@dataclasses.dataclass(frozen=True)
class Case:
  """What is drawn; by default the smallest case that is odd in every respect.

  Attributes:
    shape: B, T and D of a source.
    sources: N; of a buffer, its valid entries.
    invalid: the entries of a buffer, and columns of weights, that are not valid and hold NaN.
    form: of the weights, one of `FORMS`.
    weight_dtype: of the weights; W1 and W2 hold numbers that the dtype of the sources has, too.
    scale: of the sources.
    gain: of the numbers that the activation is applied to.
  """

  shape: tuple[int, int, int] = (2, 5, 24)
  sources: int = 3
  invalid: int = 2
  ways: int = 4
  hidden: int = 16
  form: str = "mlp"
  is_buffer: bool = False
  dtype: str = "float32"
  weight_dtype: str = "float32"
  activation: str = "gelu"
  epsilon: float = 1e-6
  scale: float = 1.0
  gain: float = 1.0


class Inputs(NamedTuple):
  """The arguments of `mix`, and gradients of its streams."""

  sources: Any
  weights: kernels.Weights
  cotangents: list
  count: jax.Array | None


class Draw:
  """Normal arrays, rounded to a dtype."""

  def __init__(self, seed: int, dtype: str):
    self.rng, self.dtype = np.random.default_rng(seed), dtype

  def __call__(self, *shape, scale=1.0, dtype=None):
    return jnp.asarray(scale * self.rng.standard_normal(shape), dtype or self.dtype)

  def weights(self, form: str, case: Case, columns: int) -> kernels.Weights:
    """Weights of these columns, in one of `FORMS` or "hidden", a hidden layer."""
    *tokens, width = case.shape
    if form in ("static", "array"):
      return self(*(tokens if form == "array" else ()), case.ways, columns, dtype=case.weight_dtype)
    if form == "channels":
      w, a = (self(*shape, columns, dtype=case.weight_dtype) for shape in ((*tokens, case.ways, 1), (case.ways, width)))
      return kernels.ChannelWeights(w, a)
    a = self(case.ways, columns, dtype=case.weight_dtype)
    w2 = self(case.hidden, case.ways, columns, scale=case.hidden**-0.5).astype(case.weight_dtype)
    bound = {}
    if form == "bounded":
      bound = {"cap": 2.0 * case.gain, "scale": self(case.ways, columns, dtype=case.weight_dtype)}
    if form == "hidden":
      return kernels.HiddenLayer(self(*tokens, case.hidden), w2, a)
    w1 = self(width, case.hidden, scale=case.gain * width**-0.5).astype(case.weight_dtype)
    newest = self(*case.shape, scale=case.scale) if form == "newest" else None
    return kernels.WeightMLP(w1, w2, a, newest, activation=case.activation, epsilon=case.epsilon, **bound)


def draw(case: Case, seed: int = 0) -> Inputs:
  """Random inputs; whatever is not valid is NaN."""
  normal, valid = Draw(seed, case.dtype), case.sources
  entries = valid + (case.invalid if case.is_buffer else 0)
  sources = normal(entries, *case.shape, scale=case.scale)
  weights = normal.weights(case.form, case, entries)
  cotangents = [normal(*case.shape) for _ in range(case.ways)]
  if not case.is_buffer:
    return Inputs(list(sources), weights, cotangents, None)
  weights = kernels.map_columns(weights, lambda x: x.at[..., valid:].set(jnp.nan))
  return Inputs(sources.at[valid:].set(jnp.nan), weights, cotangents, jnp.int32(valid))


@functools.partial(jax.jit, static_argnames="implementation")
def _mixed(inputs: Inputs, implementation: str):
  def call(sources, weights):
    return kernels.mix(sources, weights, count=inputs.count, implementation=implementation)

  streams, vjp = jax.vjp(call, inputs.sources, inputs.weights)
  return streams, *vjp(inputs.cotangents)


def mix(inputs: Inputs, implementation: str):
  """(streams, gradients of the sources, gradients of the weights by name)."""
  with no_races():
    streams, to_sources, to_weights = jax.block_until_ready(_mixed(inputs, implementation))
  return streams, to_sources, fields(to_weights)


def oracle(inputs: Inputs) -> kernel_oracle.Mixed:
  """The same by the oracle."""
  weights, settings = inputs.weights, {}
  if isinstance(weights, kernels.WeightMLP):
    settings = {
      "source": weights.source,
      "activation": weights.activation,
      "epsilon": weights.epsilon,
      "cap": weights.cap,
    }
  return kernel_oracle.mix(inputs.sources, fields(weights), inputs.cotangents, inputs.count, **settings)


def fields(weights: kernels.Weights) -> dict:
  """Weights, or their gradients, as the oracle names them."""
  if not dataclasses.is_dataclass(weights):
    return {"array" if weights.ndim == 4 else "a": weights}
  return {name: x for name, x in vars(weights).items() if hasattr(x, "shape")}


def errors(inputs: Inputs, implementation: str) -> dict[str, float]:
  """By name, the error of the streams, of the sources' gradients and of those of the weights: the largest difference
  over the largest value of an array. What is not valid has gradients of zero."""
  streams, to_sources, to_weights = mix(inputs, implementation)
  expected = oracle(inputs)
  valid = len(inputs.sources) if inputs.count is None else int(inputs.count)
  assert not any(np.any(x) for x in to_sources[valid:])
  assert to_weights.keys() == expected.weights.keys()
  for name in to_weights.keys() & {"array", "a", "w", "w2", "scale"}:
    assert not np.any(to_weights[name][..., valid:])
  return {
    "streams": largest_error(streams, expected.streams),
    "sources": largest_error(to_sources[:valid], expected.sources[:valid]),
    **{name: error(x, expected.weights[name]) for name, x in to_weights.items()},
  }


def tolerance(case: Case, implementation: str, output: str) -> float:
  """Of an error; the largest errors seen over all tests are in brackets.

  float32: sums are rounded by 2^-24 at each step [6.4e-7; of some outputs 2e-7].
  bfloat16: the hidden layer is rounded by 2^-9, and what has that dtype once more [6e-3; of W1, W2 and scale 2e-3].
    Other gradients of weights are float32 sums of exact products [2e-7], of which the kernel keeps 2^-17, but for `a`
    [4e-6].
  bfloat16 weights: their gradients, too, are rounded [4.8e-3].
  """
  if case.dtype == "float32":
    return 1.5e-6
  is_rounded = output in ("streams", "sources", "newest") or case.weight_dtype == "bfloat16"
  if is_rounded or (output in ("w1", "w2", "scale") and case.form in ("mlp", "newest", "bounded")):
    return 1e-2
  return 8e-7 if implementation == "xla" or output == "a" else 1e-5


def largest_error(found, expected) -> float:
  assert len(found) == len(expected)
  return max(map(error, found, expected))


def error(found, expected) -> float:
  """NaN where anything is not finite."""
  assert found.shape == expected.shape
  largest = np.abs(expected).max()
  assert largest > 0
  return float(np.abs(np.asarray(found).astype(np.float64) - expected).max() / largest)


@contextlib.contextmanager
def no_races():
  """Fails where the interpreter says that it found a race. Its own flag is of the last kernel alone."""
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    yield
  assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()


def equations(jaxpr):
  """All equations of a traced program, those of inner programs and kernels included."""
  for equation in jaxpr.eqns:
    yield equation
    for x in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      yield from equations(getattr(x, "jaxpr", x)) if hasattr(x, "eqns") else ()
