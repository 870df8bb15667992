"""Reverse-mode differentiation over many aggregates: its gradients are those of the plain sums, as JAX makes them."""

import functools
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_mudd import kernels
from maxtext_mudd.config.keys import MuddKeys
from maxtext_mudd.connections import history
from maxtext_mudd.connections.base import Link, Plan
from maxtext_mudd.connections.history import History
from maxtext_mudd.connections.mudd import sites
from tests import models
from tests.placements import BLOCKS, IRREGULAR

SHAPE, HIDDEN = (2, 12, 16), 8
BUDGET = 2e-5  # of the largest entry of a gradient; the errors seen are below 4e-6

CASES = {  # blocks, and the keys that differ from the defaults
  "one group": (3, {}),
  "a full group": (4, {}),
  "two groups and one aggregate": (9, {}),
  "one way": (6, {"mudd_ways": 1}),
  "static weights": (6, {"mudd_dynamic": False}),
  "window": (10, {"mudd_window": 3}),
  "dilation": (11, {"mudd_source_dilation": 2}),
  "2x2": (12, {"mudd_source_dilation": 2, "mudd_block_period": 2}),
  "no aggregate at the end, two streams": (7, {"mudd_block_period": 3, "mudd_dense_streams": "qr"}),
  "the upper half": (10, {"mudd_depth_start": 0.5}),
  "placements": (BLOCKS, {"mudd_placements": IRREGULAR}),
  "extra embeddings": (9, {"mudd_extra_embeddings": 4, "mudd_embedding_groups": 2}),
}

# Each is like another one: "2x2" has the dilation, "placements" sources like those of a window and of the upper half.
SLOW = ("one group", "a full group", "one way", "window", "dilation", "the upper half")


def plan_of(blocks: int, **keys) -> Plan:
  """The plan of a MUDD model whose weight MLPs are as wide as they have weights."""
  narrow = {"mudd_last_hidden_expansion": 1.0, "mudd_hidden_round_to": 0} if keys.get("mudd_dynamic", True) else {}
  values = MuddKeys(mudd=True, **keys, **narrow).model_dump()
  return sites.plan(types.SimpleNamespace(num_decoder_layers=blocks, decoder_block=models.LLAMA2, **values))


def parameters(plan: Plan):
  """(the embeddings, extra ones first; of each block its matrices and the weights of the aggregate before it; those of
  the last one)."""
  rng = np.random.default_rng(0)

  def normal(*shape, scale=1.0):
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

  def weights(aggregate):
    if aggregate is None:
      return None
    size = (aggregate.ways, len(aggregate.sources))
    a = normal(*size, scale=size[1] ** -0.5)
    if not aggregate.hidden:
      return a
    w1 = normal(SHAPE[-1], aggregate.hidden, scale=SHAPE[-1] ** -0.5)
    return kernels.WeightMLP(w1, normal(aggregate.hidden, *size, scale=0.3 * aggregate.hidden**-0.5), a)

  width = SHAPE[-1]
  blocks = []
  for block in range(1, plan.num_blocks + 1):
    ways = plan.before(block).ways if plan.before(block) else 1
    blocks.append((normal(ways, width, width, scale=0.5 * width**-0.5), weights(plan.before(block))))
  embeddings = [normal(*SHAPE) for _ in range(plan.oldest, 1)]
  return embeddings, blocks, weights(plan.sites.get(plan.num_blocks))


def output_of(matrices, streams, newest):
  """A block."""
  return newest + jnp.tanh(sum(x @ matrix for x, matrix in zip(streams, matrices)))


def plain_loss(plan, has_norm, given):
  """The plan with Eqs. 5 and 6 as they are written."""
  embeddings, blocks, last = given
  source_of = jnp.sin if has_norm else lambda x: x  # any function serves as a pre-norm
  newest = embeddings[-1]
  sources = {j: source_of(x) for j, x in enumerate(embeddings, plan.oldest)}

  def mixed(weights, aggregate):
    own = [sources[j] for j in aggregate.sources]
    w = weights
    if aggregate.hidden:
      normed = newest / jnp.sqrt(jnp.mean(newest**2, -1, keepdims=True) + 1e-6)
      hidden = jax.nn.gelu(normed @ weights.w1, approximate=False)
      w = jnp.einsum("btk,kcn->btcn", hidden, weights.w2) + weights.a
    w = jnp.broadcast_to(w, (*SHAPE[:2], aggregate.ways, len(own)))
    return [sum(w[:, :, c, j, None] * x for j, x in enumerate(own)) for c in range(aggregate.ways)]

  for block, (matrices, weights) in enumerate(blocks, 1):
    before = plan.before(block)
    newest = output_of(matrices, mixed(weights, before) if before else [newest], newest)
    sources[block] = source_of(newest)
  hidden = sum(mixed(last, plan.sites[plan.num_blocks])) if last is not None else newest
  return jnp.sum(jnp.cos(hidden) * hidden)


