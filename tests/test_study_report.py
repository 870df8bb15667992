"""The report of a study, on made-up results with known statistics."""

import math
import sys

import numpy as np
import pytest

from maxtext_mudd.config.errors import ConfigError
from tests import runs

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import study
import study_plan
import study_report

PLAN = study_plan.Study(
  config="model.yml",
  tokens=1000,
  seeds=[0, 1, 2],
  learning_rates=[0.003],
  baseline="plain",
  models={"plain": {"paper": 12.0}, "better": {"paper": 11.0}, "same": {}, "broken": {}},
)
LOSSES = {
  "plain": [2.0, 2.1, 2.2],
  "better": [1.9, 1.99, 2.11],  # differences -0.10, -0.11, -0.09
  "same": [2.01, 2.08, 2.21],  # +0.01, -0.02, +0.01
  "broken": [2.0, 9.0, None],  # one that diverged, one that was not finite
}


@pytest.fixture
def report(tmp_path):
  (tmp_path / "model.yml").write_text("per_device_batch_size: 2\nmax_target_length: 5\n")
  results = study.Results(tmp_path / "study-plan.jsonl")
  cells = study_plan.cells(PLAN, tmp_path, {})
  for cell in cells:
    loss = LOSSES[cell.model][cell.seed]
    row = {"kind": "cell", "cell": cell.name, "fingerprint": cell.fingerprint, "model": cell.model, "seed": cell.seed}
    row |= {"dead": None if loss else "the loss of step 7 is not finite", "held_out": {"0": 8.0, "100": loss}}
    row |= {"train": {"9": 5.0, "19": loss}, "parameters": 1000, "tokens_per_second": 50.0, "commit": "abc"}
    row |= {"largest_gradient_norm": loss and 3.0, "cpu": "a CPU", "cores": 1, "learning_rate": cell.learning_rate}
    results.append(row)
  return PLAN, cells, results


def test_statistics(report):
  summaries = {x.model: x for x in study_report.summarise(*report)}
  better = summaries["better"].difference
  # float64: differences of 0.1 of losses of 2, and deviations of 0.01 of these; the error seen is 1e-14
  np.testing.assert_allclose([better.mean, better.deviation], [-0.1, 0.01], rtol=1e-13)
  # The t of two degrees of freedom, to the digits written here: 6e-8.
  np.testing.assert_allclose(better.half_width, 4.302653 * 0.01 / math.sqrt(3), rtol=5e-7)
  assert better.resolved
  assert not summaries["same"].difference.resolved
  assert summaries["plain"].difference is None


def test_dead_runs_are_counted_and_left_out_of_means(report):
  broken = next(x for x in study_report.summarise(*report) if x.model == "broken")
  assert broken.dead == [1, 2]
  assert broken.losses == {0: 2.0}


def test_a_model_with_dead_runs_has_no_difference(report):
  """The runs that are left would be the better ones."""
  broken = next(x for x in study_report.summarise(*report) if x.model == "broken")
  assert broken.pairs == [0]
  assert broken.difference is None
  text = study_report.write(*report, report[2].path.parent / "plan.yml")
  assert "| 1 of 3 |" in next(line for line in text.splitlines() if line.startswith("| broken"))


