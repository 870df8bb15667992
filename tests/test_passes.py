"""The passes that models call directly, each by itself, against float64 NumPy: gradients of some of the sources, added
to what was there before, with streams of another aggregate recomputed; and the push of several aggregates."""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_mudd.kernels import Buffer, Passes, Pushed, map_columns
from tests import kernel_oracle, mixing
from tests.mixing import Case, fields

IMPLEMENTATIONS = ("xla", "pallas_interpret")
FORMS = (*mixing.FORMS, "hidden")
CASES = {
  "float32": Case((2, 12, 24), sources=5, ways=3, hidden=8),
  "bfloat16": Case((2, 12, 24), sources=5, ways=3, hidden=8, dtype="bfloat16"),
  "two partial blocks": Case((2, 75, 8), sources=5, ways=3, hidden=8),
  "two cores": Case((2, 128, 8), sources=5, ways=3, hidden=8),
}

# Of the largest error over the largest value; seen: TODO
TOLERANCES = {"float32": 1.5e-6, "bfloat16": 1e-2}


def passes(implementation: str, case: Case, totals) -> Passes:
  """JAX's strict interpreter returns arrays that are updated in place with the rows that their last block lacks."""
  is_partial = np.prod(case.shape[:2]) % 8 > 0
  return Passes(implementation, strict=totals is None or not is_partial)


def run(function: Callable, *arguments, **named):
  with mixing.no_races():
    return jax.block_until_ready(jax.jit(function)(*arguments, **named))


def close(found, expected, case: Case, what: str) -> None:
  error = mixing.error(found, expected)
  assert error <= TOLERANCES[case.dtype], (what, error)


def wide(arrays) -> np.ndarray:
  return np.stack([np.asarray(x).astype(np.float64) for x in arrays])


# ---------------------------------------------------------------- backward


class Plan(NamedTuple):
  """What a backward pass is asked for.

  Attributes:
    near: the sources whose gradients are made.
    totals: whether they are added to something.
    recompute: form of the weights of the aggregate whose streams are recomputed, from the third source where they are
      made from one; None: no such aggregate.
  """

  near: tuple[int, ...]
  totals: bool
  recompute: str | None = None


PLANS = {
  "all": Plan((0, 1, 2, 3, 4), False),
  "near, totals": Plan((1, 4), True),
  "near, MLP recomputed": Plan((0, 1, 4), False, "mlp"),
  "near, totals, static recomputed": Plan((3, 4), True, "static"),
  "newest, totals, MLP recomputed": Plan((4,), True, "mlp"),
  "newest, array recomputed": Plan((4,), False, "array"),
  "all, totals, hidden layer recomputed": Plan((0, 1, 2, 3, 4), True, "hidden"),
}
FAST = {
  ("mlp", "newest, totals, MLP recomputed"),
  ("newest", "near, totals, static recomputed"),
  ("static", "near, MLP recomputed"),
  ("array", "near, totals"),
  ("hidden", "newest, array recomputed"),
}


def backward_cases():
  for name, case in CASES.items():
    for form in FORMS:
      for plan in PLANS:
        if name in ("float32", "bfloat16") or (form, plan) in FAST:
          marks = () if name == "float32" and (form, plan) in FAST else pytest.mark.slow
          yield pytest.param(case, form, PLANS[plan], id=f"{name}-{form}-{plan}", marks=marks)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "form", "plan"), backward_cases())
