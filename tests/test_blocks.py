"""Every supported MaxText decoder block: equal to stock at the start, and to the float64 oracle with random weights."""

import dataclasses

import numpy as np
import pytest

from maxtext_mudd import blocks
from tests import models
from tests.oracle import Arch, Oracle

TOLERANCE = 1e-4  # of logits with a standard deviation of about 1

MOE = {
  "num_experts": 4,
  "num_experts_per_tok": 2,
  "base_moe_mlp_dim": 64,
  "sparse_matmul": False,
  "megablox": False,
  "load_balance_loss_weight": 0.01,
}
GQA = {"base_num_query_heads": 4, "base_num_kv_heads": 2, "head_dim": 8}
GQA_ARCH = {"heads": 4, "kv_heads": 2, "head_dim": 8}

BLOCKS = {
  "llama2": (GQA, Arch(3, **GQA_ARCH)),
  "mistral": (GQA, Arch(3, **GQA_ARCH)),
  "mixtral": (MOE, Arch(3, experts_per_token=2, moe_name="MoeBlock_0")),
  "qwen2": ({"attention_bias": True}, Arch(3, score_scale=0.25)),
  "qwen3": ({"use_qk_norm": True}, Arch(3, qk_norm=True, score_scale=0.25)),
  "qwen3_moe": (
    MOE | {"use_qk_norm": True, "norm_topk_prob": True},
    Arch(3, qk_norm=True, score_scale=0.25, experts_per_token=2, moe_name="moe_block"),
  ),
  "gemma": (
    {"mlp_activations": ["gelu", "linear"]},
    Arch(3, attention_norm="pre_self_attention_norm", ffn_norm="pre_ffw_norm", ffn="geglu"),
  ),
  "gpt3": (
    {"mlp_activations": ["gelu"], "trainable_position_size": 16},
    Arch(
      3,
      attention_norm="pre_self_attention_norm",
      ffn_norm="mlp/mlp_layer_norm",
      ffn="gpt3",
      layer_norm=True,
      scale_offset=1.0,  # MaxText stores the scales of gpt3 less one
      rope=False,
      score_scale=0.25,
    ),
  ),
  "pythia": (
    {"decoder_block": "gpt3", "mudd_decoder_layer": "pythia", "mlp_activations": ["gelu"]},
    Arch(
      3,
      attention_norm="pre_self_attention_norm",
      ffn_norm="pre_mlp_norm",
      ffn="pythia",
      layer_norm=True,
      rotated=0.25,
      parallel=True,
      score_scale=0.25,
    ),
  ),
}


def config_of(block, **overrides):
  return models.config(**({"decoder_block": block} | BLOCKS[block][0] | overrides))


def packed(cfg):
  """A batch whose rows hold two documents each."""
  data = models.batch(cfg)
  rows, length = data["inputs"].shape
  cut = length // 3
  position = np.concatenate([np.arange(cut), np.arange(length - cut)]).astype(np.int32)
  segments = np.where(np.arange(length) < cut, 1, 2).astype(np.int32)
  shape = (rows, length)
  return data | {
    "inputs_position": np.broadcast_to(position, shape),
    "inputs_segmentation": np.broadcast_to(segments, shape),
  }


def expected(oracle, data):
  return oracle(data["inputs"], data["inputs_position"], data["inputs_segmentation"])


def test_every_supported_block_is_tested():
  assert set(BLOCKS) == set(blocks.BLOCKS)


def assert_starts_alike(stock, mudd):
  """Bit for bit, op by op: under jit the compiler may fuse the two models' sums differently (it does for gpt3)."""
  data = packed(stock)
  plain = models.logits(models.build(stock), data)
  assert np.std(plain) > 0.01
  np.testing.assert_array_equal(models.logits(models.build(mudd), data), plain)


@pytest.mark.parametrize("block", BLOCKS)
def test_starts_as_the_stock_model(block):
  keys = {"remat_policy": "none"}
  assert_starts_alike(config_of(block, **keys), config_of(block, mudd=True, **keys))


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
    assert np.abs(models.jitted_logits(model, data) - expected(oracle, data)).max() <= TOLERANCE


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
