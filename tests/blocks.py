"""Small models of every supported decoder block, and what the oracle needs to know of each that it restates."""

from flax import nnx
import numpy as np

from maxtext_mudd import blocks
from maxtext_mudd.blocks.halves import split
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
POST_NORMS = {"use_post_attn_norm": True, "use_post_ffw_norm": True, "sliding_window_size": 4}
LATENT = {
  "attention_type": "mla",
  "q_lora_rank": 12,
  "kv_lora_rank": 16,
  "qk_nope_head_dim": 8,
  "qk_rope_head_dim": 4,
  "v_head_dim": 12,
  "head_dim": 12,  # MaxText's cache of keys and values needs all these to be one width
}
MHC = {"mhc_expansion_rate": 2, "sinkhorn_iterations": 3}
COMPRESSED = {
  "model_name": "deepseek4-tiny",
  "override_model_config": True,
  "attention_type": "compressed",
  "base_num_kv_heads": 1,
  "q_lora_rank": 12,
  "qk_rope_head_dim": 4,
  "o_groups": 2,
  "o_lora_rank": 8,
  "sliding_window_size": 4,
  "use_indexer": True,
  "indexer_sparse_training": True,  # otherwise MaxText trains indexers alone
  "indexer_head_dim": 8,
  "indexer_n_heads": 2,
  "indexer_topk": 2,
  "first_num_hash_layers": 2,
  "compress_ratios": [0, 4, 128, 4],
  "base_num_decoder_layers": 4,
}
DELTA_NET = {
  "gdn_num_value_heads": 4,
  "gdn_num_key_heads": 2,
  "gdn_key_head_dim": 8,
  "gdn_value_head_dim": 8,
  "gdn_conv_kernel_dim": 4,
  "gdn_chunk_size": 8,
  "partial_rotary_factor": 0.25,
  "use_qk_norm": True,
}
CYCLES = {"base_num_decoder_layers": 4, "inhomogeneous_layer_cycle_interval": 2}
# Blocks that the oracle does not restate. Each model has layers of every kind.
OTHERS = {
  "default": {},
  "gemma2": POST_NORMS | {"base_num_decoder_layers": 2, "mlp_activations": ["gelu", "linear"]},
  "gemma3": POST_NORMS | {"model_name": "gemma3-4b", "override_model_config": True, "base_num_decoder_layers": 8},
  "gemma4": POST_NORMS | {"base_num_decoder_layers": 14},
  "gemma4, experts": MOE
  | {
    "decoder_block": "gemma4",
    "shared_experts": 1,
    "sliding_window_size": 4,
    "base_num_decoder_layers": 6,
  },
  "gemma4, tied values": POST_NORMS
  | {"decoder_block": "gemma4", "share_kv_projections": True, "base_num_decoder_layers": 8},
  "gemma4_small": {
    "model_name": "gemma4-e2b",
    "override_model_config": True,
    "base_num_decoder_layers": 10,  # four local layers and a global one, and the same with their keys and values
    "num_kv_shared_layers": 5,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "global_head_dim": 32,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 1,
    "sliding_window_size": 4,
  },
  "gpt_oss": MOE
  | CYCLES
  | {"sliding_window_size": 4, "attention_sink": True, "attention_bias": True, "routed_bias": True, "mlp_bias": True},
  "llama4": MOE
  | CYCLES
  | {
    "num_experts_per_tok": 1,
    "shared_experts": 1,
    "chunk_attn_window_size": 4,
    "interleave_moe_layer_step": 2,
    "nope_layer_interval": 2,
  },
  "envy": MOE | CYCLES | {"interleave_moe_layer_step": 2},
  "olmo3": {"base_num_decoder_layers": 8, "inhomogeneous_layer_cycle_interval": 4, "sliding_window_size": 4},
  "deepseek": MOE | LATENT | {"first_num_dense_layers": 2, "base_num_decoder_layers": 4, "shared_experts": 1},
  "deepseek, no query latent": MOE
  | LATENT
  | {"decoder_block": "deepseek", "q_lora_rank": 0, "first_num_dense_layers": 1, "shared_experts": 1},
  "deepseek, indexer": MOE
  | LATENT
  | {
    "decoder_block": "deepseek",
    "first_num_dense_layers": 1,
    "base_num_decoder_layers": 2,
    "shared_experts": 1,
    "use_indexer": True,
    "indexer_sparse_training": True,  # otherwise MaxText trains indexers alone
    "indexer_head_dim": 8,
    "indexer_n_heads": 2,
    "indexer_topk": 4,
  },
  "deepseek, mHC": MOE
  | MHC
  | LATENT
  | {
    "decoder_block": "deepseek",
    "first_num_dense_layers": 2,
    "base_num_decoder_layers": 4,
    "shared_experts": 1,
  },
  # Long enough for a vector of 128 tokens.
  "deepseek4": MOE | MHC | COMPRESSED | {"shared_experts": 1, "max_target_length": 160},
  "qwen3_next": MOE
  | DELTA_NET
  | {"base_num_decoder_layers": 8, "inhomogeneous_layer_cycle_interval": 3, "shared_experts": 1},
  "qwen3_5": MOE | DELTA_NET | CYCLES | {"shared_experts": 1},
  "fused projection": GQA | {"decoder_block": "llama2", "fused_qkv": True},
  "gpt3, fused projection": {
    "decoder_block": "gpt3",
    "mlp_activations": ["gelu"],
    "trainable_position_size": 16,
    "fused_qkv": True,
  },
  "qwen3_custom_moe": MOE | {"attention_output_dim": 24, "moe_expert_input_dim": 24},
}
# MaxText runs these scanned only. They have no attention, and so read one stream.
SIMPLE = ("simple", "simple_mlp")
FUSED = (
  "fused projection",
  "gpt3, fused projection",
  "qwen3_next",
  "qwen3_5",
)  # have a projection whose columns read different streams
# Second models of a block, and those that take longest to compile. What tests them layer by layer is slow.
SLOW = ("gemma4, experts", "gemma4, tied values", "envy", "deepseek, no query latent", "deepseek, indexer")
SLOW += ("deepseek, mHC", "deepseek4", "gemma4_small", "qwen3_next", "qwen3_5", "gpt3, fused projection")
SINGLE = ("gemma4_small",)  # MaxText does not scan their layers
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
KEYS = {block: keys for block, (keys, _) in BLOCKS.items()} | OTHERS
LAYOUTS = [(block, layout) for block in KEYS for layout in ("single", "scanned")[: 1 if block in SINGLE else 2]]


def config_of(block, **overrides):
  return models.config(**({"decoder_block": block} | KEYS[block] | overrides))


def single_blocks(model, config) -> list[nnx.Module]:
  """The layers of a stock model, or the halves of layers that are two blocks."""
  layers, row = model.decoder.get_layers(), blocks.spec(config)
  if not row.sides:
    return layers
  return [getattr(layer, half) for layer in map(nnx.clone, layers) for half in split(layer, row.cycle)]


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