def test_backward(case, form, plan, implementation):
  normal = mixing.Draw(0, case.dtype)
  sources = [normal(*case.shape) for _ in range(case.sources)]
  weights = normal.weights(form, case, case.sources)
  cotangents = [normal(*case.shape) for _ in range(case.ways)]
  totals = [normal(*case.shape) for _ in plan.near] if plan.totals else None
  recompute, before = None, dataclasses.replace(case, ways=2, hidden=4)
  if plan.recompute:
    recompute = map_columns(normal.weights(plan.recompute, before, case.sources), lambda x: x.at[..., 3:].set(0))
    if plan.recompute == "mlp":
      recompute = dataclasses.replace(recompute, source=2)

  backward = functools.partial(passes(implementation, case, totals).backward, near=plan.near, keep_hidden=True)
  made = run(backward, sources, weights, cotangents, totals=totals, recompute=recompute)

  expected = kernel_oracle.mix(sources, fields(weights), cotangents)
  to_near = expected.sources[list(plan.near)] + (wide(totals) if plan.totals else 0)
  assert len(made.sources) == len(plan.near)
  for j, found, exact in zip(plan.near, made.sources, to_near):
    close(found, exact, case, f"source {j}")
  assert fields(made.weights).keys() == expected.weights.keys()
  for name, exact in expected.weights.items():
    close(fields(made.weights)[name], exact, case, name)
  if form in ("mlp", "newest"):
    close(made.hidden, expected.hidden, case, "hidden")
  if not plan.recompute:
    assert made.streams is None
    return
  recomputed = kernel_oracle.mix(sources, fields(recompute), cotangents[:2], source=2)
  assert len(made.streams) == 2
  for found, exact in zip(made.streams, recomputed.streams):
    close(found, exact, case, "recomputed stream")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [3, pytest.param(17, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", [x if x == "mlp" else pytest.param(x, marks=pytest.mark.slow) for x in FORMS])
def test_backward_of_a_buffer_adds_to_totals(form, count, implementation):
  """Totals of entries that are not valid may hold and become anything."""
  case = Case((2, 8, 24), sources=count, invalid=2, form="static" if form == "hidden" else form, is_buffer=True)
  sources, weights, cotangents, _ = mixing.draw(case)
  normal = mixing.Draw(1, case.dtype)
  if form == "hidden":
    weights = map_columns(normal.weights(form, case, count + 2), lambda x: x.at[..., count:].set(jnp.nan))
  totals = normal(*sources.shape).at[count:].set(jnp.nan)
  backward = passes(implementation, case, totals).backward

  def call(sources, count, *arguments):
    return backward(Buffer(sources, count), *arguments, totals=totals)

  made = run(call, sources, jnp.int32(count), weights, cotangents)
  expected = kernel_oracle.mix(sources, fields(weights), cotangents, count)
  for j in range(count):
    close(made.sources[j], expected.sources[j] + wide(totals[j : j + 1])[0], case, f"source {j}")
  for name, exact in expected.weights.items():
    close(fields(made.weights)[name], exact, case, name)


# ---------------------------------------------------------------- push

AGGREGATES = {  # form of the weights and number of ways of each
  "one": [("static", 4)],
  "hidden layers": [("hidden", 4), ("hidden", 1)],
  "arrays": [("array", 4), ("array", 2)],
  "of all forms": [("static", 3), ("hidden", 4), ("array", 1), ("hidden", 2)],
}


def push_cases():
  for name, case in CASES.items():
    for aggregates in AGGREGATES:
      is_fast = name == "float32" and aggregates == "of all forms"
      marks = () if is_fast else pytest.mark.slow
      yield pytest.param(case, AGGREGATES[aggregates], id=f"{name}-{aggregates}", marks=marks)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("has_totals", [False, True], ids=["no totals", "totals"])
@pytest.mark.parametrize(("case", "aggregates"), push_cases())
def test_push(case, aggregates, has_totals, implementation):
  """Source k is not mixed by aggregate k, and source 4 by none."""
  normal, count = mixing.Draw(0, case.dtype), case.sources
  pushed = []
  for k, (form, ways) in enumerate(aggregates):
    weights = normal.weights(form, dataclasses.replace(case, ways=ways, hidden=4 + k), count)
    weights = map_columns(weights, lambda x, k=k: x.at[..., jnp.array([k, 4])].set(0))
    pushed.append(Pushed([normal(*case.shape) for _ in range(ways)], weights))
  totals = [normal(*case.shape) for _ in range(count)] if has_totals else None

  push = functools.partial(passes(implementation, case, totals).push, count=count)
  made = run(push, pushed, totals)

  expected = kernel_oracle.push([(one.gradients, fields(one.weights)) for one in pushed])
  assert len(made) == count
  np.testing.assert_array_equal(made[4], totals[4] if has_totals else np.zeros(case.shape))
  for j, found in enumerate(made):
    exact = expected[j] + (wide(totals)[j] if has_totals else 0)
    if exact.any():
      close(found, exact, case, f"source {j}")
