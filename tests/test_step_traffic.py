"""The whole train step of four blocks of MUDDFormer-2.8B, compiled ahead of time for a v5p-8, kernels and all."""

import json
import subprocess
import sys

import pytest

from tests import runs

RECORD = runs.ROOT / "benchmarks" / "results" / "2026-11-23-tpu-step-traffic-2p8b-4-layers.json"


@pytest.mark.slow
def test_fused_step():
  """One pass each way for every aggregate: nothing is made twice. Less memory held and moved than the plain form took
  when that was recorded."""
  case = ["fused", "yaml/mudd_2p8b.yml", "v5p-8", {"per_device_batch_size": 4, "base_num_decoder_layers": 4}, None]
  finished = subprocess.run(
    [sys.executable, "benchmarks/tpu_step_traffic.py", "_one", json.dumps(case)],
    cwd=runs.ROOT,
    env=runs.environment() | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr[-4000:]
  fused = json.loads(finished.stdout.splitlines()[-1])
  calls = {name: count for name, count in fused["kernel_calls"].items() if name.startswith("depth_aggregate")}
  assert calls == {"depth_aggregate_forward": 4, "depth_aggregate_backward": 4, "depth_aggregate_push": 1}
  [plain] = [row for row in json.loads(RECORD.read_text())["rows"] if row["form"] == "xla"]
  assert fused["temporary_bytes"] <= plain["temporary_bytes"]
  assert fused["hbm_bytes"] < plain["hbm_bytes"]
