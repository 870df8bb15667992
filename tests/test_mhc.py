"""mHC in models: how they start, what they count, which settings they refuse. Its maths: test_golden_connections.py."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_mudd.connections.mhc.connection import SINKHORN, ManifoldWeights, permutations
from maxtext_mudd.model import counts
from tests import golden_connections, models, steps
from tests.blocks import BLOCKS, config_of, packed

MHC = {"mudd": True, "depth_connection": "mhc"}
MIXINGS = (*SINKHORN, "permutations")


@pytest.mark.parametrize("block", [x if x == "llama2" else pytest.param(x, marks=pytest.mark.slow) for x in BLOCKS])
def test_starts_as_the_plain_model(block):
  """Without dynamic logits all streams stay equal: blocks read a multiple of the plain stream, and write F to it."""
  if block == "pythia":
    with pytest.raises(ValueError, match="mudd_decoder_layer=pythia does not work with depth_connection=mhc"):
      config_of(block, **MHC)
    return
  stock = config_of(block)
  data = packed(stock)
  plain = models.jitted_logits(models.build(stock), data)
  found = models.jitted_logits(models.build(config_of(block, **MHC, mudd_mhc_alpha_init=0.0)), data)
  # Norms see twice the stream: their epsilon, 1e-6 beside mean squares of at least 1e-3, weighs a quarter as much.
  np.testing.assert_allclose(found, plain, atol=3e-5 * np.abs(plain).max(), rtol=0)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_mixing_matrices_keep_sums(mixing):
  """R's rows and columns sum to one: exactly for permutations, and nearly after 20 steps on small logits."""
  cfg = models.config(**MHC, mudd_mhc_mixing=mixing)
  weights = ManifoldWeights(cfg, 0, nnx.Rngs(0))
  logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, weights.b_res[...].size)) / 2, jnp.float32)
  found = np.asarray(weights.mixing(logits))
  assert (found > 0).all()
  assert np.std(found) > 0.03
  for axis in (-1, -2):
    np.testing.assert_allclose(found.sum(axis), 1, atol=1e-5)


def test_identity_at_the_start():
  for mixing in MIXINGS:
    keys = {"mudd_mhc_mixing": mixing, "mudd_mhc_bias_init": "identity", "mudd_mhc_phi_init": "zero"}
    cfg = models.config(**MHC, **keys)
    weights = ManifoldWeights(cfg, 5, nnx.Rngs(0))
    streams = [jnp.ones((1, 1, cfg.emb_dim))] * 4
    w, beta = weights(streams, 5)
    np.testing.assert_allclose(w[0, 0, 1:], np.eye(4), atol=8e-3)  # 23 permutations have exp(-8) each
    assert np.argmax(w[0, 0, 0]) == 1 == np.argmax([b[0, 0, 0] for b in beta])


@pytest.mark.parametrize(("mixing", "source_first"), [("deepseek", True), ("megatron", False), ("lite", True)])
def test_orientation_of_logits(mixing, source_first):
  """A large logit at [0, 1] moves stream 0 to stream 1, or stream 1 to stream 0."""
  weights = ManifoldWeights(models.config(**MHC, mudd_mhc_mixing=mixing), 0, nnx.Rngs(0))
  found = weights.mixing(jnp.zeros((1, 1, 16)).at[0, 0, 1].set(9.0))[0, 0]
  target, source = (1, 0) if source_first else (0, 1)
  assert found[target, source] > 0.9


def test_orientation_of_permutations():
  """The permutation (1, 2, 0) has row i one at column perm[i]: source i goes to target perm[i]."""
  cfg = models.config(**MHC, mudd_expansion_rate=3, mudd_mhc_mixing="permutations")
  number = [tuple(np.argmax(x, axis=1)) for x in permutations(3)].index((1, 2, 0))
  found = ManifoldWeights(cfg, 0, nnx.Rngs(0)).mixing(jnp.zeros((1, 1, 6)).at[0, 0, number].set(50.0))[0, 0]
  np.testing.assert_allclose(found, np.eye(3)[[2, 0, 1]], atol=1e-6)


def test_a_token_of_zeros():
  """mHC-lite's norm has no epsilon."""
  weights = ManifoldWeights(models.config(**MHC, mudd_mhc_mixing="lite"), 0, nnx.Rngs(0))
  value, gradient = jax.value_and_grad(lambda x: weights([x] * 4, 0)[0].sum())(jnp.zeros((1, 1, 32)))
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_permutations():
  found = permutations(3)
  assert len({x.tobytes() for x in found}) == 6
  np.testing.assert_array_equal(found[0], np.eye(3))
  assert (found.sum(1) == 1).all() and (found.sum(2) == 1).all()


@pytest.mark.parametrize(
  "keys",
  [
    {},
    {"mudd_mhc_mixing": "lite", "mudd_mhc_end": "sum"},
    {"mudd_mhc_mixing": "permutations", "mudd_expansion_rate": 3},
    {"mudd_mhc_mixing": "megatron", "mudd_mhc_end": "mean", "scan_layers": True},
  ],
)
def test_parameters_are_counted(keys):
  cfg = models.config(**MHC, **keys)
  with_mhc, plain = (
    sum(x.get_value().size for x in models.parameters(models.build(c)).values())
    for c in (cfg, models.config(scan_layers=cfg.scan_layers))
  )
  assert counts.connections_cost(cfg).parameters == with_mhc - plain


