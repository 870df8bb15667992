"""Scaling fits, on losses with a known law."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from maxtext_mudd.config.errors import ConfigError
from tests import runs

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import scaling
import study
import study_plan


def law(factor, exponent, noise=0.0, seeds=range(3)):
  """Points of L = factor·C^(-exponent) at three sizes, with multiplicative noise of a seed."""
  random = np.random.default_rng(1)
  return [
    scaling.Point(size, seed, compute, factor * compute**-exponent * np.exp(noise * random.standard_normal()))
    for size, compute in (("s", 1e15), ("m", 4e15), ("l", 2e16))
    for seed in seeds
  ]


def interval(plain, connected):
  return scaling.intervals({"plain": plain, "MUDD": connected})["MUDD"]


def test_a_known_law_is_recovered():
  fitted = scaling.fit({"plain": law(40.0, 0.08), "MUDD": law(38.0, 0.08)})
  # The points are exact, so float64 rounding alone is left; the errors seen are 4.4e-15, and 2.7e-14 of the power.
  np.testing.assert_allclose([*fitted.factors.values(), fitted.exponent], [40, 38, 0.08], rtol=4e-14)
  np.testing.assert_allclose(fitted.multiplier("MUDD"), (40 / 38) ** (1 / 0.08), rtol=2.5e-13)


def test_the_multiplier_is_the_compute_at_equal_loss():
  fitted = scaling.fit({"plain": law(40.0, 0.08), "MUDD": law(38.0, 0.08)})
  loss = fitted.loss("MUDD", 1e16)
  # A few roundings of float64, 1.1e-16 each.
  np.testing.assert_allclose(fitted.loss("plain", 1e16 * fitted.multiplier("MUDD")), loss, rtol=1e-15)


def test_several_series_are_compared_with_the_first():
  """As in the paper's Figs. 3 to 5: four lines, of which three have a multiplier of their own."""
  factors = {"dense": 40.0, "dense, MUDD": 39.0, "MoE": 37.0, "MoE, MUDD": 35.5}
  series = {name: law(factor, 0.08) for name, factor in factors.items()}
  fitted, bounds = scaling.fit(series), scaling.intervals(series)
  expected = {name: (40 / factor) ** (1 / 0.08) for name, factor in factors.items()}
  np.testing.assert_allclose([fitted.multiplier(name) for name in series], [*expected.values()], rtol=1e-12)
  assert list(bounds) == ["dense, MUDD", "MoE", "MoE, MUDD"]
  for name, found in bounds.items():
    np.testing.assert_allclose([found.low, found.high], expected[name], rtol=1e-10)


def test_the_interval_is_that_of_single_seeds():
  """Seeds whose multipliers are known: Student's t of their logarithms."""
  multipliers = [1.5, 1.8, 2.0]

  def of_seed(factor, seed):
    return law(factor, 0.08, seeds=[seed])

  plain = [point for seed in range(3) for point in of_seed(40.0, seed)]
  connected = [x for seed, m in enumerate(multipliers) for x in of_seed(40.0 * m**-0.08, seed)]
  found = interval(plain, connected)
  np.testing.assert_allclose([*found.multipliers.values()], multipliers, rtol=1e-12)
  logarithms = np.log(multipliers)
  half = 4.302653 * logarithms.std(ddof=1) / 3**0.5  # the t of two degrees of freedom, to 6e-8
  np.testing.assert_allclose(np.log([found.low, found.high]), logarithms.mean() + np.array([-half, half]), rtol=5e-7)
  assert str(found) == f"95% interval {found.low:.2f} to {found.high:.2f}, from 3 seeds with 1.50, 1.80, 2.00"


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
  truth, hits = np.log((40 / 38) ** (1 / 0.08)), 0
  random = np.random.default_rng(3)
  for _ in range(200):
    points = []
    for factor in (40.0, 38.0):
      exact = law(factor, 0.08)
      noise = np.exp(0.002 * random.standard_normal(len(exact)))
      points.append([dataclasses.replace(x, loss=x.loss * n) for x, n in zip(exact, noise)])
    found = interval(*points)
    hits += np.log(found.low) <= truth <= np.log(found.high)
  assert 180 <= hits < 200  # 190 expected, with a standard deviation of 3


def test_one_seed_has_no_interval():
  assert str(interval(law(40.0, 0.08, seeds=[1]), law(38.0, 0.08, seeds=[1]))) == "one seed, so no interval"


def test_an_interval_needs_a_common_seed():
  with pytest.raises(ConfigError, match="finished runs of no common seed"):
    interval(law(40.0, 0.08, seeds=[0, 1]), law(38.0, 0.08, seeds=[2, 3]))


def test_a_seed_whose_loss_rises_is_named():
  plain, connected = (law(factor * 1e-3, -0.08, seeds=[0]) + law(factor, 0.1, seeds=[1]) for factor in (40.0, 38.0))
  with pytest.raises(ConfigError, match=r"seed 0 alone: .*loss does not fall with compute"):
    interval(plain, connected)


def test_an_exponent_of_almost_zero_gives_an_infinite_multiplier():
  assert scaling.Fit({"plain": 40.0, "MUDD": 38.0}, 1e-6).multiplier("MUDD") == np.inf


