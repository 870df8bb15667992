"""Training checkpoints between single and scanned layers: both layouts go on as if nothing had happened."""

import logging
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxtext_mudd import convert
from maxtext_mudd.checkpoints import layout
from tests import models, runs

KEYS = [
  "dataset_type=synthetic",
  "eval_interval=-1",
  "dtype=float32",
  "learning_rate_schedule_steps=6",
  "async_checkpointing=false",
  "mudd_ffn_groups=2",
  "mudd_pre_norm=true",
  "mudd_post_norm=true",
]
SCANNED = [*KEYS, "scan_layers=true"]
SINGLE = [*KEYS, "scan_layers=false"]


def train(folder, name, keys, steps, **environment):
  return runs.train(runs.LAUNCHER, runs.RUN_YML, folder, name, *keys, f"steps={steps}", **environment)


def converted(folder, source, target, keys, *options):
  command = ["--from", str(folder / source), "--to", str(folder / target), *options, runs.RUN_YML, *keys]
  finished = subprocess.run(
    [sys.executable, "-m", "maxtext_mudd.convert", "layout", *command],
    cwd=runs.ROOT,
    env=runs.environment(),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr[-2000:]
  return finished.stdout


def leaves(folder, name, step):
  tree = ocp.PyTreeCheckpointer().restore(folder / name / "checkpoints" / str(step) / "items")
  del tree["nnx_aux"]  # random states
  flat = {}

  def visit(path, x):
    if isinstance(x, dict | list | tuple):
      for key, value in x.items() if isinstance(x, dict) else enumerate(x):
        visit((*path, key), value)
    elif x is not None:
      flat[path] = np.asarray(x)

  visit((), tree)
  return flat


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_layouts_go_on(optimizer, tmp_path):
  single_keys, scanned_keys = [*SINGLE, f"opt_type={optimizer}"], [*SCANNED, f"opt_type={optimizer}"]
  train(tmp_path, "single", single_keys, 3)
  assert "checkpoint of step 2" in converted(tmp_path, "single", "scanned", scanned_keys)
  converted(tmp_path, "scanned", "back", single_keys)
  before, after = leaves(tmp_path, "single", 2), leaves(tmp_path, "back", 2)
  assert before.keys() == after.keys()
  assert all(np.array_equal(after[path], x) for path, x in before.items())

  uninterrupted = train(tmp_path, "whole", single_keys, 6)
  for name, keys in (("scanned", scanned_keys), ("back", single_keys)):
    went_on = train(tmp_path, name, keys, 6)
    assert sorted(went_on) == [3, 4, 5]
    for step, loss in went_on.items():
      assert loss == pytest.approx(uninterrupted[step], rel=1e-6)


@pytest.mark.slow
def test_a_run_of_eight_devices_goes_on_on_one(tmp_path):
  """From its place in the data, too. With SGD: Adam makes full steps of gradients that are nothing but rounding."""
  common = [x for x in KEYS if x != "dataset_type=synthetic"] + runs.build_corpus(tmp_path)
  common += ["opt_type=sgd", "learning_rate=0.01"]
  many = [*common, "scan_layers=true", "per_device_batch_size=1"]
  eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  train(tmp_path, "eight", many, 3, **eight)
  one = [*common, "scan_layers=false", "per_device_batch_size=8"]
  converted(tmp_path, "eight", "one", one)
  expected = train(tmp_path, "eight", many, 6, **eight)
  went_on = train(tmp_path, "one", one, 6)
  assert sorted(went_on) == [3, 4, 5]
  assert len(set(went_on.values())) == 3
  for step, loss in went_on.items():
    assert loss == pytest.approx(expected[step], rel=4e-6)  # the error seen is 5e-7, one rounding of float32


def refusal(capsys, *arguments) -> str:
  with pytest.raises(SystemExit) as ended:
    convert.main(["layout", *map(str, arguments)])
  logging.disable(logging.NOTSET)
  assert ended.value.code == 2
  return capsys.readouterr().err.splitlines()[-1]


def test_refusals(tmp_path, capsys):
  """One sentence each, nothing written."""
  run, there = tmp_path / "run", tmp_path / "there"
  there.mkdir()
  common = (runs.RUN_YML, *SCANNED)
  assert refusal(capsys, "--from", run, "--to", there, *common).endswith(
    f"{there} exists already; name a run that does not."
  )
  new = tmp_path / "new"
  found = refusal(capsys, "--from", run, "--to", new, *common)
  assert found.endswith(f"{run} is not the folder of a run: it has no checkpoints/.")
  (run / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
  found = refusal(capsys, "--from", run, "--to", new, *common)
  assert found.endswith(f"{run / 'checkpoints'} holds no complete checkpoint.")
  (run / "checkpoints" / "7" / "items").mkdir(parents=True)
  found = refusal(capsys, "--from", run, "--to", new, "--step", 5, *common)
  assert found.endswith(f"{run / 'checkpoints'} has no checkpoint of step 5; it has 7.")
  found = refusal(capsys, "--from", run, "--to", new, *common)
  assert f"{run / 'checkpoints' / '7'} cannot be read; it is damaged, or is not a MaxText checkpoint" in found
  found = refusal(capsys, "--from", run, "--to", new, str(runs.ROOT / "tests" / "stock.yml"))
  assert "mudd=False: only models with connections can be converted" in found
  # A run of a pod, converted here.
  pod = (str(runs.ROOT / "yaml" / "mudd_405m.yml"), "scan_layers=true", "mudd_ffn_groups=4", "ici_fsdp_parallelism=8")
  assert refusal(capsys, "--from", there, "--to", new, *pod).endswith(
    "is not the folder of a run: it has no checkpoints/."
  )
  found = refusal(capsys, "--from", "gs://bucket/run", "--to", new, *common)
  assert found.endswith("gs://bucket/run is not a local folder; copy it first.")
  assert not new.exists() and not (tmp_path / ".new.partial").exists()


def test_another_number_of_layers():
  """Is not taken for fewer."""
  five, three = ({"mudd": True, "base_num_decoder_layers": n} for n in (5, 3))
  single = {path: x.get_value() for path, x in models.parameters(models.build(models.config(**five))).items()}
  with pytest.raises(ValueError, match=r"it has decoder/layers_3/.*, of more layers than 3"):
    layout.stack(single, models.config(**three, scan_layers=True))
  stacked = layout.stack(single, models.config(**five, scan_layers=True))
  with pytest.raises(ValueError, match="is of 5 layers, not 3"):
    layout.unstack(stacked, models.config(**three, scan_layers=True))


def test_groups_that_are_not_the_run_s():
  keys = {"mudd": True, "base_num_decoder_layers": 6, "mudd_ffn_reallocation": True, "mudd_ffn_round_to": 8}
  single = models.config(**keys)
  values = {path: x.get_value() for path, x in models.parameters(models.build(single)).items()}
  with pytest.raises(ValueError, match=r"mlp/w\S+ is .* and .* in blocks that mudd_ffn_groups=2 scans together"):
    layout.stack(values, models.config(**keys, mudd_ffn_groups=2, scan_layers=True))
