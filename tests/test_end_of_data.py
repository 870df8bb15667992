"""How a training run ends when its data do, or cannot be read: its last checkpoint, sentence and status."""

import json
import pathlib
import subprocess
import types
from unittest import mock

import grain
import jax
from maxtext.common import data_loader
from maxtext.input_pipeline.multihost_dataloading import MultiHostDataLoadIterator
from maxtext.trainers.pre_train import train
from maxtext.utils import maxtext_utils, train_utils
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from maxtext_mudd.runs import end_of_data
from tests import models, runs

MODEL = ("train.py", runs.RUN_YML)
BATCH = 2


class Run:
  """A run of MaxText's own training loop, without a model, on rows of which one may be broken."""

  def __init__(self, folder: pathlib.Path, rows: int, broken: int | None = None, **overrides):
    keys = {"dataset_type": "grain", "grain_train_files": "x", "steps": 9, "checkpoint_period": 100}
    keys |= {"run_name": "r", "base_output_directory": str(folder), "enable_checkpointing": True} | overrides
    self.config = models.config(per_device_batch_size=BATCH, save_checkpoint_on_start=False, **keys)
    self.mesh = maxtext_utils.get_mesh_from_config(self.config)
    self.manager = train_utils.create_checkpoint_manager(self.config, self.mesh, None)
    self.checkpoints = folder / "r" / "checkpoints"
    self.iterator = self.read(rows, broken)

  def read(self, rows: int, broken: int | None = None) -> MultiHostDataLoadIterator:
    def row(index):
      if index == broken:
        raise ValueError(f"row {index} is broken")
      return {"inputs": np.full([self.config.max_target_length], index)}

    dataset = grain.MapDataset.range(rows).to_iter_dataset().map(row).batch(BATCH, drop_remainder=True)
    return MultiHostDataLoadIterator(dataset, self.mesh)

  def steps(self, start: int = 0, evaluation=None) -> Exception:
    """Trains from step `start` until an exception ends it, which is returned."""
    state = {"steps": jax.numpy.zeros(())}
    device = {"state": state, "p_train_step": lambda state, batch: ({"steps": state["steps"] + 1}, {})}
    device |= {"init_rng": None, "mesh": self.mesh, "p_eval_step": lambda state, batch: {}}
    loader = data_loader.DataLoader(self.config, self.mesh, self.iterator, None)
    python = {"step": start, "last_step_completion": train.datetime.datetime.now(), "data_loader": loader}
    python |= {"rampup_manager": None, "recorder": None, "checkpoint_manager": self.manager}
    python |= {"data_iterator": self.iterator, "eval_data_iterator": evaluation}
    python |= {"metric_logger_instance": mock.Mock(), "prof": mock.Mock()}
    fixed = {"config": self.config, "start_step": start, "logical_axis_rules_for_train": (), "dump_hlo": False}
    fixed |= {"logical_axis_rules_for_eval": (), "eval_interval": 3 if evaluation else -1, "eval_start_step": 1}
    fixed |= dict.fromkeys(("eval_steps", "dump_step"), -1)
    fixed |= {
      f"dump_hlo_{key}": "" for key in ("local_dir", "gcs_dir", "module_name", "delete_local_after", "upload_all")
    }
    while True:
      try:
        train.training_loop_iteration(device, python, fixed)
      except Exception as error:
        return error
      python["step"] += 1

  def saved(self) -> list[int]:
    return sorted(int(entry.name) for entry in self.checkpoints.iterdir())

  def steps_of(self, step: int) -> float:
    """What the saved state has counted."""
    target = {"items": {"steps": jax.ShapeDtypeStruct((), np.float32)}}
    return float(self.manager.load_checkpointables(step, target)["items"]["steps"])

  def next_row(self) -> int:
    """The first row that a run which resumes from the newest checkpoint reads."""
    (file,) = (self.checkpoints / str(self.saved()[-1]) / "iter").glob("*.json")
    iterator = iter(self.read(100).dataloader)
    iterator.set_state(json.loads(file.read_text()))
    return int(next(iterator)["inputs"][0, 0])