def test_too_few_sizes_are_refused():
  one = [point for point in law(40.0, 0.08) if point.size == "s"]
  with pytest.raises(ConfigError, match="MUDD has results of fewer than two sizes"):
    scaling.fit({"plain": law(40.0, 0.08), "MUDD": one})


def test_loss_that_rises_with_compute_is_refused():
  with pytest.raises(ConfigError, match="does not fall with compute"):
    scaling.fit({"plain": law(1.0, -0.05), "MUDD": law(0.9, -0.05)})


PLAN = {
  "config": "model.yml",
  "tokens": 1000,
  "unit": "nats per token",
  "seeds": [0, 1],
  "learning_rates": [0.001, 0.003],
  "baseline": "plain_s",
  "models": {name: {"keys": {"width": name}} for name in ("plain_s", "plain_l", "mudd_s", "mudd_l", "mudd_xl")},
}


def write_study(folder):
  """A study, and results of all its cells but those of mudd_xl; its file and the results."""
  (folder / "model.yml").write_text("per_device_batch_size: 2\nmax_target_length: 5\n")
  (folder / "plan.yml").write_text(json.dumps(PLAN))
  results = study.Results(folder / "results.jsonl")
  for cell in study_plan.cells(study_plan.read(folder / "plan.yml"), folder, {}):
    if cell.model != "mudd_xl":
      tflops = 1e3 if cell.model.endswith("_s") else 1e4
      loss = (38.0 if "mudd" in cell.model else 40.0) * (tflops * 100) ** -0.08 + (cell.learning_rate == 0.001)
      row = {"kind": "cell", "cell": cell.name, "fingerprint": cell.fingerprint, "dead": None, "steps_done": 100}
      row |= {"model": cell.model, "seed": cell.seed, "tflops_per_step": tflops, "held_out": {"99": loss}}
      results.append(row)
  return folder / "plan.yml", results


def test_points_are_of_the_better_learning_rate_and_of_the_present_study(tmp_path):
  path, results = write_study(tmp_path)
  plan = study_plan.read(path)
  cells = study_plan.cells(plan, tmp_path, {})
  small, large = 40 * 1e5**-0.08, 40 * 1e6**-0.08
  expected = [scaling.Point("plain_s", 0, 1e17, small), scaling.Point("plain_s", 1, 1e17, small)]
  expected += [scaling.Point("plain_l", 0, 1e18, large), scaling.Point("plain_l", 1, 1e18, large)]
  assert scaling.points(plan, cells, results, ["plain_s", "plain_l"]) == expected
  changed = PLAN["models"] | {"plain_l": {"keys": {"width": "another"}}}
  path.write_text(json.dumps(PLAN | {"models": changed}))
  plan = study_plan.read(path)
  cells = study_plan.cells(plan, tmp_path, {})
  assert scaling.points(plan, cells, results, ["plain_s"]) == expected[:2]
  with pytest.raises(ConfigError, match="plain_l has no finished run in"):
    scaling.points(plan, cells, results, ["plain_s", "plain_l"])


def test_models_that_the_study_lacks_are_refused(tmp_path):
  path, results = write_study(tmp_path)
  with pytest.raises(ConfigError, match="plain is not a model of the study; those are plain_s, plain_l, mudd_s,"):
    scaling.points(study_plan.read(path), study_plan.cells(study_plan.read(path), tmp_path, {}), results, ["plain"])


def test_the_command(tmp_path, monkeypatch, capsys):
  path, results = write_study(tmp_path)
  monkeypatch.setattr(sys, "argv", [str(runs.ROOT / "benchmarks" / "scaling.py")])  # which the written facts name
  files = ["--study", str(path), "--results", str(results.path), "--output", str(tmp_path / "fit")]
  scaling.main([*files, "plain=plain_s,plain_l", "MUDD=mudd_s,mudd_l"])
  text = (tmp_path / "fit.md").read_text()
  per_tflop = 1e12**0.08  # the losses above are of TFLOPs, a is of FLOPs
  assert f"| plain | {40 * per_tflop:.3f} | 0.0800 | 1 |" in text
  assert f"| MUDD | {38 * per_tflop:.3f} | 0.0800 | **{(40 / 38) ** (1 / 0.08):.2f}** | 95% interval" in text
  assert "from 2 seeds with" in text
  assert "held-out nats per token" in text
  assert "![Fit](fit.png)" in text
  assert capsys.readouterr().out.strip() in text
  assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
  with pytest.raises(SystemExit, match="maxtext-mudd: mudd_xl has no finished run in"):
    scaling.main([*files, "plain=plain_s,plain_l", "MUDD=mudd_s,mudd_xl"])


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["plain=a,b"], "plain is a single series"),
    (["plain=a,b", "plain=c,d"], "there are two series plain"),
    (["plain_64,plain_96", "MUDD=c,d"], "'plain_64,plain_96' is not a series; write NAME=MODEL,MODEL"),
    (["plain=", "MUDD=c,d"], "'plain=' is not a series"),
  ],
)
def test_bad_series_are_refused(arguments, message):
  with pytest.raises(ConfigError, match=message):
    scaling.read_series(arguments)
