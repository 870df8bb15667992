"""`mix` against float64 NumPy: streams and every gradient, by every implementation, of both forms of sources and every
form of weights."""

import dataclasses
import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import shapes
from maxtext_mudd import kernels
from tests import mixing
from tests.mixing import FORMS, Case

IMPLEMENTATIONS = ("xla", "pallas_interpret")

# By what they stress. Lists have as many sources as buffers have valid entries.
ROWS = {
  "odd sizes": Case(),
  # one of a kind
  "one token": Case(shape=(1, 1, 40)),
  "one column": Case(shape=(2, 8, 1), epsilon=1.0),  # of which the norm would leave nothing but a sign
  "one source, one way, one hidden number": Case(sources=1, ways=1, hidden=1),
  # blocks of rows, of 128 at most
  "one block for each core": Case(shape=(2, 128, 8)),
  "three blocks for each core": Case(shape=(3, 128, 8)),
  "a partial block": Case(shape=(2, 75, 8)),
  # columns, 128 at a time
  "256 columns": Case(shape=(1, 8, 256)),
  "300 columns": Case(shape=(1, 8, 300)),
  "43 sources": Case(shape=(1, 8, 24), sources=43),
  # extremes
  "large sources": Case(scale=1e4),
  "small sources": Case(scale=1e-3),  # as large as epsilon
  "saturated activations": Case(gain=30.0),
  # settings and dtypes
  "one way, tanh, large epsilon": Case(ways=1, activation="gelu_tanh", epsilon=0.5),
  "bfloat16": Case(shape=(2, 12, 128), hidden=64, dtype="bfloat16"),
  "bfloat16 weights": Case(dtype="bfloat16", weight_dtype="bfloat16"),
}
FREE = ("odd sizes", "large sources", "small sources", "saturated activations")  # one program for each form
VARIANTS = ("channels", "bounded")  # of an array and of an MLP
FAST = {  # of the other rows: a form of weights, and whether sources are a buffer
  ("odd sizes", "channels", False),
  ("odd sizes", "channels", True),
  ("odd sizes", "bounded", False),
  ("odd sizes", "bounded", True),
  ("one column", "newest", False),
  ("one source, one way, one hidden number", "mlp", True),
  ("three blocks for each core", "array", False),
  ("a partial block", "mlp", False),
  ("300 columns", "newest", True),
  ("one way, tanh, large epsilon", "mlp", False),
  ("bfloat16", "mlp", True),
  ("bfloat16", "array", False),
}


def check(case: Case, implementation: str) -> None:
  for output, error in mixing.errors(mixing.draw(case), implementation).items():
    assert error <= mixing.tolerance(case, implementation, output), (output, error)


