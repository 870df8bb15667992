"""Every family of connections behind the one interface: values and gradients against the float64 oracle, on a dense
and on a mixture-of-experts block."""

import dataclasses

from flax import nnx
import jax
import numpy as np
import pytest

from maxtext_mudd.model import counts
from tests import models
from tests.blocks import BLOCKS, TOLERANCE, config_of, expected, packed
from tests.oracle import Oracle
from tests.placements import BLOCKS as IRREGULAR_BLOCKS
from tests.placements import IRREGULAR, IRREGULAR_DAS, OF_EXTRA, OF_EXTRA_DAS, SHARED, SHARED_DAS, SHARING
from tests.scanning import BOTH_NORMS, EXTRA

FAMILIES = {
  "plain residual": ({"depth_connection": "residual"}, {}),
  "DenseFormer": ({"mudd_ways": 1, "mudd_dynamic": False}, {"ways": 1}),
  "DenseFormer, 2x2": (
    {"mudd_ways": 1, "mudd_dynamic": False, "mudd_source_dilation": 2, "mudd_block_period": 2},
    {"ways": 1, "dilation": 2, "period": 2},
  ),
  "DDFormer": ({"mudd_ways": 1, "mudd_last_hidden_expansion": 1.0}, {"ways": 1}),
  "MUDD": ({}, {"ways": 4}),
  "MUDD, pre- and post-norm": (
    {"mudd_pre_norm": True, "mudd_post_norm": True, "mudd_weight_norm_scale": True},
    {"ways": 4, "pre_norm": True, "post_norm": "r"},
  ),
  "MUDD, capped weights": ({"mudd_weight_cap": 0.3}, {"ways": 4, "cap": 0.3}),
  "MUDD, scaled weights": ({"mudd_weight_scale": True}, {"ways": 4}),
  "MUDD, placements": (
    {"mudd_placements": IRREGULAR, "base_num_decoder_layers": IRREGULAR_BLOCKS},
    {"layers": IRREGULAR_BLOCKS, "table": IRREGULAR_DAS},
  ),
  "MUDD, placements, post-norm": (
    {"mudd_placements": IRREGULAR, "base_num_decoder_layers": IRREGULAR_BLOCKS, "mudd_post_norm": True},
    {"layers": IRREGULAR_BLOCKS, "table": IRREGULAR_DAS, "post_norm": "r"},
  ),
  "MUDD, placements, shared MLPs": (
    {
      "mudd_placements": SHARED,
      "base_num_decoder_layers": IRREGULAR_BLOCKS,
      "mudd_weight_norm_scale": True,
      "mudd_weight_scale": True,
    },
    {"layers": IRREGULAR_BLOCKS, "table": SHARED_DAS, "sharing": SHARING},
  ),
  "MUDD, extra embeddings": (EXTRA, {"ways": 4, "extra": 4, "groups": 2}),
  "MUDD, extra embeddings, SW2, pre- and post-norm": (
    {"mudd_extra_embeddings": 3, "mudd_embedding_groups": 3, "mudd_window": 2, **BOTH_NORMS},
    {"ways": 4, "extra": 3, "groups": 3, "window": 2, "pre_norm": True, "post_norm": "r"},
  ),
  "DDFormer, extra embeddings, 2x1": (
    {"mudd_ways": 1, "mudd_extra_embeddings": 2, "mudd_source_dilation": 2},
    {"ways": 1, "extra": 2, "dilation": 2},
  ),
  "MUDD, placements, extra embeddings": (
    {"mudd_placements": OF_EXTRA, "base_num_decoder_layers": 4, "mudd_extra_embeddings": 3, "mudd_pre_norm": True},
    {"layers": 4, "table": OF_EXTRA_DAS, "extra": 3, "pre_norm": True},
  ),
  "DHC×4": ({"depth_connection": "hyper_connections"}, {"hyper": 4}),
  "SHC×3": (
    {"depth_connection": "hyper_connections", "mudd_expansion_rate": 3, "mudd_dynamic": False},
    {"hyper": 3},
  ),
  "DHC×4, static part fixed": (
    {"depth_connection": "hyper_connections", "mudd_static": False},
    {"hyper": 4},
  ),
}
OF_THREE_BLOCKS = [name for name in FAMILIES if "placements" not in name]  # six blocks with experts round too much
HYPER = [name for name in FAMILIES if "HC" in name]


