"""Quantized models with connections: what connections compute is float, and scanned layers train as single ones do."""

import re

from flax import nnx
from flax.nnx import variablelib
import jax
import jax.numpy as jnp
from maxtext.trainers.pre_train import train
import numpy as np
import pytest

import maxtext_mudd
from maxtext_mudd import muddformer
from maxtext_mudd.checkpoints import layout
from maxtext_mudd.inference import generation
from tests import models
from tests.scanning import OF_SUBLAYERS, by_path, norm_of, random_values

RECIPES = {
  "AQT, int8": {"quantization": "int8"},
  "fp8": {"quantization": "fp8"},
  "nanoo_fp8": {"quantization": "nanoo_fp8"},
  "Qwix, int8": {"quantization": "int8", "use_qwix_quantization": True},
  "Qwix, fp8": {"quantization": "fp8", "use_qwix_quantization": True},
  "Qwix, fp8_full": {"quantization": "fp8_full", "use_qwix_quantization": True},
}
FLOAT, FAST = "", "Qwix, int8"
ROUNDING = 2e-6  # of the largest entry, in float32
# Qwix takes an array for a weight if their shapes are equal, so no width equals a length.
SIZES = {
  "base_emb_dim": 48,
  "base_num_query_heads": 3,
  "base_num_kv_heads": 3,
  "base_mlp_dim": 96,
  "max_target_length": 24,
  "vocab_size": 320,
}
DECODED = [FAST, *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in ("AQT, int8", "Qwix, fp8"))]
NARROW = ("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
FAMILIES = {"MUDD": {}, **OF_SUBLAYERS}


fast_and_slow = pytest.mark.parametrize(
  "recipe", [pytest.param(recipe, marks=() if recipe == FAST else pytest.mark.slow) for recipe in RECIPES]
)


def config(recipe, **keys):
  return models.config(**SIZES, **RECIPES.get(recipe, {}), **{"mudd": True, **keys})


@fast_and_slow
def test_aggregates_compute_in_float(recipe):
  """Block outputs are those of a quantized model; weights and streams are what the float formulas make of them."""
  tokens, values = models.batch(config(FLOAT))["inputs"], random_values(config(FLOAT))
  arrays = {}
  for name in (FLOAT, recipe):
    model = models.build(config(name))
    models.set_parameters(model, values)
    arrays[name] = maxtext_mudd.inspect(model, tokens, keep=("history", "weights", "streams"))
  found = arrays[recipe]
  difference = np.abs(found["logits"] - arrays[FLOAT]["logits"]).max()
  assert difference > 1e-2  # of logits up to 4: 0.03 to 0.5 were seen
  layers = config(FLOAT).num_decoder_layers
  for i in range(1, layers + 1):
    at = f"decoder/layers_{i}/connection/depth_aggregate/"
    at = f"decoder/layers_{i - 1}/connection/final_depth_aggregate/" if i == layers else at
    parameters = {name: jnp.asarray(values[at + name]) for name in ("w1", "w2", "a")}
    sources = [found[f"history/{j:03d}"] for j in range(i + 1)]
    weights = muddformer.mixing_weights(sources[-1], parameters, muddformer.Config())
    streams = muddformer.aggregate(sources, weights)
    for c, (name, stream) in enumerate(zip("qkvr"[-len(streams) :], streams)):
      close(found[f"weights/{name}/da_{i:03d}"], weights[:, :, c])
      close(found[f"streams/{name}/da_{i:03d}"], stream)


def close(found, expected):
  np.testing.assert_allclose(found, expected, atol=ROUNDING * np.abs(expected).max(), rtol=0)


def gradients(cfg, values, seed=0):
  """Loss, gradients of the parameters by path, and the new scales and histories of fp8 by path, which MaxText's train
  step takes as gradients, too.

  Args:
    seed: of the random numbers with which AQT rounds gradients.
  """
  model = models.build(cfg, seed)
  models.set_parameters(model, values)
  replaced = variablelib.variable_type_from_name("_overwrite_with_gradient", allow_register=True)
  graph, params, scales, rest = nnx.split(model, nnx.Param, replaced, ...)
  data = models.batch(cfg)

  @jax.jit
  def run(params, scales):
    def loss(params, scales):
      return train.loss_fn(nnx.merge(graph, params, scales, rest, copy=True), cfg, dict(data), None, None)[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(params, scales)

  value, (of_params, of_scales) = run(params, scales)
  return float(value), by_path(of_params), by_path(of_scales)


@pytest.mark.parametrize(
  "recipe", [pytest.param(recipe, marks=() if recipe == "Qwix, fp8" else pytest.mark.slow) for recipe in RECIPES]
)
def test_scanned_layers_train_as_single_ones(recipe):
  values = random_values(config(FLOAT))
  _, of_float, _ = gradients(config(FLOAT), values)
  loss, single, scales = gradients(config(recipe), values)
  cfg = config(recipe, scan_layers=True)
  scanned_loss, scanned, scanned_scales = gradients(cfg, layout.stack(values, cfg))
  assert scanned_loss == pytest.approx(loss, rel=1e-6)

  def distance(tree):
    return norm_of({path: x - tree[path] for path, x in single.items()})

  of_quantization = distance(of_float)  # 0.03 to 0.16 of the norm was seen
  assert of_quantization > 0.02 * norm_of(single)
  of_chance = 0.0
  if recipe == "AQT, int8":  # it rounds gradients at random, with other numbers in scanned layers
    _, of_other_seed, _ = gradients(config(recipe), values, seed=1)
    of_chance = 1.5 * distance(of_other_seed)
  assert distance(layout.unstack(scanned, cfg)) < max(0.01 * of_quantization, of_chance)  # up to 0.001 was seen
  assert (scales != {}) == (recipe in ("fp8", "nanoo_fp8"))
  for path, x in scanned_scales.items():
    of_layers = [scales[path.replace("/layers/", f"/layers_{i}/")] for i in range(cfg.num_decoder_layers)]
    np.testing.assert_allclose(x, of_layers, rtol=1e-5, err_msg=path)


def conversions(cfg) -> dict[str, int]:
  """How many arrays a model and its gradient convert to each narrow dtype."""
  model = models.build(cfg)
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  data = models.batch(cfg)

  def loss(params):
    return train.loss_fn(nnx.merge(graph, params, rest, copy=True), cfg, dict(data), None, None)[0]

  program = str(jax.make_jaxpr(jax.grad(loss))(params))
  return {dtype: len(re.findall(rf"new_dtype={dtype}\b", program)) for dtype in NARROW}


@pytest.mark.parametrize("family", FAMILIES)
@fast_and_slow
def test_no_family_is_quantized(recipe, family):
  """A connected model converts as many arrays as the stock model, in both passes."""
  keys = {"base_num_decoder_layers": 2, "remat_policy": "none"}
  stock = conversions(config(recipe, mudd=False, **keys))
  assert sum(stock.values()) > 0
  assert conversions(config(recipe, **keys, **FAMILIES[family])) == stock


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("recipe", DECODED)
def test_decodes_with_quantized_parameters(recipe, scan):
  """The engine quantizes the parameters as the forward pass does."""
  prompt = np.arange(1, 9)
  found = {}
  for name in (FLOAT, recipe):
    cfg = config(name, scan_layers=scan)
    model = models.build(cfg)
    models.randomise(model)
    found[name] = np.asarray(maxtext_mudd.logits(model, prompt[None]))[0, -1]
  engine = generation.engine_for(model, cfg, 1, len(prompt), 8)
  params, key = nnx.state(model, nnx.Param), jax.random.PRNGKey(0)
  prefilled = generation.prefill(engine, params, prompt, 0, key, generation.Sampling())
  close(np.asarray(prefilled["logits"]).ravel(), found[recipe])
  assert np.abs(found[recipe] - found[FLOAT]).max() > 1e-2
  (row,) = maxtext_mudd.generate(model, cfg, [prompt.tolist()], 8)
  models.check_greedy(model, row, len(prompt), 8)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_decodes_with_a_quantized_cache(scan):
  """Each token is one of the most probable ones."""
  cfg = config(FLOAT, scan_layers=scan, dtype="bfloat16", quantize_kvcache=True)
  model = models.build(cfg)
  models.randomise(model)
  (row,) = maxtext_mudd.generate(model, cfg, [list(range(1, 9))], 8)
  logits = np.asarray(maxtext_mudd.logits(model, row[None, :-1]))[0, 7:]
  chosen = np.take_along_axis(logits, row[8:, None], 1)[:, 0]
  assert (logits.max(-1) - chosen).max() < 0.1  # of logits up to 4, in bfloat16; 0.05 was seen
