"""Sorts the configuration keys by what they mean for a trained model. Each set answers one question.

  set       question                                                              in it              not in it
  KEYS      Does the key describe a model? Then a model folder keeps it.          base_emb_dim       learning_rate
  FUNCTION  Does another value need other parameters, or compute another          base_emb_dim       weight_dtype
            function of the same parameters? Then it describes another model.
  HOW       Does another value only change how the function is computed or        mudd_kernel        base_emb_dim
            trained, such as precision, kernels and losses?
  FREE      Is it one of the keys outside HOW that a user may override?           weight_dtype       base_emb_dim

`FUNCTION`, `HOW` and `FREE` are disjoint subsets of `KEYS`. A user who loads or converts a model may override the keys
of `HOW` and `FREE`. Three keys of `KEYS` are in none of these sets. A model folder sets `tokenizer_path` and
`tokenizer_type` to its own tokenizer. `mudd_ffn_groups` may change as long as every block keeps its FFN width.

`KEYS` has every key that is not about a run. Three sets determine which keys are about a run. They use MaxText's groups
of keys, which are the classes of `maxtext.configs.types`:

  set                        question                                             in it
  _RUN_GROUPS                Which groups are about runs, machines and files?     Optimizer, with learning_rate
  _MODEL_KEYS_OF_RUN_GROUPS  Which keys in these groups describe a model?         vocab_size
  _RUN_KEYS_OF_MODEL_GROUPS  Which keys in the other groups are about a run?      dtype

A key that a new version of MaxText adds is in `KEYS` unless its group is in `_RUN_GROUPS`, so that it is not lost.
"""

import enum
import re
from typing import Any

import numpy as np
import pydantic

from maxtext_mudd.config.mudd_config import MuddConfig

_RUN_GROUPS = re.findall(
  r"\w+",
  """
  RunInfo Checkpointing OrbaxStorage EmergencyCheckpointing ElasticTraining HardwareAndMesh LayoutAndSharding
  DcnParallelism IciParallelism PipelineParallelism RematAndOffload TrainingLoop DilocoParams Optimizer AdamW Muon
  OptimizerKeys FineTuning Distillation VLLM DatasetGeneral TfdsDataset HfDataset GrainDataset MMapDataset
  OlmoGrainDataset Tokenizer
  InferenceGeneral Decoding InferenceLayout InferenceServer InferenceBenchmark PrefixCaching AOT
  DevelopmentAndDebugging Profiling HloDump Metrics Goodput GcpMonitoring Tensorboard ManagedMLDiagnostics
  DerivedValues SplashAttention
  """,
)
_MODEL_KEYS_OF_RUN_GROUPS = {
  "scan_layers",
  "param_scan_axis",
  "inhomogeneous_layer_cycle_interval",
  "constant_bound_config",
  "vocab_size",
  "tokenizer_path",
  "tokenizer_type",
  "add_bos",
  "max_target_length",
}
_RUN_KEYS_OF_MODEL_GROUPS = {"attention", "dtype", "grad_dtype", "matmul_precision", "dpo"}

# The names of the keys in `HOW`.
_HOW = re.compile(
  r"mudd_(kernel|init|init_std)|quant\w*|\w+_quantization_calibration_method|kv_quant_\w+|weight_sparsity_\w+|"
  r"use_(qwix|manual)_quantization|unquantized_modules|weight_block_size|replicate_quant_scale|constant_bound_config|"
  r"te_\w+|activations_in_float32|dtype_mm|float32_\w+|logits_dot_in_fp32|cast_logits_to_fp32|num_vocab_tiling|"
  r"vocab_tiling_\w+|z_loss_multiplier|load_balance_loss_weight|mtp_loss_scaling_factor|routed_bias_update_rate|"
  r"ragged_\w+|use_(ragged_attention|tokamax_splash|jax_splash|iota_embed|qk_clip)|qk_clip_threshold|force_q_layout|"
  r"dense_init_scale|megablox|sparse_matmul|merge_gating_gmm|use_(tokamax_gmm|gmm_v2)\w*|(eval_)?w[io]_tile_\w+|"
  r"use_(custom_sort_vjp|ring_of_experts|ragged_sort|2d_fsdp_sharding|gather_mosaic_kernel)|shard_\w+_on_fsdp|"
  r"moe_(topk_before|dispatch|quantize|pin|fsdp|ep|use_direct|log|chunk)_\w+|num_moe_\w+_chunks|fuse_expert_scales|"
  r"prefuse_moe_weights|return_routed_experts|retry_dropless_first_steps|warmup_programs_in_init|log_\w+"
)
FREE = ("add_bos", "max_target_length", "weight_dtype", "scan_layers", "mudd_ffn_parts", "mudd_rope_table")


def _run_keys() -> set[str]:
  groups = {group.__name__: group for group in MuddConfig.__mro__}
  keys = {key for name in _RUN_GROUPS for key in groups[name].__annotations__}  # a KeyError means that MaxText changed
  return keys - _MODEL_KEYS_OF_RUN_GROUPS | _RUN_KEYS_OF_MODEL_GROUPS


KEYS = frozenset(MuddConfig.model_fields.keys() - _run_keys())
HOW = frozenset(key for key in KEYS if _HOW.fullmatch(key))
FUNCTION = KEYS - HOW - {*FREE, "tokenizer_path", "tokenizer_type", "mudd_ffn_groups"}


def plain(value: Any):
  """Converts a value of a configuration to a type that YAML can hold."""
  if isinstance(value, enum.Enum):
    return value.value
  if isinstance(value, np.dtype):
    return value.name
  if isinstance(value, pydantic.BaseModel):
    value = value.model_dump()
  if isinstance(value, dict):
    return {key: plain(x) for key, x in value.items()}
  return [plain(x) for x in value] if isinstance(value, list | tuple) else value
