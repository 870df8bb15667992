"""Every supported MaxText decoder block: equal to stock at the start, and to the float64 oracle with random weights."""

import dataclasses

import numpy as np
import pytest

from maxtext_mudd import blocks
from tests import models
from tests.blocks import BLOCKS, FUSED, OTHERS, SIMPLE, TOLERANCE, config_of, expected, packed
from tests.oracle import Arch, Oracle


def test_every_supported_block_is_tested():
  assert {*BLOCKS, *SIMPLE, *(keys.get("decoder_block", name) for name, keys in OTHERS.items())} == {*blocks.BLOCKS}


def assert_starts_alike(stock, mudd, tolerance=0):
  """Bit for bit, op by op: under jit the compiler may fuse the two models' sums differently (it does for gpt3)."""
  data = packed(stock)
  plain = models.logits(models.build(stock), data)
  assert np.std(plain) > 0.01
  np.testing.assert_allclose(models.logits(models.build(mudd), data), plain, rtol=0, atol=tolerance)


SLOWEST = ("deepseek4", "gemma4_small", "qwen3_next", "qwen3_5")


@pytest.mark.parametrize(
  "block", [*BLOCKS, *(pytest.param(x, marks=pytest.mark.slow) if x in SLOWEST else x for x in OTHERS)]
)
def test_starts_as_the_stock_model(block):
  keys = {"remat_policy": "none"}
  # On a CPU the product of a part of the columns may add in another order than that of all; the errors seen are
  # 1.1e-6 in three layers and, of qwen3_next, 1.1e-5 in eight.
  tolerance = 5e-5 if block in FUSED else 0
  assert_starts_alike(config_of(block, **keys), config_of(block, mudd=True, **keys), tolerance)


# Their layers have no two sublayers that each add to what a norm read, or MaxText's mHC makes the inputs of these.
WITHOUT_SUBLAYERS = ("default", "olmo3", "qwen3_custom_moe", *(block for block in OTHERS if block.startswith("gemma4")))
WITHOUT_SUBLAYERS += tuple(block for block, keys in OTHERS.items() if "mhc_expansion_rate" in keys)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in OTHERS if block not in WITHOUT_SUBLAYERS])
def test_hyper_connections_start_as_the_stock_model(block):
  keys = {"remat_policy": "none"}
  connected = config_of(block, mudd=True, depth_connection="hyper_connections", **keys)
  assert_starts_alike(config_of(block, **keys), connected)


# Keys of other families, and how far the logits may be from the plain model's, of the largest one. Blocks of
# AttnRes get the mean of sources in place of their sum, which norms undo but for their epsilon: the error is
# proportional to that.
FAMILIES = {
  "mhc": ({"depth_connection": "mhc", "mudd_mhc_alpha_init": 0.0}, 1e-5),
  "attnres": ({"depth_connection": "attnres"}, 1e-5),
  "dca": ({"depth_connection": "dca"}, 2e-6),
}


