"""The summary that ends a run."""

import math

import pytest
from tensorboardX import SummaryWriter

from maxtext_mudd import report


def write(folder, losses, evals, speed=100.0):
  writer = SummaryWriter(str(folder / "tensorboard" / folder.name))
  for step, loss in enumerate(losses):
    writer.add_scalar(report.TRAIN_LOSS, loss, step)
    writer.add_scalar(report.SPEED, speed, step)
  for step, loss in evals.items():
    writer.add_scalar(report.EVAL_LOSS, loss, step)
  writer.close()
  return folder


@pytest.fixture
def two(tmp_path):
  plain = write(tmp_path / "plain", [3.0, 2.5, 2.0], {0: 3 * math.log(2), 2: 2 * math.log(2)})
  mudd = write(tmp_path / "mudd", [3.0, 2.4, 1.9], {0: 3 * math.log(2), 2: 1.5 * math.log(2)})
  return plain, mudd


def test_summary_of_one_run(two, capsys):
  report.main(["report", str(two[0])])
  printed = capsys.readouterr().out
  assert "first eval loss         3.0000 bits per byte (after step 1)" in printed
  assert "last eval loss          2.0000 bits per byte (after step 3)" in printed
  assert "100 tokens/s" in printed
  assert "next: make" in printed
  assert (two[0] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_comparison(two, capsys):
  report.main(["report", *map(str, two)])
  assert "after step 3: mudd -0.5000 bits per byte against plain" in capsys.readouterr().out
  assert (two[1] / "comparison.png").exists()


def test_later_events_win_and_a_half_written_one_is_left_out(two):
  (file,) = two[0].rglob("events.out.*")
  file.write_bytes(file.read_bytes()[:-3])
  write(two[0] / "resumed", [9.0], {2: math.log(2)})
  found = report.read_scalars(two[0])
  assert found[report.TRAIN_LOSS][0] == 9.0
  assert found[report.TRAIN_LOSS][1] == 2.5


def test_a_folder_without_events(tmp_path):
  with pytest.raises(SystemExit, match="no TensorBoard events with learning/loss"):
    report.main(["report", str(tmp_path)])


def test_runs_that_share_no_evaluation(two, tmp_path):
  other = write(tmp_path / "other", [1.0], {5: 1.0})
  with pytest.raises(SystemExit, match="were not evaluated after a common step"):
    report.main(["report", str(two[0]), str(other)])
