"""The table of costs in the report of a study, on made-up results."""

import json
import math
import sys

import pytest

from maxtext_mudd.config.errors import ConfigError
from tests import runs

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import study
import study_plan
import study_report

PLAN = {
  "config": "model.yml",
  "tokens": 1000,
  "seeds": [0, 1],
  "learning_rates": [0.003],
  "baseline": "plain",
  "models": {name: {} for name in ("plain", "wider", "dense", "slow")} | {"longer": {"tokens": 4000}},
  "references": {"time": ["plain", "longer"], "parameters": ["plain", "wider"]},
}
LOSSES = {"plain": [2.0, 2.2], "longer": [1.8, 2.0], "wider": [1.9, 2.1], "dense": [1.7, 1.92], "slow": [1.5, 1.7]}
SIZES = {"plain": 1000, "longer": 1000, "wider": 1210, "dense": 1100, "slow": 2000}


def write(tmp_path, plan=PLAN, dead=()):
  (tmp_path / "model.yml").write_text("per_device_batch_size: 2\nmax_target_length: 5\n")
  plan = study_plan.Study(**plan)
  results = study.Results(tmp_path / "study-plan.jsonl")
  cells = study_plan.cells(plan, tmp_path, {})
  for cell in cells:
    row = {"kind": "cell", "cell": cell.name, "fingerprint": cell.fingerprint, "model": cell.model, "seed": cell.seed}
    row |= {"dead": "it ended" if cell.model in dead else None, "held_out": {"9": LOSSES[cell.model][cell.seed]}}
    row |= {"train": {"9": 5.0}, "parameters": SIZES[cell.model], "tokens_per_second": 50.0, "commit": "abc"}
    row |= {"steps_done": 400 if cell.model == "longer" else 100, "learning_rate": cell.learning_rate}
    results.append(row | {"largest_gradient_norm": 3.0, "cpu": "a CPU", "cores": 1})
  quartiles = {"lower_quartile": 1.0, "upper_quartile": 3.0}
  for model, ratio, size in (("dense", 1.5, 90), ("dense", 2.0, 120), ("slow", 5.0, 300)):
    timing = {"kind": "timing", "model": model, "against": "plain", "ratio": {"median": ratio} | quartiles}
    results.append(timing | {"bytes": [100, size]})
  return study_report.write(plan, cells, results, tmp_path / "plan.yml")


def row(text, model):
  (line,) = [x for x in text.split("| step time |")[1].splitlines() if x.startswith(f"| {model} |")]
  return [x.strip() for x in line.strip("|").split("|")]


def test_a_plain_model_of_the_same_cost_is_interpolated(tmp_path):
  """A model that takes twice as long as plain, half way to one of four times the steps; and has 1.1 times the
  parameters, half way to 1.21 times."""
  text = write(tmp_path)
  # 1.7 - 1.9 and 1.92 - 2.1: -0.20 and -0.18; 1.7 - 1.95 and 1.92 - 2.15: -0.25 and -0.23.
  half_width = 12.7062 * 0.01  # the t of one degree of freedom, times the standard error
  assert half_width == pytest.approx(study_report.Difference.of([-0.20, -0.18]).half_width, rel=1e-5)
  interval = f"± {half_width:.4f}"
  assert row(text, "dense") == [
    "dense",
    "0.003",
    "1.1000",
    "2.00",
    "1.20",
    f"-0.1900 {interval}",
    f"-0.2400 {interval}",
  ]
  assert row(text, "slow") == ["slow", "0.003", "2.0000", "5.00", "3.00", "", ""], "no plain model costs as much"
  assert "interpolated between `plain`, `longer` and `plain`, `wider`" in " ".join(text.split())


@pytest.mark.parametrize("model", ["dense", "longer"])
def test_runs_that_diverged_have_no_difference(model, tmp_path):
  assert row(write(tmp_path, dead=(model,)), "dense")[5] == ""


def test_one_seed_has_no_interval(tmp_path):
  assert row(write(tmp_path, PLAN | {"seeds": [1]}), "dense")[5:] == ["-0.1800", "-0.2300"]


@pytest.mark.parametrize("names", [["plain"], ["longer", "plain"], []])
def test_references_that_cannot_be_interpolated(names, tmp_path):
  (tmp_path / "plan.yml").write_text(json.dumps(PLAN | {"references": {"time": names}}))
  with pytest.raises(ConfigError) as refused:
    study_plan.read(tmp_path / "plan.yml")
  assert str(refused.value) == (
    f"{tmp_path}/plan.yml: references.time={names}: name the baseline, plain, first, and other plain models."
  )


def test_all_models_of_a_study_with_references_are_timed(tmp_path, monkeypatch):
  (tmp_path / "model.yml").write_text("per_device_batch_size: 2\nmax_target_length: 5\n")
  results = study.Results(tmp_path / "study-plan.jsonl")
  monkeypatch.setattr(study, "step_costs", lambda first, second, rounds: ([(1.0, 2.0), (1.0, 4.0)], [10, 20]))
  study.time_all(study_plan.Study(**PLAN), tmp_path, results, 2)
  assert [(x["model"], x["against"], x["ratio"]["median"], x["bytes"]) for x in results.rows()] == [
    ("dense", "plain", 3.0, [10, 20]),
    ("slow", "plain", 3.0, [10, 20]),
  ]
  assert math.isfinite(results.ratios()["slow"])
