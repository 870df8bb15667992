"""Whole train steps, compiled ahead of time for a v5p-8, kernels and all: MUDDFormer-2.8B, and small scanned models."""

import json
import re
import subprocess
import sys

import pytest

from tests import runs

RECORD = runs.ROOT / "benchmarks" / "results" / "2026-11-23-tpu-step-traffic-2p8b-4-layers.json"


def compiled(yaml: str, keys: dict, keep: str | None = None) -> dict:
  """The row that benchmarks/tpu_step_traffic.py writes of a model with fused kernels.

  Args:
    keep: a folder for the HLO.
  """
  finished = subprocess.run(
    [sys.executable, "benchmarks/tpu_step_traffic.py", "_one", json.dumps(["fused", yaml, "v5p-8", keys, keep])],
    cwd=runs.ROOT,
    env=runs.environment() | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr[-4000:]
  return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.slow
def test_fused_step():
  """One pass each way for every aggregate: nothing is made twice. Less memory held and moved than the plain form took
  when that was recorded."""
  fused = compiled("yaml/mudd_2p8b.yml", {"per_device_batch_size": 4, "base_num_decoder_layers": 4})
  calls = {name: count for name, count in fused["kernel_calls"].items() if name.startswith("depth_aggregate")}
  assert calls == {"depth_aggregate_forward": 4, "depth_aggregate_backward": 4, "depth_aggregate_push": 1}
  [plain] = [row for row in json.loads(RECORD.read_text())["rows"] if row["form"] == "xla"]
  assert fused["temporary_bytes"] <= plain["temporary_bytes"]
  assert fused["hbm_bytes"] < plain["hbm_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "keys",
  [
    {"decoder_block": "llama2", "base_num_query_heads": 8, "base_num_kv_heads": 4, "head_dim": 256},
    {"model_name": "gemma3-12b", "override_model_config": True},
  ],
  ids=["single layers", "cycles"],
)
def test_buffer_is_not_copied(keys, tmp_path):
  """Scanned layers change the buffer of sources and that of its gradients in place."""
  layers, width = 12, 512
  # The buffer, 218 MB, is too large for VMEM. XLA moves one that fits to there, which is no copy in HBM.
  sizes = {"max_target_length": 16384, "per_device_batch_size": 1, "vocab_size": 2048, "base_emb_dim": width}
  sizes |= {"base_mlp_dim": 1024, "base_num_decoder_layers": layers, "dtype": "bfloat16"}
  compiled("yaml/mudd_base.yml", {"mudd": True, "scan_layers": True, **sizes, **keys}, str(tmp_path))
  hlo = (tmp_path / "fused.txt").read_text()
  buffers = rf"bf16\[{layers + 1},[\d,]*{width}\]\S*"
  assert re.search(rf"= {buffers} fusion\(", hlo)  # the buffer is there
  assert not re.findall(rf"= \(?{buffers}.* copy(?:-start)?\(", hlo)
