"""Gemma 4 of small sizes, whose last layers use keys and values of earlier ones: the whole model, layer by layer."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.configs import pyconfig
import numpy as np
import pytest

from maxtext_mudd import connections
from maxtext_mudd.blocks.streams import Streams
from tests import models, steps
from tests.blocks import config_of, packed
from tests.scanning import random_values

BLOCK = "gemma4_small"
# By layer, the one whose keys and values it uses; those layers come first in the order of layers.
DONORS = {3: 3, 4: 4, 5: 3, 6: 3, 7: 3, 8: 3, 9: 4}


def aggregate(module, sources, epsilon) -> list[jax.Array]:
  """Eqs. 5 and 6: the sums of a DA."""
  x = sources[-1]
  normed = x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + epsilon)
  hidden = jax.nn.gelu(normed @ module.w1[...], approximate=False)
  weights = jnp.einsum("btk,kcn->btcn", hidden, module.w2[...]) + module.a[...]
  return [sum(weights[:, :, c, j, None] * y for j, y in enumerate(sources)) for c in range(weights.shape[2])]


def restated(model, data, of_donor=None) -> jax.Array:
  """The logits, from the layers of the model without connections and plain sums of sources.

  Args:
    of_donor: replaces the streams from which keys and values for later layers are made.
  """
  decoder, epsilon = model.decoder, model.config.normalization_layer_epsilon
  tokens, positions, segments = data["inputs"], data["inputs_position"], data["inputs_segmentation"]
  x = decoder._apply_embedding(model.token_embedder, tokens, positions, True, MODEL_MODE_TRAIN)
  of_layers = decoder.per_layer_embedder(tokens, x)
  sources, shared = [x], {}
  for index, layer in enumerate(decoder.get_layers()):
    stock, streams = type(layer).__mro__[1], x
    if index:
      sums = aggregate(layer.connection.depth_aggregate, sources, epsilon)
      streams = Streams(**{"k": None, "v": None, **dict(zip("qkvr" if index < 5 else "qr", sums))})
    if DONORS.get(index) == index:
      shared[index] = stock.compute_shared_kv(layer, of_donor(x, streams) if of_donor else streams, positions)
    key, value = shared.get(DONORS.get(index), (None, None))
    given = {"per_layer_input": of_layers[:, :, index], "shared_key": key, "shared_value": value}
    x, _ = stock.__call__(layer, streams, segments, positions, True, MODEL_MODE_TRAIN, **given)
    sources.append(x)
  (x,) = aggregate(decoder.get_layers()[-1].connection.final_depth_aggregate, sources, epsilon)
  return decoder.apply_output_head(model.token_embedder, x, True, MODEL_MODE_TRAIN)


def test_equals_a_restatement():
  model, data = models.build(config_of(BLOCK, mudd=True)), packed(config_of(BLOCK))
  models.randomise(model)
  expected = nnx.jit(restated)(model, data)
  found = models.jitted_logits(model, data)
  scale = np.std(expected)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * scale)  # up to 1.4e-4 seen
  swapped = nnx.jit(functools.partial(restated, of_donor=lambda x, y: Streams(y.q, y.v, y.k, y.r)))(model, data)
  plain = nnx.jit(functools.partial(restated, of_donor=lambda x, y: Streams(x, x, x, x)))(model, data)
  for other in (swapped, plain):
    assert np.abs(other - expected).max() > 0.01 * scale


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "none", "minimal"])
def test_gradients_equal_those_of_a_restatement(policy):
  """For all parameters, connections' and others, whatever is recomputed in the backward pass."""
  config = config_of(BLOCK, mudd=True, remat_policy=policy)
  model = models.build(config)
  models.set_parameters(model, random_values(config))
  graphdef, params, others = nnx.split(model, nnx.Param, ...)
  data = packed(config)
  weights = np.random.default_rng(1).standard_normal((*data["inputs"].shape, config.vocab_size)).astype(np.float32)

  def gradients(logits_of):
    def objective(params):
      return jnp.vdot(logits_of(nnx.merge(graphdef, params, others, copy=True), data), weights, precision="highest")

    flat = nnx.to_flat_state(jax.jit(jax.grad(objective))(params))
    return {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat}

  found, expected = gradients(models.logits), gradients(restated)
  for path, x in expected.items():
    largest = np.abs(x).max()
    assert largest > 0, path
    np.testing.assert_allclose(found[path], x, rtol=0, atol=1e-3 * largest, err_msg=path)  # up to 4e-4 seen


@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma4-e4b"])
def test_models_by_name(name):
  keys = {"run_name": "test", "mudd": True, "scan_layers": False, "log_config": False, "enable_checkpointing": False}
  config = pyconfig.initialize(["", models.BASE_YML], model_name=name, **keys)
  sites = connections.plan(config).sites
  first = config.num_decoder_layers - config.num_kv_shared_layers
  assert {site.streams for block, site in sites.items() if block < first} == {"qkvr"}
  assert {site.streams for block, site in sites.items() if first <= block < config.num_decoder_layers} == {"qr"}


@pytest.mark.slow
def test_trains_with_multi_token_prediction():
  keys = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1, "mudd_mtp": "connected"}
  config = config_of(BLOCK, mudd=True, learning_rate=1e-3, steps=20, warmup_steps_fraction=0.05, **keys)
  step, state = steps.prepare(config)
  losses = []
  for _ in range(3):
    state, found = step(state, models.batch(config))
    losses.append(float(found["scalar"]["learning/loss"]))
  assert losses[2] < losses[1]