def model_and_oracle(family, block):
  keys, arch = FAMILIES[family]
  cfg = config_of(block, mudd=True, **keys)
  model = models.build(cfg)
  oracle = Oracle(dataclasses.replace(BLOCKS[block][1], **arch), models.randomise(model))
  return cfg, model, oracle


def fast_or_slow(pairs):
  fast = {("MUDD", "llama2"), ("MUDD, placements", "llama2"), ("MUDD, placements, shared MLPs", "llama2")}
  fast |= {("MUDD, extra embeddings", "llama2"), ("DHC×4", "llama2"), ("DHC×4", "gpt3")}
  return [pytest.param(*pair, marks=() if pair in fast else pytest.mark.slow) for pair in pairs]


def test_scales_of_weights_are_counted():
  """Three blocks: four streams of two and of three sources, and one stream of four."""
  scaled, plain = (
    counts.connections_cost(models.config(mudd=True, mudd_weight_scale=scale)).parameters for scale in (True, False)
  )
  assert scaled - plain == 4 * (2 + 3) + 4


@pytest.mark.parametrize(
  ("family", "block"),
  fast_or_slow([*((family, "llama2") for family in FAMILIES), ("MUDD", "pythia"), ("MUDD", "mixtral")]),
)
def test_values_and_gradients(family, block):
  """Gradients as float64 differences of the oracle, along one random direction in each parameter."""
  cfg, model, oracle = model_and_oracle(family, block)
  data = packed(cfg)
  rng = np.random.default_rng(1)
  weight = rng.standard_normal((*data["inputs"].shape, cfg.vocab_size)) / data["inputs"].size
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  @jax.jit
  def run(params):
    def loss(params):
      logits = models.logits(nnx.merge(graph, params, rest, copy=True), data)
      return (logits * weight).sum(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)

  (_, logits), gradients = run(params)
  assert np.abs(logits - expected(oracle, data)).max() <= TOLERANCE

  step = 1e-5
  for path, gradient in gradients.flat_state():
    path = "/".join(map(str, path))
    parameter = oracle.parameters[path]
    direction = rng.standard_normal(parameter.shape)
    along = []
    for sign in (1, -1):
      oracle.parameters[path] = parameter + sign * step * direction
      along.append((expected(oracle, data) * weight).sum())
    oracle.parameters[path] = parameter
    slope = (along[0] - along[1]) / (2 * step)
    found = (np.asarray(gradient.get_value(), np.float64) * direction).sum()
    scale = np.linalg.norm(gradient.get_value()) * np.linalg.norm(direction) / np.sqrt(direction.size)
    assert scale > 0, path
    # Gradients are float32; the errors seen are up to 3.7e-4.
    assert abs(found - slope) <= 1e-3 * scale, (path, found, slope)


@pytest.mark.parametrize("family", OF_THREE_BLOCKS)
def test_on_a_mixture_of_experts(family):
  cfg, model, oracle = model_and_oracle(family, "mixtral")
  data = packed(cfg)
  assert np.abs(models.jitted_logits(model, data) - expected(oracle, data)).max() <= TOLERANCE


@pytest.mark.parametrize("block", sorted(BLOCKS.keys() - {"pythia", "mixtral", "llama2"}))
def test_hyper_connections_on_every_block(block):
  cfg, model, oracle = model_and_oracle("DHC×4", block)
  data = packed(cfg)
  assert np.abs(models.jitted_logits(model, data) - expected(oracle, data)).max() <= TOLERANCE


@pytest.mark.parametrize(
  ("family", "block"), fast_or_slow((family, block) for family in HYPER for block in ("llama2", "mixtral", "gpt3"))
)
def test_hyper_connections_start_as_the_plain_model(family, block):
  stock = config_of(block, remat_policy="none")
  data = packed(stock)
  plain = models.logits(models.build(stock), data)
  found = models.logits(models.build(config_of(block, mudd=True, remat_policy="none", **FAMILIES[family][0])), data)
  np.testing.assert_array_equal(found, plain)