def test_divergence_is_measured_by_the_model_beside_it(report, tmp_path):
  """A deep plain model that is worse than the shallow one makes no run beside it diverge, nor hides one."""
  plan, cells, results = report
  models = {"plain": {}, "better": {}, "same": {"against": "plain"}, "broken": {"against": "same"}}
  plan = study_plan.Study(**plan.model_dump() | {"models": models})
  changed = study.Results(tmp_path / "deep.jsonl")
  finals = {"plain": [2.0, 2.0, 2.1], "better": [2.19, 2.21, 2.0], "same": [1.6, 1.5, 1.7], "broken": [1.7, 1.77, 1.75]}
  for row in results.rows():
    changed.append(row | {"dead": None, "held_out": {"100": finals[row["model"]][row["seed"]]}})
  summaries = {x.model: x for x in study_report.summarise(plan, cells, changed)}
  assert summaries["better"].dead == [1]  # above 1.1 times 2.0
  assert summaries["broken"].dead == [1]  # above 1.1 times 1.6
  assert study_report.groups(plan) == {"plain": ["plain", "better"], "same": ["same", "broken"]}
  text = study_report.write(plan, cells, changed, tmp_path / "plan.yml")
  outcomes = text.split("How many runs did not diverge")[1].splitlines()
  assert "| better | 2 of 3, 2.095 |" in outcomes
  assert "| same | 3 of 3, -0.433 |" in outcomes
  assert (tmp_path / "deep.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_is_its_own_measure_is_compared_with_none(report, tmp_path):
  """A smaller plain model: next to the baseline it would count as diverged."""
  plan, cells, results = report
  models = {"plain": {}, "better": {"against": "better"}, "same": {"against": "better"}, "broken": {}}
  plan = study_plan.Study(**plan.model_dump() | {"models": models})
  changed = study.Results(tmp_path / "sizes.jsonl")
  finals = {"plain": [2.0, 2.0, 2.1], "better": [3.0, 3.1, 3.0], "same": [2.8, 3.0, 2.9], "broken": [3.0, 3.0, 3.0]}
  for row in results.rows():
    changed.append(row | {"dead": None, "held_out": {"100": finals[row["model"]][row["seed"]]}})
  summaries = {x.model: x for x in study_report.summarise(plan, cells, changed)}
  assert [len(summaries[name].dead) for name in models] == [0, 0, 0, 3]
  assert summaries["better"].difference is None
  np.testing.assert_allclose(summaries["same"].difference.mean, -2 / 15, rtol=1e-13)
  assert study_report.groups(plan) == {"plain": ["plain", "broken"], "better": ["better", "same"]}


def test_further_comparisons(report, tmp_path):
  plan, cells, results = report
  plan = study_plan.Study(**plan.model_dump() | {"compare": [("better", "same"), ("same", "broken")]})
  text = study_report.write(plan, cells, results, tmp_path / "plan.yml")
  # differences -0.11, -0.09, -0.10
  assert "Further differences, with 95% intervals: `better` less `same`: -0.1000 ± 0.0248." in text


def test_runs_on_two_builds_of_the_corpus_are_not_paired(report, tmp_path):
  plan, cells, results = report
  mixed = study.Results(tmp_path / "mixed.jsonl")
  for row in results.rows():
    mixed.append(row | {"corpus": "b" if row["model"] == "same" or row["cell"] == "better-lr0.003-seed2" else "a"})
  summaries = {x.model: x.difference for x in study_report.summarise(plan, cells, mixed)}
  np.testing.assert_allclose([summaries["better"].mean, summaries["better"].deviation], [-0.105, 0.01 / 2**0.5])
  # Welch's t: variances of 0.01 and 0.0103 of three seeds each, whose degrees of freedom are 3.9991:
  # t = 2.7766, times 0.0822.
  assert not summaries["same"].paired
  found = [summaries["same"].mean, summaries["same"].half_width]
  np.testing.assert_allclose(found, [0, 0.228409], rtol=1e-4, atol=1e-12)
  text = study_report.write(plan, cells, mixed, tmp_path / "plan.yml")
  assert "+0.0000, not paired" in next(line for line in text.splitlines() if line.startswith("| same"))


def test_the_written_report(report, tmp_path):
  text = study_report.write(*report, tmp_path / "plan.yml")
  row = next(line for line in text.splitlines() if line.startswith("| better"))
  for cell in ("2.0000 ± 0.0608", "-0.1000", "± 0.0248", "0.0100", f"{math.log(11 / 12) / math.log(16):+.4f}", "3.00"):
    assert f"| {cell} |" in row, (cell, row)
  assert "or there is only one seed) for `same` at 0.003" in text
  assert "`better` at" not in text
  assert "not finite" in next(line for line in text.splitlines() if line.startswith("| broken"))
  assert (tmp_path / "study-plan.png").read_bytes().startswith(b"\x89PNG")
  assert (tmp_path / "study-plan.md").read_text() == text


def test_a_report_of_runs_from_elsewhere(report, tmp_path):
  plan, cells, results = report
  collected = study.Results(tmp_path / "collected.jsonl")
  for row in results.rows():
    collected.append(row | {"cpu": "elsewhere", "cores": None})
  assert "- machines: elsewhere\n" in study_report.write(plan, cells, collected, tmp_path / "plan.yml")


def test_a_report_of_part_of_a_study_says_so(report, tmp_path):
  plan, cells, _ = report
  part = study.Results(tmp_path / "part.jsonl")
  for row in report[2].rows()[:4]:
    part.append(row)
  text = study_report.write(plan, cells, part, tmp_path / "plan.yml")
  assert "**Not complete**: 8 of the study's runs have no result yet." in text


def test_a_study_without_results_has_no_report(report, tmp_path):
  plan, cells, _ = report
  with pytest.raises(ConfigError, match="has no results of this study"):
    study_report.write(plan, cells, study.Results(tmp_path / "none.jsonl"), tmp_path / "plan.yml")
  assert not (tmp_path / "none.png").exists()