def rows():
  for name, case in ROWS.items():
    for is_buffer in (False, True):
      for form in FORMS:
        if form == "bounded" and name == "one source, one way, one hidden number":
          continue  # the gradients of scale and W2 are one number each, whose terms cancel to 1/32
        is_fast = (name in FREE and form not in VARIANTS) or (name, form, is_buffer) in FAST
        label = f"{name}-{'buffer' if is_buffer else 'list'}-{form}"
        case = dataclasses.replace(case, form=form, is_buffer=is_buffer)
        yield pytest.param(case, id=label, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", rows())
def test_streams_and_gradients(case, implementation):
  check(case, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", [x if x == "array" else pytest.param(x, marks=pytest.mark.slow) for x in FORMS])
def test_counts(form, implementation):
  """Of one buffer of 33 entries, in groups of 16 or parts of 9: counts at their ends, the first and the last."""
  for count in (1, 9, 10, 16, 17, 32, 33):
    case = Case(shape=(1, 8, 16), ways=1, hidden=4, sources=count, invalid=33 - count, form=form, is_buffer=True)
    check(case, implementation)


@pytest.mark.parametrize("is_buffer", [False, True], ids=["list", "buffer"])
@pytest.mark.parametrize("form", FORMS)
def test_float64_stays_float64(form, is_buffer):
  """Errors seen: up to 6e-16, of sums rounded by 2^-53 = 1.1e-16."""
  case = Case(form=form, is_buffer=is_buffer, dtype="float64", weight_dtype="float64")
  with jax.enable_x64(True):
    inputs = mixing.draw(case)
    assert {x.dtype for x in jax.tree.leaves(mixing.mix(inputs, "xla"))} == {jnp.dtype("float64")}
    assert max(mixing.errors(inputs, "xla").values()) <= 5e-15


# ---------------------------------------------------------------- rounding

# Of the kernel, at the paper's shapes: 1.1 to 1.6 times the largest mean seen.
BUDGETS = {
  "bfloat16": {"streams": 4e-3, "sources": 5e-3, "newest": 4e-3, "w1": 4e-3, "w2": 4e-3, "a": 1.7e-7, "array": 5e-6},
  "float32": {"streams": 5e-7, "sources": 8e-7, "newest": 8e-7, "w1": 7e-7, "w2": 7e-7, "a": 4e-7, "array": 4e-7},
}
SEEDS = 4  # near one rounding of float32 a single draw decides too much


def paper_cases():
  for dtype in BUDGETS:
    for name, shape in shapes.PAPER.items():
      for form in ("newest" if shape.pre_norm else "mlp", "array"):
        for is_buffer in (False, True):
          if (form != "array" and not is_buffer) or name == "2p8b":
            hidden = shapes.hidden_width(4, shape.sources)
            case = Case((1, 16, shape.width), shape.sources, hidden=hidden, form=form, is_buffer=is_buffer, dtype=dtype)
            yield pytest.param(case, id=f"{name}-{'buffer' if is_buffer else 'list'}-{form}-{dtype}")


@pytest.mark.slow
@pytest.mark.parametrize("case", paper_cases())
def test_paper(case):
  """Sixteen tokens of every model: the kernel's mean error is within a budget."""
  found = [mixing.errors(mixing.draw(case, seed), "pallas_interpret") for seed in range(SEEDS)]
  for output in found[0]:
    kernel = np.mean([one[output] for one in found])
    assert kernel <= BUDGETS[case.dtype][output], (output, kernel)


CASES = st.builds(
  Case,
  shape=st.tuples(st.integers(1, 3), st.integers(1, 29), st.integers(2, 300)),
  sources=st.integers(1, 43),
  invalid=st.integers(0, 20),
  ways=st.sampled_from((1, 2, 4)),
  hidden=st.sampled_from((1, 7, 16, 40)),
  form=st.sampled_from(FORMS),
  is_buffer=st.booleans(),
  dtype=st.sampled_from(("float32", "bfloat16")),
  weight_dtype=st.sampled_from(("float32", "bfloat16")),
  activation=st.sampled_from(("gelu", "gelu_tanh")),
)
# A bound for outputs that XLA computes almost exactly: 16 roundings of float32, a quarter of one of bfloat16.
FLOORS = {"float32": 2**-20, "bfloat16": 2**-10}


def check_any(case: Case, seed: int) -> None:
  inputs = mixing.draw(case, seed)
  kernel, xla = (mixing.errors(inputs, implementation) for implementation in ("pallas_interpret", "xla"))
  for output, error in kernel.items():
    assert error <= 1.5 * xla[output] + FLOORS[case.dtype], (output, error, xla[output])


often = functools.partial(settings, deadline=None, derandomize=True, database=None)


@often(max_examples=2)
@given(CASES, st.integers(0, 2**16))
def test_any_shape(case, seed):
  check_any(case, seed)


@pytest.mark.slow
@often(max_examples=40)
@given(CASES, st.integers(0, 2**16))
def test_any_shape_often(case, seed):
  check_any(case, seed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_buffer", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["list", "buffer"])
@pytest.mark.parametrize("form", [pytest.param("static", marks=pytest.mark.slow), "array"])
def test_bfloat16_is_rounded_once(form, is_buffer, implementation):
  """Streams and gradients of sources: half of bfloat16's last digit, and the 2^-17 that the kernel keeps of weights."""
  case = Case((1, 8, 24), sources=33, invalid=0, form=form, is_buffer=is_buffer, dtype="bfloat16")
  inputs = mixing.draw(case)
  streams, to_sources, _ = mixing.mix(inputs, implementation)
  expected = mixing.oracle(inputs)
  sizes = mixing.oracle(jax.tree.map(jnp.abs, inputs))  # of the terms that are summed
  for found, exact, size in ((streams, expected.streams, sizes.streams), (to_sources, expected.sources, sizes.sources)):
    error = np.abs(np.asarray(found).astype(np.float64) - exact)
    assert (error <= 2**-8 * np.abs(exact) + 2**-17 * size).all()


# ---------------------------------------------------------------- what is not finite, and loops


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [16, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_buffer", [False, True], ids=["list", "buffer"])
@pytest.mark.parametrize("form", ["mlp", pytest.param("static", marks=pytest.mark.slow)])
def test_what_is_not_finite_stays_among_eight_tokens(form, is_buffer, rows, implementation):
  """In two blocks of rows: slots without an entry hold rows of other tokens. In plain JAX a token is alone."""
  inputs = mixing.draw(Case((1, rows, 24), ways=1, form=form, is_buffer=is_buffer))
  bad, reach = (0, 3), {"xla": slice(3, 4), "pallas_interpret": slice(0, 8)}[implementation]
  cotangents = [inputs.cotangents[0].at[bad].set(jnp.inf)]
  sources = inputs.sources.at[0, *bad].set(jnp.nan) if is_buffer else list(inputs.sources)
  if not is_buffer:
    sources[0] = sources[0].at[bad].set(jnp.nan)
  streams, to_sources, _ = mixing.mix(inputs._replace(sources=sources, cotangents=cotangents), implementation)
  for x in (streams[0], *to_sources[:3]):
    assert not np.isfinite(x[bad]).any()
    assert np.isfinite(np.delete(x[0], reach, axis=0)).all()
  assert not any(np.any(x) for x in to_sources[3:])


def scanned(implementation, start, w1, w2, a):
  """Each block is the tanh of the mean of its streams; the loop index counts the entries."""
  layers = a.shape[0]

  def block(buffer, layer):
    i, *weights = layer
    streams = kernels.mix(buffer, kernels.WeightMLP(*weights), count=i + 1, implementation=implementation)
    return buffer.at[i + 1].set(jnp.tanh(sum(streams) / 4)), None

  buffer = jnp.full((layers + 1, *start.shape), jnp.nan).at[0].set(start)
  return jax.lax.scan(block, buffer, (jnp.arange(layers), w1, w2, a))[0]


def unrolled(start, w1, w2, a):
  sources = [start]
  for i in range(a.shape[0]):
    streams = kernels.mix(sources, kernels.WeightMLP(w1[i], w2[i, ..., : i + 1], a[i, :, : i + 1]))
    sources.append(jnp.tanh(sum(streams) / 4))
  return jnp.stack(sources)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scan_is_the_unrolled_loop(implementation):
  """Errors of float32 through three blocks and back; seen: up to 5e-7."""
  normal = mixing.Draw(0, "float32")
  layers, width, hidden = 3, 24, 8
  of_weights = [(layers, width, hidden), (layers, hidden, 4, layers + 1), (layers, 4, layers + 1)]
  args = [normal(*shape, scale=0.3) for shape in ((1, 8, width), *of_weights)]
  cotangent = normal(layers + 1, *args[0].shape)

  def both(function):
    made, vjp = jax.vjp(function, *args)
    return [made, *vjp(cotangent)]

  with mixing.no_races():
    found = jax.block_until_ready(jax.jit(functools.partial(both, functools.partial(scanned, implementation)))())
  expected = jax.jit(functools.partial(both, unrolled))()
  assert max(map(mixing.error, found, map(np.asarray, expected))) <= 3e-6


@pytest.mark.parametrize(("heads", "has_static"), [(2, True), (4, False)])
@pytest.mark.parametrize("is_buffer", [False, True], ids=["list", "buffer"])
def test_weights_of_each_channel(is_buffer, heads, has_static):
  """W[b,t,c,d,j] = w[b,t,c,h(d),j] + a[c,d,j], in float64 NumPy; entries of a buffer that are not valid are NaN."""
  rng = np.random.default_rng(0)
  shapes = (5, 2, 3, 8), (2, 3, 2, heads, 5), (2, 8, 5)
  x, w, a = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
  to_streams = rng.standard_normal((2, 2, 3, 8)).astype(np.float32)
  valid = 4 if is_buffer else 5
  if is_buffer:
    x[valid:] = np.nan

  def mixed(x, w, a):
    sources, count = (x, jnp.asarray(valid)) if is_buffer else (list(x), None)
    return jnp.stack(kernels.mix(sources, kernels.ChannelWeights(w, a if has_static else None), count=count))

  streams, vjp = jax.vjp(mixed, x, w, a)
  wide_x, wide_w, wide_a, g = (np.asarray(value, np.float64) for value in (x, w, a, to_streams))
  total = (wide_w[:, :, :, np.arange(8) * heads // 8] + (wide_a if has_static else 0))[..., :valid]
  to_channels = np.einsum("jbtd,cbtd->btcdj", wide_x[:valid], g)
  expected = [
    np.einsum("btcdj,jbtd->cbtd", total, wide_x[:valid]),
    np.einsum("btcdj,cbtd->jbtd", total, g),
    to_channels.reshape(*to_channels.shape[:3], heads, -1, valid).sum(-2),
    to_channels.sum((0, 1)) * has_static,
  ]
  to_x, to_w, to_a = vjp(jnp.asarray(to_streams))
  found = [streams, to_x[:valid], to_w[..., :valid], to_a[..., :valid]]
  for value, right in zip(found, expected):
    np.testing.assert_allclose(value, right, rtol=0, atol=8e-7 * np.abs(right).max())
  for rest in (to_x[valid:], to_w[..., valid:], to_a[..., valid:]):
    assert not np.any(rest)