def well_conditioned(model):
  """A model whose norms behind gated delta nets do not divide by numbers near zero.

  They divide a head's output by its size, which is small where a query is orthogonal to the only key before it. With
  epsilon 1e-6, logits of the stock qwen3_next change by 2e-5 to 3e-4 if every parameter moves to the next number in
  float32, by seed; with 1e-2 by 2e-6 to 3e-6.
  """
  for path, module in model.iter_modules():
    if path[-2:] == ("norm", "rms_norm"):
      module.epsilon = 1e-2
  return model


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [block for block in OTHERS if block not in WITHOUT_SUBLAYERS])
def test_other_families_start_as_the_stock_model(block, family):
  keys, tolerance = FAMILIES[family]
  keys = keys | {"normalization_layer_epsilon": 1e-8}
  stock = config_of(block, normalization_layer_epsilon=1e-8)
  data = packed(stock)
  plain = models.jitted_logits(well_conditioned(models.build(stock)), data)
  assert np.std(plain) > 0.01
  found = models.jitted_logits(well_conditioned(models.build(config_of(block, mudd=True, **keys))), data)
  np.testing.assert_allclose(found, plain, atol=tolerance * np.abs(plain).max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("block", OTHERS)
def test_one_way_starts_as_the_stock_model(block):
  """DDFormer."""
  keys = {"remat_policy": "none"}
  connected = config_of(block, mudd=True, mudd_ways=1, **keys)
  assert_starts_alike(config_of(block, **keys), connected, 5e-5 if block in FUSED else 0)


def test_plain_connections_pass_residual_streams_on():
  """`depth_connection: residual`, the baseline, with MaxText's mHC."""
  keys = {"remat_policy": "none", "first_num_dense_layers": 1, "base_num_decoder_layers": 2}
  stock = config_of("deepseek, mHC", **keys)
  assert_starts_alike(stock, config_of("deepseek, mHC", mudd=True, depth_connection="residual", **keys))


@pytest.mark.parametrize("block", BLOCKS)
def test_equals_the_oracle(block):
  cfg = config_of(block, mudd=True)
  model = models.build(cfg)
  oracle = Oracle(dataclasses.replace(BLOCKS[block][1], ways=4), models.randomise(model))
  data = packed(cfg)
  found = models.jitted_logits(model, data)
  assert np.abs(found - expected(oracle, data)).max() <= TOLERANCE

  # Any two streams swapped in what any one block reads, or any one source of any one DA shifted by one, is noticed.
  for block in (2, 3):
    for pair in ("qk", "qv", "qr", "kv", "kr", "vr"):
      oracle.swapped = (block, *pair)
      assert np.abs(found - expected(oracle, data)).max() > 10 * TOLERANCE, oracle.swapped
  oracle.swapped = None
  for aggregate in (1, 2, 3):
    for source in range(1, aggregate + 1):
      oracle.shifted = (aggregate, source)
      assert np.abs(found - expected(oracle, data)).max() > 10 * TOLERANCE, oracle.shifted


def test_the_oracle_is_the_model_without_connections():
  """So what the tests above compare with is MaxText's model, not a relative of it; and Pythia's layer without
  connections is GPT-NeoX."""
  for block in ("llama2", "gpt3", "pythia"):
    cfg = config_of(block)
    model = models.build(cfg)
    oracle = Oracle(BLOCKS[block][1], models.randomise(model))
    data = packed(cfg)
    # Without connections less is rounded; the errors seen are up to 7.4e-6.
    assert np.abs(models.jitted_logits(model, data) - expected(oracle, data)).max() <= 3e-5


FIVE = Arch(5, ways=4)
VARIANTS = {
  "paper's K": ({"mudd_hidden_round_to": 0, "mudd_hidden_expansion": 2.0}, FIVE),
  "tanh GELU": ({"mudd_activation": "gelu_tanh"}, dataclasses.replace(FIVE, activation="gelu_tanh")),
  "DenseFormer": ({"mudd_ways": 1, "mudd_dynamic": False}, dataclasses.replace(FIVE, ways=1)),
  "DDFormer": ({"mudd_ways": 1}, dataclasses.replace(FIVE, ways=1)),
  "multiway static": ({"mudd_dynamic": False}, FIVE),
  "multiway dynamic only": ({"mudd_static": False}, dataclasses.replace(FIVE, static=False)),
  "without dense q": ({"mudd_dense_streams": "kvr"}, dataclasses.replace(FIVE, streams="kvr")),
  "value and residual": ({"mudd_dense_streams": "rv"}, dataclasses.replace(FIVE, streams="vr")),
  "without dense r": ({"mudd_dense_streams": "qkv"}, dataclasses.replace(FIVE, streams="qkv")),
  "2x1": ({"mudd_source_dilation": 2}, dataclasses.replace(FIVE, dilation=2)),
  "1x2": ({"mudd_block_period": 2}, dataclasses.replace(FIVE, period=2)),
  "2x2": (
    {"mudd_source_dilation": 2, "mudd_block_period": 2},
    dataclasses.replace(FIVE, dilation=2, period=2),
  ),
  "upper half": (
    {"mudd_depth_start": 0.5, "mudd_dense_streams": "vr"},
    dataclasses.replace(FIVE, depth_start=0.5, streams="vr"),
  ),
  "plain residual": ({"depth_connection": "residual"}, dataclasses.replace(FIVE, ways=0)),
  "capped weights": ({"mudd_weight_cap": 0.3}, dataclasses.replace(FIVE, cap=0.3)),
  "scaled weights": ({"mudd_weight_scale": True}, FIVE),
  "SW2": ({"mudd_window": 2}, dataclasses.replace(FIVE, window=2)),
  "pre-norm": ({"mudd_pre_norm": True}, dataclasses.replace(FIVE, pre_norm=True)),
  "pre- and post-norm, released": (
    {"mudd_pre_norm": True, "mudd_post_norm": True, "mudd_weight_norm_scale": True},
    dataclasses.replace(FIVE, pre_norm=True, post_norm="r"),
  ),
  "pre- and post-norm, Eq. 10": (
    {"mudd_pre_norm": True, "mudd_post_norm": True, "mudd_post_norm_streams": "qkvr"},
    dataclasses.replace(FIVE, pre_norm=True, post_norm="qkvr"),
  ),
  "post-norm": ({"mudd_post_norm": True}, dataclasses.replace(FIVE, post_norm="r")),
  "pre- and post-norm, dynamic only": (
    {"mudd_pre_norm": True, "mudd_post_norm": True, "mudd_static": False},
    dataclasses.replace(FIVE, pre_norm=True, post_norm="r", static=False),
  ),
  "one way, pre- and post-norm": (
    {"mudd_ways": 1, "mudd_pre_norm": True, "mudd_post_norm": True},
    dataclasses.replace(FIVE, ways=1, pre_norm=True, post_norm="x"),
  ),
  "re-allocated FFN": (
    {"mudd_ffn_reallocation": True, "mudd_ffn_round_to": 8, "mudd_first_block_norms": "separate"},
    FIVE,
  ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_dense_family(variant):
  keys, arch = VARIANTS[variant]
  cfg = models.config(mudd=True, base_num_decoder_layers=5, **keys)
  data = packed(cfg)
  model = models.build(cfg)
  oracle = Oracle(arch, models.randomise(model))
  assert np.abs(models.exact_logits(model, data) - expected(oracle, data)).max() <= TOLERANCE


# One of the two norms alone does not start as the plain Transformer: streams are then normed, or X_i counts twice.
@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"pre-norm", "post-norm", "re-allocated FFN"}))
def test_variants_start_as_the_stock_model(variant):
  keys = VARIANTS[variant][0] | {"base_num_decoder_layers": 3, "remat_policy": "none"}
  stock = {key: value for key, value in keys.items() if not key.startswith("mudd_") and key != "depth_connection"}
  assert_starts_alike(models.config(**stock), models.config(mudd=True, **keys))


@pytest.mark.parametrize(("block", "moe"), [("mixtral", "MoeBlock_0"), ("qwen3_moe", "moe_block")])
def test_experts_are_reallocated(block, moe):
  arch = BLOCKS[block][1]
  cfg = config_of(block, mudd=True, mudd_ffn_reallocation=True, mudd_ffn_round_to=8)
  model = models.build(cfg)
  shapes = {path: value.get_value().shape for path, value in models.parameters(model).items()}
  assert [shapes[f"decoder/layers_{i}/{moe}/wi_0"][-1] for i in range(3)] == [32, 64, 96]
  oracle = Oracle(dataclasses.replace(arch, ways=4), models.randomise(model))
  data = packed(cfg)
  assert np.abs(models.jitted_logits(model, data) - expected(oracle, data)).max() <= TOLERANCE
