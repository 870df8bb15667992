"""Sorts MaxText's configuration keys by whether they describe a model, and how.

A model folder keeps the keys that describe its model (`KEYS`). Every key counts as one of them unless it is in a group
that is listed here, so that a key that a new version of MaxText adds is not lost.
"""

import enum
import re
from typing import Any

import numpy as np
import pydantic

from maxtext_mudd.config.mudd_config import MuddConfig

# Groups of keys (classes of `maxtext.configs.types`) about runs, machines and files.
_RUN_GROUPS = re.findall(
  r"\w+",
  """
  RunInfo Checkpointing OrbaxStorage EmergencyCheckpointing ElasticTraining HardwareAndMesh LayoutAndSharding
  DcnParallelism IciParallelism PipelineParallelism RematAndOffload TrainingLoop DilocoParams Optimizer AdamW Muon
  FineTuning Distillation VLLM DatasetGeneral TfdsDataset HfDataset GrainDataset MMapDataset OlmoGrainDataset Tokenizer
  InferenceGeneral Decoding InferenceLayout InferenceServer InferenceBenchmark PrefixCaching AOT
  DevelopmentAndDebugging Profiling HloDump Metrics Goodput GcpMonitoring Tensorboard ManagedMLDiagnostics
  DerivedValues SplashAttention
  """,
)
# Keys in these groups that describe the model nevertheless.
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
# Keys in the groups of the model that are about a run or a machine.
_RUN_KEYS_OF_MODEL_GROUPS = {"attention", "dtype", "grad_dtype", "matmul_precision", "dpo"}

# Keys about how a model is computed or trained: precision, kernels, losses. They may change for the same model.
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
# Keys of the model that a user may set to other values than it was trained with.
FREE = ("add_bos", "max_target_length", "weight_dtype", "scan_layers", "mudd_ffn_parts", "mudd_rope_table")


def _run_keys() -> set[str]:
  groups = {group.__name__: group for group in MuddConfig.__mro__}
  keys = {key for name in _RUN_GROUPS for key in groups[name].__annotations__}  # a KeyError means that MaxText changed
  return keys - _MODEL_KEYS_OF_RUN_GROUPS | _RUN_KEYS_OF_MODEL_GROUPS


KEYS = frozenset(MuddConfig.model_fields.keys() - _run_keys())
HOW = frozenset(key for key in KEYS if _HOW.fullmatch(key))
# Another value of these keys makes another function of the same parameters, or needs other parameters.
FUNCTION = KEYS - HOW - {*FREE, "tokenizer_path", "tokenizer_type", "mudd_ffn_groups"}


def plain(value: Any):
  """A value of a configuration, as YAML can hold it."""
  if isinstance(value, enum.Enum):
    return value.value
  if isinstance(value, np.dtype):
    return value.name
  if isinstance(value, pydantic.BaseModel):
    value = value.model_dump()
  if isinstance(value, dict):
    return {key: plain(x) for key, x in value.items()}
  return [plain(x) for x in value] if isinstance(value, list | tuple) else value
