"""mHC in models: how they start, what they count, which settings they refuse. Its maths: test_golden_connections.py."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_mudd import connections
from maxtext_mudd.connections.mhc.connection import SINKHORN, ManifoldWeights, permutations
from maxtext_mudd.model import counts
from tests import models
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
  np.testing.assert_allclose(found, plain, atol=1e-3 * np.abs(plain).max(), rtol=0)


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
    cfg = models.config(**MHC, mudd_mhc_mixing=mixing, mudd_mhc_bias_init="identity", mudd_mhc_phi_init="zero")
    weights = ManifoldWeights(cfg, 5, nnx.Rngs(0))
    streams = [jnp.ones((1, 1, cfg.emb_dim))] * 4
    w, beta = weights(streams, 5)
    np.testing.assert_allclose(w[0, 0, 1:], np.eye(4), atol=8e-3)  # 23 permutations have exp(-8) each
    assert np.argmax(w[0, 0, 0]) == 1 == np.argmax([b[0, 0, 0] for b in beta])


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


def test_the_family_is_known():
  assert connections.family(models.config(**MHC)).__name__ == "ManifoldHyperConnections"
