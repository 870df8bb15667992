"""Models on pipelines: their cases, and what has to cross each boundary, from what each block reads."""

import json
import os
import subprocess
import sys

from tests import runs
from tests.placements import IRREGULAR

BOTH_NORMS = {"mudd_pre_norm": True, "mudd_post_norm": True}
FOUR = {"base_num_decoder_layers": 4}
EIGHT = {"base_num_decoder_layers": 8}
MOE = {
  "decoder_block": "mixtral",
  "num_experts": 4,
  "num_experts_per_tok": 2,
  "base_moe_mlp_dim": 16,
  "base_mlp_dim": 16,
}


def stages(number: int, length: int, **keys) -> dict:
  """Keys of a pipeline on eight devices."""
  parallelism = {"ici_pipeline_parallelism": number, "ici_fsdp_parallelism": 8 // number}
  return parallelism | {"num_layers_per_pipeline_stage": length} | keys


# By name: keys of the model, those of its pipeline, and how many arrays [B,T,D] cross each boundary.
CASES = {
  "MUDD": (FOUR, stages(4, 1), (2, 3, 4)),
  "MUDD, two blocks a stage": (FOUR, stages(2, 2), (3,)),
  "both norms": (FOUR | BOTH_NORMS, stages(4, 1), (3, 4, 5)),
  "both norms, scanned in a stage": (FOUR | BOTH_NORMS, stages(2, 2, scan_layers_per_stage=True), (4,)),
  "both norms, blocks first": (
    FOUR | BOTH_NORMS | {"param_scan_axis": 0},
    stages(2, 2, scan_layers_per_stage=True, scan_layers=True),
    (4,),
  ),
  "delayed forwarding": (
    FOUR,
    stages(4, 1, num_pipeline_microbatches=8, pipeline_delay_activation_forwarding=True),
    (2, 3, 4),
  ),
  "gathered once": (FOUR, stages(4, 1, pipeline_fsdp_ag_once=True), (2, 3, 4)),
  "turns unrolled": (FOUR, stages(2, 2, scan_pipeline_iterations=False, scan_layers=True), (3,)),
  "remat_policy=minimal": (FOUR | {"remat_policy": "minimal"}, stages(2, 2), (3,)),
  "window": (FOUR | {"mudd_window": 2, "mudd_kernel": "pallas_interpret"}, stages(4, 1), (2, 3, 3)),
  "dilation": (FOUR | {"mudd_source_dilation": 2}, stages(4, 1), (2, 3, 4)),
  "2x2": (EIGHT | {"mudd_source_dilation": 2, "mudd_block_period": 2}, stages(4, 2), (2, 3, 4)),
  "4x4": (EIGHT | {"mudd_source_dilation": 4, "mudd_block_period": 4}, stages(2, 4), (2,)),
  "window of 8": ({"base_num_decoder_layers": 12, "mudd_window": 8}, stages(4, 3), (4, 7, 9)),
  "MTP of the hidden state": (FOUR | {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1}, stages(2, 2), (3,)),
  "gpt3": (FOUR | {"decoder_block": "gpt3", "mudd_weight_cap": 0.3}, stages(2, 2), (3,)),
  "placements": ({"base_num_decoder_layers": 6, "mudd_placements": IRREGULAR} | BOTH_NORMS, stages(2, 3), (5,)),
  "one way, norms of block 1": (
    FOUR | {"mudd_ways": 1, "mudd_first_block_norms": "separate", "mudd_dynamic": False},
    stages(2, 2),
    (3,),
  ),
  "a buffer of two parts": ({"base_num_decoder_layers": 10} | BOTH_NORMS, stages(2, 5), (7,)),
  "experts": (FOUR | MOE, stages(2, 2), (3,)),
  "plain": (FOUR | {"depth_connection": "residual"}, stages(4, 1), (1, 1, 1)),
  "hyper-connections": (FOUR | {"depth_connection": "hyper_connections"}, stages(2, 2), (4,)),
  "mHC": (FOUR | {"depth_connection": "mhc", "mudd_expansion_rate": 2}, stages(4, 1), (2, 2, 2)),
  "AttnRes": (FOUR | {"depth_connection": "attnres"}, stages(2, 2), (5,)),
  "AttnRes of blocks of 3": (FOUR | {"depth_connection": "attnres", "mudd_attnres_block": 3}, stages(4, 1), (2, 3, 3)),
  "AttnRes of heads, with a value route": (
    FOUR | {"depth_connection": "attnres", "mudd_attnres_heads": 2, "mudd_attnres_value_route": True},
    stages(2, 2),
    (5,),
  ),
  "DCA": (FOUR | {"depth_connection": "dca"}, stages(4, 1), (2, 3, 4)),
  "DCA with a sum of middle sources": (
    EIGHT | {"depth_connection": "dca", "mudd_dca_sources": "middle_sum", "mudd_dca_k": 1},
    stages(4, 2),
    (4, 4, 4),
  ),
  "DCA, first and last": (
    EIGHT | {"depth_connection": "dca", "mudd_dca_sources": "first_and_last", "mudd_dca_k": 2},
    stages(4, 2),
    (3, 4, 4),
  ),
}


def on_devices(keys: dict, pipeline: dict) -> dict:
  """What `tests.pipeline_on_mesh` prints, run on eight virtual devices."""
  keys = {"mudd": True, "decoder_block": "llama2"} | keys
  finished = subprocess.run(
    [sys.executable, "-m", "tests.pipeline_on_mesh", json.dumps(keys), json.dumps(pipeline)],
    cwd=runs.ROOT,
    env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"},
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr[-4000:]
  return json.loads(finished.stdout.splitlines()[-1])