def loss(plan, has_norm, passes, recomputes, given):
  """The same by `history`."""
  embeddings, blocks, last = given
  source_of = jnp.sin if has_norm else lambda x: x
  carry = History.start([source_of(x) for x in embeddings], embeddings[-1] if has_norm else None)

  def weights_of(parameters, number, output, is_source):
    if not hasattr(parameters, "w1"):
      return parameters
    return kernels.WeightMLP(parameters.w1, parameters.w2, parameters.a, None if is_source else output)

  def block_of(matrices, number, streams, newest, _):
    output = output_of(matrices, [newest] if streams is None else streams, newest)
    return source_of(output), output, ()

  for block, (matrices, weights) in enumerate(blocks, 1):
    site = plan.before(block)
    link = Link(plan, site, passes, weights_of if site else None, block_of, recomputes)
    carry, _ = carry.through(link, weights, matrices, ())
  hidden, site = carry.output, plan.sites.get(plan.num_blocks)
  if site:
    hidden = sum(carry.mix(Link(plan, site, passes, weights_of, None, recomputes), last)[0])
  return jnp.sum(jnp.cos(hidden) * hidden)


def rows():
  for name in CASES:
    for has_norm in (False, True):
      for recomputes in (False, True):
        for implementation in ("xla", "pallas_interpret"):
          label = ", ".join([name, *["pre-norm"] * has_norm, "recomputed" if recomputes else "kept", implementation])
          is_fast = implementation == "xla" and recomputes and not has_norm and name not in SLOW
          if name == "two groups and one aggregate":
            is_fast = implementation == "xla" or (recomputes and has_norm)
          marks = () if is_fast else pytest.mark.slow
          yield pytest.param(name, has_norm, recomputes, implementation, id=label, marks=marks)


@functools.cache
def expected(name, has_norm):
  blocks, changes = CASES[name]
  plan = plan_of(blocks, **changes)
  given = parameters(plan)
  return plan, given, jax.jit(jax.value_and_grad(functools.partial(plain_loss, plan, has_norm)))(given)


@pytest.mark.parametrize(("name", "has_norm", "recomputes", "implementation"), rows())
def test_gradients_are_those_of_the_plain_sums(name, has_norm, recomputes, implementation):
  plan, given, (true_loss, true_gradients) = expected(name, has_norm)
  call = functools.partial(loss, plan, has_norm, kernels.Passes(implementation), recomputes)
  value, gradients = jax.jit(jax.value_and_grad(call))(given)
  assert float(value) == pytest.approx(float(true_loss), rel=1e-5)
  for (path, found), true in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(true_gradients)):
    largest = float(jnp.abs(true).max())
    assert largest > 0, path
    np.testing.assert_allclose(found, true, atol=BUDGET * largest, rtol=0, err_msg=str(path))


def test_groups_count_from_the_top():
  seven = plan_of(7)
  oldest = {block: history.place(seven, block).oldest_near for block in range(1, 8)}
  assert oldest == {1: 1, 2: 1, 3: 1, 4: 4, 5: 4, 6: 4, 7: 4}
  assert [block for block in oldest if history.place(seven, block).is_first_of_group] == [1, 4]
  assert [block for block in oldest if history.place(seven, block).is_last] == [7]
  assert [block for block in oldest if history.place(seven, block).in_last_group] == [4, 5, 6, 7]
  assert [member.block for member in history.place(seven, 4).later_in_group] == [5, 6, 7]


def test_steps_of_the_picture():
  """docs/backward_pass.py draws what `place` says."""
  drawn = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "docs" / "backward_pass.py"))
  steps = drawn["steps"](drawn["mudd_plan"]())
  assert [name for name, *_ in steps][:6] == ["DA_12", "DA_11", "DA_10", "DA_9", "push of DA_9 to DA_12", "DA_8"]
  assert len(steps) == 12 + 3