@pytest.mark.parametrize(
  ("keys", "sentence"),
  [
    ({"mudd_expansion_rate": 1}, "mudd_expansion_rate=1 leaves mhc no streams to mix; use at least 2."),
    (
      {"mudd_expansion_rate": 6, "mudd_mhc_mixing": "permutations"},
      "mudd_expansion_rate=6 with mudd_mhc_mixing=permutations needs 720 logits for each token and sublayer; use at "
      "most 5 streams, or mudd_mhc_mixing=deepseek.",
    ),
    (
      {"mudd_mhc_mixing": "permutations", "mudd_mhc_steps": 10},
      "mudd_mhc_steps=10 does nothing with mudd_mhc_mixing=permutations; leave it at 20, or set "
      "mudd_mhc_mixing=deepseek or megatron or lite.",
    ),
    (
      {"mudd_mhc_phi_init": "zero"},
      "mudd_mhc_phi_init=zero with mudd_mhc_bias_init=zero and mudd_mhc_alpha_init=0.01 has no gradient by which "
      "streams could part; use mudd_mhc_phi_init=fan_in, or mudd_mhc_bias_init=identity with another "
      "mudd_mhc_alpha_init than 0.",
    ),
    (
      {"mudd_mhc_mixing": "lite", "mudd_mhc_end": "sum", "mudd_mhc_epsilon": 1e-5},
      "mudd_mhc_epsilon=1e-05 does nothing with mudd_mhc_mixing=lite and mudd_mhc_end=sum; leave it at 1e-06.",
    ),
    ({"mudd_mhc_steps": 0}, "mudd_mhc_steps=0 is not valid: input should be greater than or equal to 1."),
    (
      {"mudd_window": 2},
      "mudd_window=2 does nothing with depth_connection=mhc; leave it at 0, or set depth_connection=dense.",
    ),
    (
      {"mudd_static": False},
      "mudd_static=False does nothing with depth_connection=mhc; leave it at True, or set depth_connection=dense or "
      "hyper_connections.",
    ),
  ],
)
def test_settings_that_do_not_work(keys, sentence):
  with pytest.raises(ValueError) as error:
    models.config(**MHC, **keys)
  assert str(error.value) == sentence


def test_counts():
  """By hand: n = 2, D = 32, two sublayers in each of 3 blocks, 2·2 + 4 logits for each."""
  cfg = models.config(**MHC, mudd_expansion_rate=2)
  cost = counts.connections_cost(cfg)
  assert cost.parameters == 6 * (2 * 32 * 8 + 8 + 3) + (2 * 32 * 2 + 2 + 1)
  assert cost.flops == 6 * 2 * (2 * 32 * 8 + 2 * 3 * 32 + 2 * 32) + 2 * (2 * 32 * 2 + 2 * 32)
  assert cost.activations == 3


def test_metrics_at_the_start():
  """All mixing matrices are 1/n, σ is 1/2: an input is half the sum of the streams, an output goes to each."""
  cfg = models.config(**MHC, record_internal_nn_metrics=1)
  step, state = steps.prepare(cfg)
  steps.set_zero(state, "alpha", "b_pre", "b_post", "b_res")
  scalars = step(state, models.batch(cfg))[1]["scalar"]
  expected = {"read_weight": 2, "write_weight": 4, "row_sum": 1, "column_sum": 1}
  for statistic, value in expected.items():
    for sublayer in ("attention", "ffn"):
      for i in range(3):
        assert float(scalars[f"mudd/{statistic}/{sublayer}/da_{i:03d}"]) == pytest.approx(value, rel=5e-5)


def test_product_of_mixing_matrices():
  """With random weights; the plain product of what each sublayer was given."""
  keys = {"depth_connection": "hyper_connections", "record_internal_nn_metrics": 1}
  _, blocks = golden_connections.build("float32", 2, 16, **keys)
  rng, given, params = np.random.default_rng(0), [], {}
  for s in range(4):
    params |= {f"norm.{s}": np.ones(16), f"w.{s}": rng.normal(size=(16, 16)), f"v.{s}": rng.normal(size=(16, 16))}
  carry = blocks[0].start(jnp.asarray(rng.normal(size=(2, 3, 16)), jnp.float32))
  for number, connection in enumerate(blocks):
    for name in ("attention", "feed_forward"):
      weights = getattr(connection, name)
      weights.static_alpha[...] = weights.static_alpha[...] + jnp.asarray(rng.normal(size=(4, 5)) / 3)
      weights.w_alpha[...] = jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)
      weights.alpha_scale[...] = jnp.ones(1)

      def record(streams, s, weights=weights):
        w, beta = weights(streams, s)
        given.append(np.asarray(w[..., 1:, :], np.float64))
        return w, beta

      setattr(connection, name, record)
    carry = golden_connections.run_sublayers(connection, number, carry, params, {})
  expected = given[3] @ given[2] @ given[1] @ given[0]
  np.testing.assert_allclose(carry.product, expected, atol=1e-6 * np.abs(expected).max())
  sown = nnx.state(blocks[1], nnx.Intermediate)
  assert float(sown["mudd_row_sum_ffn"].get_value()[0]) == pytest.approx(np.abs(expected).sum(-1).max(), rel=1e-6)
  assert float(sown["mudd_column_sum_ffn"].get_value()[0]) == pytest.approx(np.abs(expected).sum(-2).max(), rel=1e-6)