def test_data_that_end_leave_a_checkpoint_of_the_last_step(tmp_path):
  run = Run(tmp_path, rows=8)
  end = end_of_data.handle_training_data_error(run.steps(), False)
  assert end == end_of_data.RunEnd(
    f"the data ended after 4 of steps=9; the checkpoint of the last step is {run.checkpoints}/3; to continue, start it "
    "again with num_epoch above 1, or set steps=4 for a run that ends here.",
    3,
  )
  assert run.saved() == [3]
  assert run.next_row() == 8
  assert run.steps_of(3) == 4


def test_a_second_start_changes_nothing(tmp_path):
  run = Run(tmp_path, rows=8)
  end_of_data.handle_training_data_error(run.steps(), False)
  again = Run(tmp_path, rows=0)
  end = end_of_data.handle_training_data_error(again.steps(start=4), False)
  assert end.status == 3
  assert end.sentence.startswith(
    f"the data have ended, and none of the 5 steps left of steps=9 were done; the checkpoint of the last step is "
    f"{run.checkpoints}/3; to continue,"
  )
  assert again.saved() == [3]


def test_a_checkpoint_of_the_last_step_is_not_written_twice(tmp_path):
  run = Run(tmp_path, rows=8, checkpoint_period=3, async_checkpointing=True)
  assert end_of_data.handle_training_data_error(run.steps(), False).status == 3
  assert run.saved() == [3]


def test_a_run_without_checkpoints(tmp_path):
  end = end_of_data.handle_training_data_error(Run(tmp_path, rows=8, enable_checkpointing=False).steps(), False)
  assert end == end_of_data.RunEnd(
    "the data ended after 4 of steps=9; nothing was saved, because enable_checkpointing=False; to continue, start it "
    "again with num_epoch above 1 and enable_checkpointing=True, or set steps=4 for a run that ends here.",
    3,
  )


def test_a_run_without_data(tmp_path):
  end = end_of_data.handle_training_data_error(Run(tmp_path, rows=1).steps(), False)
  assert end.status == 3
  assert (
    "none of the 9 steps left of steps=9 were done; there is no checkpoint, because no step was done" in end.sentence
  )


def test_a_checkpoint_that_cannot_be_written(tmp_path):
  def refuse(*_, **__):
    raise OSError(28, "No space left on device")

  run = Run(tmp_path, rows=8)
  run.manager = types.SimpleNamespace(checkpoints=[], latest=None, save_checkpointables=refuse, wait=lambda: None)
  end = end_of_data.handle_training_data_error(run.steps(), False)
  assert end == end_of_data.RunEnd(
    f"the data ended after 4 of steps=9; {run.checkpoints}/3: the checkpoint of the last step cannot be written "
    "(OSError: [Errno 28] No space left on device).",
    2,
  )


def test_a_number_of_epochs_that_was_asked_for_is_no_fault(tmp_path):
  file = tmp_path / "epochs.yml"
  file.write_text(f"base_config: {runs.RUN_YML}\nnum_epoch: 2\n")
  further = tmp_path / "further.yml"
  further.write_text("num_epoch: 2\n")
  for argv in (("train.py", str(file)), (*MODEL, "num_epoch=2"), (*MODEL, str(further), "steps=9")):
    run = Run(tmp_path, rows=8, enable_checkpointing=False, num_epoch=2)
    end = end_of_data.handle_training_data_error(run.steps(), end_of_data.sets_num_epoch(argv))
    assert end.status == 0
    assert end.sentence.startswith("the data ended after 4 of steps=9, as num_epoch=2 asks; ")


