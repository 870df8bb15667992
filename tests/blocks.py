"""Small models of every supported decoder block, and what the oracle has to be told of each."""

import numpy as np

from tests import models
from tests.oracle import Arch

TOLERANCE = 1e-4  # of logits with a standard deviation of about 1, in float32; the errors seen are up to 9.3e-5
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
