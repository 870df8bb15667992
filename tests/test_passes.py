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

from maxtext_mudd import kernels
from maxtext_mudd.kernels import Buffer, Passes, Pending, map_columns
from tests import kernel_oracle, mixing
from tests.mixing import Case, fields

IMPLEMENTATIONS = ("xla", "pallas_interpret")
FORMS = (*(x for x in mixing.FORMS if x != "channels"), "hidden")
CASES = {
  "float32": Case((1, 16, 300), sources=5, ways=3, hidden=8),
  "bfloat16": Case((2, 12, 24), sources=5, ways=3, hidden=8, dtype="bfloat16"),
  "two partial blocks": Case((2, 75, 8), sources=5, ways=3, hidden=8),
  "two cores": Case((2, 128, 8), sources=5, ways=3, hidden=8),
}


def passes(implementation: str, in_place: tuple[int, ...] | None) -> Passes:
  """For arrays of these lengths that are updated in place, in blocks of 16 entries and 8 rows: JAX's strict interpreter
  returns them with what their last block lacks, and is not taken where it lacks something."""
  is_whole = in_place is None or (np.prod(in_place[-3:-1]) % 8 == 0 and (in_place[0] < 16 or in_place[0] % 16 == 0))
  return Passes(implementation, strict=is_whole)


def run(function: Callable, *arguments, **named):
  with mixing.no_races():
    return jax.block_until_ready(jax.jit(function)(*arguments, **named))


def check(case: Case, implementation: str, output: str, found, expected) -> None:
  error = mixing.largest_error(found, expected)
  assert error <= mixing.tolerance(case, implementation, output), (output, error)


def wide(arrays) -> np.ndarray:
  return np.stack([np.asarray(x).astype(np.float64) for x in arrays])


def check_weights(case: Case, implementation: str, found: kernels.Weights, expected: kernel_oracle.Mixed) -> None:
  assert fields(found).keys() == expected.weights.keys()
  for name, exact in expected.weights.items():
    check(case, implementation, name, [fields(found)[name]], [exact])


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
  "near, MLP on another array recomputed": Plan((0, 4), False, "newest"),
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
  case, normal = dataclasses.replace(case, form=form), mixing.Draw(0, case.dtype)
  sources = [normal(*case.shape) for _ in range(case.sources)]
  weights = normal.weights(form, case, case.sources)
  cotangents = [normal(*case.shape) for _ in range(case.ways)]
  totals = [normal(*case.shape) for _ in plan.near] if plan.totals else None
  recompute, before = None, dataclasses.replace(case, ways=2, hidden=4)
  if plan.recompute:
    recompute = map_columns(normal.weights(plan.recompute, before, case.sources), lambda x: x.at[..., 3:].set(0))
    if plan.recompute == "mlp":
      recompute = dataclasses.replace(recompute, source=2)

  backward = functools.partial(
    passes(implementation, case.shape if plan.totals else None).backward, near=plan.near, keep_hidden=True
  )
  made = run(backward, sources, weights, cotangents, totals=totals, recompute=recompute)

  expected = kernel_oracle.mix(sources, fields(weights), cotangents, cap=getattr(weights, "cap", None))
  to_near = expected.sources[list(plan.near)] + (wide(totals) if plan.totals else 0)
  check(case, implementation, "sources", made.sources, to_near)
  check_weights(case, implementation, made.weights, expected)
  if form in ("mlp", "newest", "bounded"):
    check(case, implementation, "streams", [made.hidden], [expected.hidden])
  assert (made.streams is None) == (plan.recompute is None)
  if plan.recompute:
    recomputed = kernel_oracle.mix(sources, fields(recompute), cotangents[:2], source=2)
    check(case, implementation, "streams", made.streams, recomputed.streams)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("count", "entries"), [(3, 5), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((16, 32), (17, 32), (17, 19)))]
)
@pytest.mark.parametrize("form", [x if x == "mlp" else pytest.param(x, marks=pytest.mark.slow) for x in FORMS])
def test_backward_of_a_buffer_adds_to_totals(form, count, entries, implementation):
  """Totals of entries that are not valid may hold and become anything."""
  case = Case((2, 8, 24), sources=count, invalid=entries - count, form=form, is_buffer=True)
  sources, weights, cotangents, _ = mixing.draw(case)
  totals = mixing.Draw(1, case.dtype)(*sources.shape).at[count:].set(jnp.nan)
  backward = passes(implementation, sources.shape).backward

  def call(sources, count, *arguments):
    return backward(Buffer(sources, count), *arguments, totals=totals)

  made = run(call, sources, jnp.int32(count), weights, cotangents)
  expected = kernel_oracle.mix(sources, fields(weights), cotangents, count, cap=getattr(weights, "cap", None))
  exact = expected.sources[:count] + wide(totals[:count])
  check(case, implementation, "sources", made.sources[:count], exact)
  check_weights(case, implementation, made.weights, expected)


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
  """Of several aggregates, aggregate k does not mix source k; none mixes source 4."""
  normal, count = mixing.Draw(0, case.dtype), case.sources
  pushed = []
  for k, (form, ways) in enumerate(aggregates):
    weights = normal.weights(form, dataclasses.replace(case, ways=ways, hidden=4 + k), count)
    others = [4] if len(aggregates) == 1 else [k, 4]
    weights = map_columns(weights, lambda x, others=others: x.at[..., jnp.array(others)].set(0))
    pushed.append(Pending([normal(*case.shape) for _ in range(ways)], weights))
  totals = [normal(*case.shape) for _ in range(count)] if has_totals else None

  push = functools.partial(passes(implementation, case.shape if has_totals else None).push, count=count)
  made = run(push, pushed, totals)

  expected = kernel_oracle.push([(one.gradients, fields(one.weights)) for one in pushed])
  expected += wide(totals) if has_totals else 0
  np.testing.assert_array_equal(made[4], expected[4])
  check(case, implementation, "sources", made[:4], expected[:4])