@pytest.mark.parametrize("period", (100, 2))
def test_data_that_cannot_be_read(period, tmp_path):
  """The checkpoint's place is before the batch that could not be read, whose first rows were read."""
  run = Run(tmp_path, rows=20, broken=9, checkpoint_period=period)
  end = end_of_data.handle_training_data_error(run.steps(), False)
  assert end.status == 2
  assert "row 9 is broken" in end.sentence
  assert end.sentence.endswith(f"; 4 of steps=9 were done; the checkpoint of the last step is {run.checkpoints}/3.")
  assert run.saved()[-1] == 3
  assert run.next_row() == 8


def test_evaluation_data_that_cannot_be_read(tmp_path):
  run = Run(tmp_path, rows=20)
  error = run.steps(evaluation=run.read(20, broken=3))
  assert end_of_data.handle_training_data_error(error, False) is None
  end = end_of_data.handle_evaluation_data_error(error)
  assert end.status == 2
  assert "row 3 is broken" in end.sentence
  assert end.sentence.endswith(f"; 2 of steps=9 were done; the checkpoint of the last step is {run.checkpoints}/1.")
  assert run.saved() == [1]
  assert run.next_row() == 4
  assert run.steps_of(1) == 2


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
  """Eight rows: four batches of tests/run.yml."""
  file = tmp_path_factory.mktemp("rows") / "rows.parquet"
  pa.parquet.write_table(pa.table({"text": [f"{i}{'some words ' * 9}" for i in range(8)]}), file)
  return f"grain_train_files={file}"


def launch(output: pathlib.Path, run_name: str, *overrides: str) -> subprocess.CompletedProcess:
  command = runs.command(runs.LAUNCHER, runs.RUN_YML, output, run_name, "checkpoint_period=100", *overrides)
  return subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True)


def test_the_process_of_a_run_whose_data_end(rows, tmp_path):
  finished = launch(tmp_path, "r", rows, "steps=6")
  assert finished.returncode == 3, finished.stderr[-4000:]
  assert "Traceback" not in finished.stderr
  (sentence,) = [line for line in finished.stderr.splitlines() if line.startswith("maxtext-mudd: ")]
  assert sentence.startswith(
    f"maxtext-mudd: the data ended after 4 of steps=6; the checkpoint of the last step is {tmp_path}/r/checkpoints/3; "
  )
  assert sorted(entry.name for entry in (tmp_path / "r" / "checkpoints").iterdir()) == ["0", "3"]
  assert sorted(runs.losses(tmp_path / "r")) == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("workers", (0, 1))
def test_a_run_whose_data_ended_continues_with_more_epochs(workers, rows, tmp_path):
  keys = (rows, "steps=6", f"grain_worker_count={workers}")
  whole = runs.train(runs.LAUNCHER, runs.RUN_YML, tmp_path, "whole", *keys, "num_epoch=2")
  for _ in range(2):  # a second start does the same
    assert launch(tmp_path, "r", *keys).returncode == 3
  for events in (tmp_path / "r").rglob("events.out.*"):
    events.unlink()  # what is read below was written by the last process
  losses = runs.train(runs.LAUNCHER, runs.RUN_YML, tmp_path, "r", *keys, "num_epoch=2")
  assert losses == {step: whole[step] for step in (4, 5)}


def test_epochs_are_asked_for_beside_flags_of_abseil(monkeypatch):
  assert not end_of_data.sets_num_epoch((*MODEL, "--alsologtostderr"))
  assert end_of_data.sets_num_epoch((*MODEL, "--alsologtostderr", "num_epoch=1"))
  monkeypatch.setenv("M_NUM_EPOCH", "2")
  assert end_of_data.sets_num_epoch(MODEL)


def test_other_errors_are_left():
  try:
    raise RuntimeError("of another kind")
  except RuntimeError as error:
    assert end_of_data.handle_training_data_error(error, False) is None
    assert end_of_data.handle_evaluation_data_error(error) is None
  assert end_of_data.handle_training_data_error(None, False) is None
