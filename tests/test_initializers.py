"""How embeddings and kernels start: their deviations, written out, and that nothing else changes."""

import math

import numpy as np
import pytest

from tests import models
from tests.blocks import MOE, config_of

WIDTH, HEADS, HEAD, FFN, VOCAB, LAYERS = 128, 4, 32, 256, 512, 2
SHAPE = {
  "base_emb_dim": WIDTH,
  "base_num_query_heads": HEADS,
  "base_num_kv_heads": 2,
  "head_dim": HEAD,
  "base_mlp_dim": FFN,
  "vocab_size": VOCAB,
  "base_num_decoder_layers": LAYERS,
}

# Relative, of a deviation: five standard errors of the smallest kernels, of 8192 numbers; the error seen is 1.3%.
DRAWN = 0.04
DRAWN_ROUTER = 0.1  # three of a router's 512 numbers; that the one draw here is within 0.2% is luck


def xavier(fan_in, fan_out):
  return math.sqrt(2 / (fan_in + fan_out))


def deviations(**keys):
  found = models.parameters(models.build(models.config(**SHAPE, **keys)))
  return {path: float(np.std(value.get_value())) for path, value in found.items()}


@pytest.mark.parametrize("scanned", [False, True])
def test_xavier_normal(scanned):
  found = deviations(mudd_init="xavier_normal", decoder_block="qwen3", scan_layers=scanned)
  layer = "decoder/layers" if scanned else "decoder/layers_1"
  expected = {
    "token_embedder/embedding": xavier(VOCAB, WIDTH),
    "decoder/logits_dense/kernel": xavier(WIDTH, VOCAB),
    f"{layer}/self_attention/query/kernel": xavier(WIDTH, HEADS * HEAD),
    f"{layer}/self_attention/key/kernel": xavier(WIDTH, 2 * HEAD),
    f"{layer}/self_attention/value/kernel": xavier(WIDTH, 2 * HEAD),
    f"{layer}/self_attention/out/kernel": xavier(HEADS * HEAD, WIDTH),
    f"{layer}/mlp/wi_0/kernel": xavier(WIDTH, FFN),
    f"{layer}/mlp/wo/kernel": xavier(FFN, WIDTH),
  }
  for path, deviation in expected.items():
    assert found[path] == pytest.approx(deviation, rel=DRAWN), path


def test_where_the_query_kernel_carries_the_scale_of_the_scores():
  found = deviations(mudd_init="xavier_normal", decoder_block="llama2")
  expected = xavier(WIDTH, HEADS * HEAD) / math.sqrt(HEAD)
  assert found["decoder/layers_0/self_attention/query/kernel"] == pytest.approx(expected, rel=DRAWN)


def test_experts():
  found = deviations(mudd_init="xavier_normal", decoder_block="mixtral", **(MOE | {"base_moe_mlp_dim": FFN}))
  assert found["decoder/layers_0/MoeBlock_0/wi_0"] == pytest.approx(xavier(WIDTH, FFN), rel=DRAWN)
  assert found["decoder/layers_0/MoeBlock_0/wo"] == pytest.approx(xavier(WIDTH, FFN), rel=DRAWN)
  assert found["decoder/layers_0/MoeBlock_0/gate/kernel"] == pytest.approx(xavier(WIDTH, 4), rel=DRAWN_ROUTER)


def test_normal():
  found = deviations(mudd_init="normal", mudd_init_std=0.006, decoder_block="qwen3")
  kernels = [path for path in found if path.endswith(("kernel", "embedding"))]
  assert len(kernels) == 2 + 7 * LAYERS
  for path in kernels:
    assert found[path] == pytest.approx(0.006, rel=DRAWN), path


def test_pythia():
  keys = {"decoder_block": "gpt3", "mudd_decoder_layer": "pythia", "mlp_activations": ["gelu"]}
  found = deviations(mudd_init="pythia", **keys)
  small, wang = math.sqrt(2 / (5 * WIDTH)), 2 / LAYERS / math.sqrt(WIDTH)
  for path, deviation in found.items():
    if path.endswith(("out/kernel", "wo/kernel")):
      assert deviation == pytest.approx(wang, rel=DRAWN), path
    elif path.endswith(("kernel", "embedding")):
      assert deviation == pytest.approx(small, rel=DRAWN), path
    else:
      assert deviation == 0, path  # norms and biases


def test_connections_start_as_ever_and_every_kernel_has_a_key_of_its_own():
  cfg = models.config(mudd=True, mudd_init="xavier_normal")
  found = {path: np.asarray(v.get_value()) for path, v in models.parameters(models.build(cfg)).items()}
  stock = {
    path: np.asarray(v.get_value()) for path, v in models.parameters(models.build(models.config(mudd=True))).items()
  }
  for path, value in found.items():
    if "connection" in path or path.endswith("scale"):
      np.testing.assert_array_equal(value, stock[path], err_msg=path)
    else:
      assert (value != stock[path]).mean() > 0.99, path
  drawn = [value.ravel()[:64] for path, value in found.items() if path.endswith("kernel")]
  normed = np.stack([value / np.linalg.norm(value) for value in drawn])
  assert np.abs(normed @ normed.T - np.eye(len(normed))).max() < 0.7  # 0.4 seen of 64 numbers; the same key gives 1


@pytest.mark.parametrize("block", ["llama2", "mixtral"])
def test_kernels_that_write_to_several_streams(block):
  """`mudd_hyper_scaled_init`: those of attention outputs and of the second FFN matrix are √n times as large."""
  keys = {"mudd": True, "depth_connection": "hyper_connections", "mudd_expansion_rate": 3}
  models_of = (models.build(config_of(block, **keys, mudd_hyper_scaled_init=scaled)) for scaled in (False, True))
  stock, scaled = ({path: np.asarray(x.get_value()) for path, x in models.parameters(m).items()} for m in models_of)
  written = {path for path in stock if not np.array_equal(stock[path], scaled[path])}
  assert {path.split("/")[-2] if path.endswith("kernel") else path.split("/")[-1] for path in written} == {"out", "wo"}
  assert len(written) == 2 * 3
  for path in written:
    np.testing.assert_allclose(scaled[path], 3**0.5 * stock[path], rtol=2e-7)
