"""Reverse-mode differentiation over many aggregates: its gradients are those of the plain sums, as JAX makes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_mudd import kernels
from maxtext_mudd.connections import history
from maxtext_mudd.connections.history import History
from maxtext_mudd.connections.mudd import topology

SHAPE, HIDDEN = (2, 12, 16), 8
BUDGET = 2e-5  # of the largest entry of a gradient; the errors seen are below 4e-6

DENSE = {"ways": 4, "dense_streams": "qkvr", "dilation": 1, "period": 1, "window": 0, "depth_start": 0.0}
CASES = {  # blocks and what differs from the dense model
  "one group": (3, {}),
  "a full group": (4, {}),
  "two groups and one aggregate": (9, {}),
  "one way": (6, {"ways": 1}),
  "static weights": (6, {"dynamic": False}),
  "window": (10, {"window": 3}),
  "dilation": (11, {"dilation": 2}),
  "2x2": (12, {"dilation": 2, "period": 2}),
  "no aggregate at the end, two streams": (7, {"period": 3, "dense_streams": "qr"}),
  "the upper half": (10, {"depth_start": 0.5}),
}


def connected(blocks: int, dynamic: bool = True, **changes) -> topology.Topology:
  sizes = {"hidden_expansion": 1.0, "last_hidden_expansion": 1.0, "round_to": 0}
  return topology.dense(blocks, (1,) * blocks, dynamic=dynamic, **sizes, **(DENSE | changes))


def parameters(model: topology.Topology):
  """(the embedding, of each block its matrices and the weights of the aggregate before it, those of the last one)."""
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
  for block in range(1, model.num_blocks + 1):
    ways = model.before(block).ways if model.before(block) else 1
    blocks.append((normal(ways, width, width, scale=0.5 * width**-0.5), weights(model.before(block))))
  return normal(*SHAPE), blocks, weights(model.aggregates.get(model.num_blocks))


def output_of(matrices, streams, newest):
  """A block."""
  return newest + jnp.tanh(sum(x @ matrix for x, matrix in zip(streams, matrices)))


def plain_loss(model, has_norm, given):
  """The model with Eqs. 5 and 6 as they are written."""
  embedding, blocks, last = given
  source_of = jnp.sin if has_norm else lambda x: x  # any function serves as a pre-norm
  newest, sources = embedding, [source_of(embedding)]

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
    before = model.before(block)
    newest = output_of(matrices, mixed(weights, before) if before else [newest], newest)
    sources.append(source_of(newest))
  hidden = sum(mixed(last, model.aggregates[model.num_blocks])) if last is not None else newest
  return jnp.sum(jnp.cos(hidden) * hidden)


def loss(model, has_norm, passes, recomputes, given):
  """The same by `history`."""
  embedding, blocks, last = given
  source_of = jnp.sin if has_norm else lambda x: x
  carry = History((source_of(embedding),), embedding if has_norm else None)

  def made_from(weights):
    return kernels.WeightMLP(weights.w1, weights.w2, weights.a, carry.newest) if hasattr(weights, "w1") else weights

  def block_of(matrices, streams, newest, _):
    output = output_of(matrices, streams, newest)
    return source_of(output), output, ()

  for block, (matrices, weights) in enumerate(blocks, 1):
    if model.before(block) is None:
      carry = carry.append(*block_of(matrices, [carry.output], carry.output, ())[:2])
      continue
    link = history.Link(history.place(model, block - 1), passes)
    if recomputes:
      carry, _ = history.through_block(link, block_of, matrices, carry, made_from(weights), ())
    else:
      streams, behind = history.aggregate(link, carry, made_from(weights))
      carry = behind.append(*block_of(matrices, streams, carry.output, ())[:2])
  hidden = carry.output
  if last is not None:
    link = history.Link(history.place(model, model.num_blocks), passes)
    streams, _ = history.aggregate(link, history.name_last(carry), made_from(last))
    hidden = sum(streams)
  return jnp.sum(jnp.cos(hidden) * hidden)


def rows():
  for name in CASES:
    for has_norm in (False, True):
      for recomputes in (False, True):
        for implementation in ("xla", "pallas_interpret"):
          label = ", ".join([name, *["pre-norm"] * has_norm, "recomputed" if recomputes else "kept", implementation])
          is_fast = implementation == "xla" and recomputes and not has_norm
          if name == "two groups and one aggregate":
            is_fast = implementation == "xla" or (recomputes and has_norm)
          marks = () if is_fast else pytest.mark.slow
          yield pytest.param(name, has_norm, recomputes, implementation, id=label, marks=marks)


@functools.cache
def expected(name, has_norm):
  blocks, changes = CASES[name]
  model = connected(blocks, **changes)
  given = parameters(model)
  return model, given, jax.jit(jax.value_and_grad(functools.partial(plain_loss, model, has_norm)))(given)


@pytest.mark.parametrize(("name", "has_norm", "recomputes", "implementation"), rows())
def test_gradients_are_those_of_the_plain_sums(name, has_norm, recomputes, implementation):
  model, given, (true_loss, true_gradients) = expected(name, has_norm)
  call = functools.partial(loss, model, has_norm, kernels.Passes(implementation), recomputes)
  value, gradients = jax.jit(jax.value_and_grad(call))(given)
  assert float(value) == pytest.approx(float(true_loss), rel=1e-5)
  for (path, found), true in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(true_gradients)):
    largest = float(jnp.abs(true).max())
    assert largest > 0, path
    np.testing.assert_allclose(found, true, atol=BUDGET * largest, rtol=0, err_msg=str(path))


def test_groups_count_from_the_top():
  seven = connected(7)
  floors = {block: history.place(seven, block).floor for block in range(1, 8)}
  assert floors == {1: 1, 2: 1, 3: 1, 4: 4, 5: 4, 6: 4, 7: 4}
  assert [block for block in floors if history.place(seven, block).is_lowest] == [1, 4]
  assert [block for block in floors if history.place(seven, block).is_top] == [7]
  assert [block for block in floors if history.place(seven, block).in_top_group] == [4, 5, 6, 7]
  assert [member.block for member in history.place(seven, 4).above] == [5, 6, 7]
