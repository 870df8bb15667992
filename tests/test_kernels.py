"""Depth-wise aggregation against float64 NumPy, written from Eqs. 5 and 6."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from maxtext_mudd import kernels

B, T, D, K = 2, 5, 24, 16


def oracle(sources, w1, w2, a, activation, epsilon=1e-6):
  sources = [np.asarray(x, np.float64) for x in sources]
  weights = np.broadcast_to(np.asarray(a, np.float64), (B, T, *a.shape))
  if w1 is not None:
    x = sources[-1] / np.sqrt(np.square(sources[-1]).mean(-1, keepdims=True) + epsilon)
    x = x @ np.asarray(w1, np.float64)
    if activation == "gelu":
      x = x * scipy.special.ndtr(x)
    else:
      x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    weights = weights + np.einsum("btk,kcn->btcn", x, np.asarray(w2, np.float64))
  return [sum(weights[:, :, c, j, None] * x for j, x in enumerate(sources)) for c in range(a.shape[0])]


def operands(sources, ways, dtype, dynamic=True):
  rng = np.random.default_rng(sources * 10 + ways)
  xs = [jnp.asarray(rng.standard_normal((B, T, D)), dtype) for _ in range(sources)]
  a = jnp.asarray(rng.standard_normal((ways, sources)), jnp.float32)
  if not dynamic:
    return xs, None, None, a
  w1 = jnp.asarray(rng.standard_normal((D, K)) * D**-0.5, dtype)
  w2 = jnp.asarray(rng.standard_normal((K, ways, sources)) * K**-0.5, dtype)
  return xs, w1, w2, a


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("ways", [1, 4])
@pytest.mark.parametrize("sources", [1, 2, 7])
def test_float32(sources, ways, activation):
  args = operands(sources, ways, jnp.float32)
  found = kernels.depth_aggregate(*args, ways=ways, activation=activation)
  assert len(found) == ways
  for x, expected in zip(found, oracle(*args, activation)):
    np.testing.assert_allclose(x, expected, atol=2e-5, rtol=0)


def test_float64_gives_float64():
  with jax.enable_x64(True):
    args = operands(7, 4, jnp.float64)
    found = kernels.depth_aggregate(*args, ways=4)
    assert found[0].dtype == jnp.float64
    for x, expected in zip(found, oracle(*args, "gelu")):
      np.testing.assert_allclose(x, expected, atol=1e-12, rtol=0)


def test_bfloat16_is_rounded_once():
  """Static weights: float32 sums, so the only error beyond 1e-5 is the one rounding of the result (half of 2^-7)."""
  args = operands(33, 4, jnp.bfloat16, dynamic=False)
  for x, expected in zip(kernels.depth_aggregate(*args, ways=4), oracle(*args, "gelu")):
    error = np.abs(np.asarray(x, np.float64) - expected)
    assert (error <= 2**-8 * np.abs(expected) + 1e-5).all()


def test_newest_makes_the_weights():
  xs, w1, w2, a = operands(3, 4, jnp.float32)
  other = jnp.flip(xs[-1], -1)
  found = kernels.depth_aggregate(xs, w1, w2, a, ways=4, newest=other)
  plain = kernels.depth_aggregate(xs, w1, w2, a, ways=4)
  scaled = kernels.depth_aggregate(xs, w1, w2, a, ways=4, newest=3 * xs[-1])
  assert np.abs(found[0] - plain[0]).max() > 0.1
  np.testing.assert_allclose(scaled[0], plain[0], atol=1e-4)  # the norm takes the factor out


def test_gradients():
  """Of every input, against central differences in float64."""
  with jax.enable_x64(True):
    args = operands(3, 4, jnp.float64)
    rng = np.random.default_rng(1)
    cotangents = [jnp.asarray(rng.standard_normal((B, T, D))) for _ in range(4)]

    def loss(xs, w1, w2, a):
      return sum(jnp.vdot(x, c) for x, c in zip(kernels.depth_aggregate(xs, w1, w2, a, ways=4), cotangents))

    gradients = jax.tree.leaves(jax.grad(loss, argnums=(0, 1, 2, 3))(*args))
    leaves, tree = jax.tree.flatten(args)
    for i, gradient in enumerate(gradients):
      direction = jnp.asarray(rng.standard_normal(leaves[i].shape))
      up, down = (
        loss(*tree.unflatten([*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]])) for step in (1e-6, -1e-6)
      )
      np.testing.assert_allclose(jnp.vdot(gradient, direction), (up - down) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"implementation": "cuda"},
      "implementation='cuda' does not exist; use one of auto, xla, pallas, pallas_interpret.",
    ),
    ({"activation": "relu"}, "activation='relu' does not exist; use one of gelu, gelu_tanh."),
    ({"sources": []}, "sources is empty; give at least the newest block output."),
    ({"ways": 1}, "a has shape [4, 3]; 1 ways and 3 sources need [1, 3]."),
    ({"w1": None}, "w1 and w2 go together; give both, or neither for static weights."),
    ({"w1": jnp.zeros((8, K))}, "w1 has shape [8, 16]; the other arguments need [24, 16]."),
    ({"w2": jnp.zeros((K, 1, 3))}, "w2 has shape [16, 1, 3]; the other arguments need [16, 4, 3]."),
    (
      {"newest": jnp.zeros((B, T, 8))},
      "newest is float32[2, 5, 8], sources[-1] is float32[2, 5, 24]; make them equal.",
    ),
  ],
)
def test_arguments_that_do_not_fit(change, message):
  xs, w1, w2, a = operands(3, 4, jnp.float32)
  given = {"sources": xs, "w1": w1, "w2": w2, "a": a, "ways": 4} | change
  with pytest.raises(ValueError) as error:
    kernels.depth_aggregate(**given)
  assert str(error.value) == message
