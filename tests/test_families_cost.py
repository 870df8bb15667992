"""benchmarks/families.py: floors by hand, options that cannot work, and a run of two models."""

import json
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))

import families

from tests import models, runs

SCRIPT = runs.ROOT / "benchmarks" / "families.py"


@pytest.mark.parametrize(
  ("keys", "units"),
  [
    ({"mudd": False}, 0),
    # Three blocks: aggregates of 2 and 3 sources with four streams, and of 4 sources with one.
    ({}, 4 * (2 + 3 + 4) + 3 * (4 + 4 + 1)),
    ({"depth_connection": "mhc"}, 6 * (5 * 4 - 2)),
    ({"depth_connection": "attnres", "mudd_attnres_block": 3}, 4 * (1 + 2 + 2 + 2 + 3 + 3 + 3) + 3 * 7),
    ({"depth_connection": "dca"}, 4 * (1 + 2 + 3 + 4) + 3 * (3 + 3 + 3 + 1)),
  ],
)
def test_floors(keys, units):
  assert families.floor_units(models.config(**({"mudd": True} | keys))) == units


def test_shares_of_buffers():
  """Three blocks read 1, 2 and 3 of four sources; six sublayers 1, 2, 2, 2, 3 and 3 of three."""
  assert families.buffer_of(models.config(mudd=True)) == (4, 0.5)
  assert families.buffer_of(models.config(mudd=True, depth_connection="dca")) == (4, 0.5)
  found = families.buffer_of(models.config(mudd=True, depth_connection="attnres", mudd_attnres_block=3))
  assert found == (3, pytest.approx(13 / 18))
  assert families.buffer_of(models.config(mudd=True, depth_connection="mhc")) is None


@pytest.mark.parametrize(
  ("options", "sentence"),
  [
    (["--families", "plain,mud"], "'mud' is unknown; use some of plain, MUDD, "),
    (["--models", "1b"], "'1b' is unknown; use some of 405m, 2p8b."),
    (["--run", "--families", "MUDD"], "--families leaves out plain, which the others are compared with."),
    (["--layers", "0"], "--layers is 0; at least 1 is needed."),
  ],
)
def test_options_that_cannot_work(options, sentence):
  finished = subprocess.run([sys.executable, SCRIPT, *options], cwd=runs.ROOT, capture_output=True, text=True)
  assert finished.returncode == 2
  assert finished.stderr.startswith(sentence)


@pytest.mark.slow
def test_models_run_in_turn(tmp_path):
  options = ["--run", "--families", "plain,k-DCA", "--layers", "4", "--rounds", "2", "--steps", "1"]
  output = tmp_path / "families"
  finished = subprocess.run(
    [sys.executable, SCRIPT, *options, "--output", str(output)], cwd=runs.ROOT, capture_output=True, text=True
  )
  assert finished.returncode == 0, finished.stderr[-2000:]
  rows = json.loads(output.with_name("families.json").read_text())["rows"]
  assert [row["family"] for row in rows] == ["plain", "k-DCA"]
  assert rows[0]["ratios"] == [1.0, 1.0] and all(x > 0 for x in rows[1]["ratios"])
  assert 0 < abs(rows[0]["last_loss"] - rows[1]["last_loss"]) < 0.5
