"""The warning of a run that resumes while its training data start again."""

import pathlib

import pytest

from maxtext_mudd.runs import data_position
from tests import models


def warnings(folder: pathlib.Path, caplog, *entries: str, **overrides) -> list[str]:
  """What is logged of a run whose checkpoints hold these folders."""
  checkpoints = folder / "r" / "checkpoints"
  for entry in entries:
    (checkpoints / entry).mkdir(parents=True)
  data = {"hf_path": "text", "hf_train_files": "x", "grain_train_files": "x", "enable_checkpointing": True}
  config = models.config(run_name="r", base_output_directory=str(folder), **(data | overrides))
  caplog.clear()
  data_position.warn_on_resume(config)
  return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("dataset_type", ("hf", "tfds", "c4_mlperf"))
def test_data_that_keep_no_place(dataset_type, tmp_path, caplog):
  entries = ("3/items", "20/items", "40.orbax-checkpoint-tmp/items")
  assert warnings(tmp_path, caplog, *entries, dataset_type=dataset_type) == [
    "This run resumes at step 21, and its training data start again from their first row: "
    f"dataset_type={dataset_type} saves no position in the data; dataset_type=grain does."
  ]


def test_a_checkpoint_without_a_place(tmp_path, caplog):
  assert warnings(tmp_path, caplog, "3/iter", "20/items", dataset_type="grain") == [
    "This run resumes at step 21, and its training data start again from their first row: "
    f"{tmp_path}/r/checkpoints/20 holds no position in the data; checkpoints that dataset_type=grain writes do."
  ]


def test_runs_that_continue_or_start_are_not_warned(tmp_path, caplog):
  assert not warnings(tmp_path / "a", caplog, "3/items", "20/iter", dataset_type="grain")
  assert not warnings(tmp_path / "b", caplog, "20/items", dataset_type="synthetic")
  assert not warnings(tmp_path / "c", caplog, dataset_type="hf")
  assert not warnings(tmp_path / "d", caplog, "20/items", dataset_type="hf", enable_checkpointing=False)
