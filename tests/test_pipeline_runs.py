"""Training runs on pipelines: killed, and resumed in other layouts of layers."""

import pathlib
import signal
import subprocess
import time

import pytest

from maxtext_mudd import convert, report
from maxtext_mudd.checkpoints import orbax_folder, train_state
from tests import runs
from tests.test_convert import converted

DEVICES = "--xla_force_host_platform_device_count=8"
KEYS = [
  "base_num_decoder_layers=4",
  "per_device_batch_size=1",
  "dtype=float32",
  "async_checkpointing=false",
  "mudd_ffn_reallocation=false",
  "mudd_pre_norm=true",
  "mudd_post_norm=true",
  "learning_rate_schedule_steps=6",
]
FOUR = ["ici_pipeline_parallelism=4", "ici_fsdp_parallelism=2"]
LAYOUTS = {
  "two": ["ici_pipeline_parallelism=2", "num_layers_per_pipeline_stage=2"],
  "two_scanned": ["ici_pipeline_parallelism=2", "num_layers_per_pipeline_stage=2", "scan_layers_per_stage=true"],
  "scanned": ["scan_layers=true"],
  "single": [],
}
TOTALS = ("mudd/max_weight", "mudd/grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def keys(folder) -> list[str]:
  return KEYS + runs.build_corpus(folder)


def train(folder, name, *keys) -> dict[int, float]:
  return runs.train(runs.LAUNCHER, runs.RUN_YML, folder, name, *keys, XLA_FLAGS=DEVICES)


@pytest.mark.slow
def test_a_killed_run_goes_on_in_other_layouts(folder, keys):
  """With the losses of a run that was not killed. Adam's moments and the place in the data are kept."""
  process = subprocess.Popen(
    runs.command(runs.LAUNCHER, runs.RUN_YML, folder, "killed", *keys, *FOUR, "steps=1000"),
    cwd=runs.ROOT,
    env=runs.environment(XLA_FLAGS=DEVICES),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  checkpoints, deadline = folder / "killed" / "checkpoints", time.monotonic() + 600
  while not (checkpoints / "2").exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  process.wait()

  uninterrupted = train(folder, "whole", *keys, *FOUR, "steps=6")
  totals = {name: report.read_scalars(folder / "whole")[name] for name in TOTALS}
  before = train_state.read(checkpoints / "2")
  for name, layout in LAYOUTS.items():
    assert "checkpoint of step 2" in converted(folder, "killed", name, [*keys, *layout], "--step", "2")
    went_on = train(folder, name, *keys, *layout, "steps=6")
    assert sorted(went_on) == [3, 4, 5]
    for step, loss in went_on.items():
      assert loss == pytest.approx(uninterrupted[step], rel=1e-5), name
    for total, values in totals.items():
      found = report.read_scalars(folder / name)[total]
      assert [found[step] for step in (3, 4, 5)] == pytest.approx([values[step] for step in (3, 4, 5)], rel=1e-3), name
  converted(folder, "single", "back", [*keys, *FOUR], "--step", "2")
  after = train_state.read(folder / "back" / "checkpoints" / "2")
  assert before.keys() == after.keys()
  assert all((after[path] == x).all() for path, x in before.items())

  models = []
  for name in ("killed", "single"):
    target = folder / f"model_of_{name}"
    checkpoint = ["--checkpoint", str(folder / name / "checkpoints" / "2"), "--maxtext-dir", str(target)]
    convert.main(["from-run", *checkpoint, runs.RUN_YML, *keys])
    models.append({path: x.read() for path, x in orbax_folder.parameters(target / "items").items()})
  of_stages, of_single = models
  assert of_stages.keys() == of_single.keys()
  assert all((of_stages[path] == x).all() for path, x in of_single.items())
