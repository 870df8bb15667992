"""Fits loss against compute for plain and connected models of several sizes, and computes the compute multiplier.

    .venv/bin/python benchmarks/scaling.py --study yaml/study/size.yml --plain plain_64,plain_96,plain_128 \\
      --connected mudd_64,mudd_96,mudd_128

The compute multiplier is the factor by which the compute of the plain model must grow to reach the loss of the
connected one. Loss is modelled as L = a·C^(-b), a straight line in logarithms, with one exponent b for both kinds of
model. Their lines are therefore parallel, as in the paper's Fig. 3, and the multiplier is one number.

C is training compute: MaxText's count of the FLOPs of a step on one device, connections included, times the number of
steps. All runs need the same number of devices. The interval of the multiplier comes from a fit for each seed, by
Student's t of their logarithms. Only results of runs with the present keys of the study are used, and none that
diverged.

The tool writes NAME.md and NAME.png to benchmarks/results/.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import pathlib
import sys

import numpy as np
import record
import scipy.stats
import study
import study_plan
import study_report

from maxtext_mudd.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Point:
  """One trained model.

  Attributes:
    size: name of the model.
    seed: its seed.
    compute: training compute, in FLOPs of one device.
    loss: held-out loss, in the unit of the study.
  """

  size: str
  seed: int
  compute: float
  loss: float


@dataclasses.dataclass(frozen=True)
class Fit:
  """L = a·C^(-exponent), with one exponent for both kinds of model.

  Attributes:
    plain: a of the plain models.
    connected: a of the connected models.
    exponent: the exponent.
  """

  plain: float
  connected: float
  exponent: float

  @property
  def multiplier(self) -> float:
    """Compute of the plain model over that of the connected one, at equal loss."""
    with np.errstate(over="ignore"):  # infinite if the exponent is almost zero, as in a few bootstrap samples
      return float(np.float64(self.plain / self.connected) ** (1 / self.exponent))

  def loss(self, compute, kind: str):
    """The loss of a kind of model, "plain" or "connected", by the fit."""
    return getattr(self, kind) * np.asarray(compute) ** -self.exponent


def fit(plain: Sequence[Point], connected: Sequence[Point]) -> Fit:
  """The least-squares fit in logarithms.

  Raises:
    ConfigError: a kind has fewer than two sizes, or loss does not fall with compute.
  """
  for name, points in (("plain", plain), ("connected", connected)):
    if len({point.size for point in points}) < 2:
      raise ConfigError(f"--{name} has results of fewer than two sizes; a line needs at least two.")
  points = [*plain, *connected]
  design = np.zeros((len(points), 3))
  design[: len(plain), 0] = design[len(plain) :, 1] = 1
  design[:, 2] = -np.log([point.compute for point in points])
  (a, b, exponent), *_ = np.linalg.lstsq(design, np.log([point.loss for point in points]), rcond=None)
  if exponent <= 0:
    raise ConfigError(f"the fitted exponent is {exponent:.4f}: loss does not fall with compute in these results.")
  return Fit(float(np.exp(a)), float(np.exp(b)), float(exponent))


@dataclasses.dataclass(frozen=True)
class Interval:
  """The 95% interval of the compute multiplier.

  Attributes:
    low: lower end; NaN for one seed.
    high: upper end; NaN for one seed.
    multipliers: that of the fit to each seed, by seed.
  """

  low: float
  high: float
  multipliers: dict[int, float]

  def __str__(self) -> str:
    each = ", ".join(f"{x:.2f}" for x in self.multipliers.values())
    if len(self.multipliers) == 1:
      return "one seed, so no interval"
    return f"95% interval {self.low:.2f} to {self.high:.2f}, from {len(self.multipliers)} seeds with {each}"


def interval(plain: Sequence[Point], connected: Sequence[Point]) -> Interval:
  """The interval, by Student's t of the logarithms of the multipliers of single seeds.

  Raises:
    ConfigError: no seed is shared, or the points of a seed have no fit.
  """
  seeds = sorted({point.seed for point in plain} & {point.seed for point in connected})
  if not seeds:
    raise ConfigError("--plain and --connected have finished runs of no common seed; an interval needs one at least.")
  multipliers = {}
  for seed in seeds:
    try:
      multipliers[seed] = fit(*([x for x in points if x.seed == seed] for points in (plain, connected))).multiplier
    except ConfigError as error:
      raise ConfigError(f"seed {seed} alone: {error}") from error
  logarithms = np.log([*multipliers.values()])
  if len(seeds) == 1:
    return Interval(np.nan, np.nan, multipliers)
  half = scipy.stats.t.ppf(0.975, len(seeds) - 1) * logarithms.std(ddof=1) / len(seeds) ** 0.5
  return Interval(*(float(np.exp(logarithms.mean() + sign * half)) for sign in (-1, 1)), multipliers)


def points(
  plan: study_plan.Study, cells: Sequence[study_plan.Cell], results: study.Results, models: Sequence[str]
) -> list[Point]:
  """The finished runs of some models that did not diverge. Of several learning rates, the one with the lowest mean loss
  counts.

  Raises:
    ConfigError: one of the models is not in the study, or has no finished run.
  """
  chosen, summaries = [], study_report.summarise(plan, cells, results)
  for model in models:
    if model not in (known := list(dict.fromkeys(cell.model for cell in cells))):
      raise ConfigError(f"{model} is not a model of the study; those are {', '.join(known)}.")
    of_rates = []
    for summary in summaries:
      if summary.model == model and summary.losses:
        compute = {row["seed"]: row["tflops_per_step"] * 1e12 * row["steps_done"] for row in summary.rows}
        of_rates.append([Point(model, seed, compute[seed], loss) for seed, loss in summary.losses.items()])
    if not of_rates:
      raise ConfigError(f"{model} has no finished run in {results.path}; run the study, or leave the model out.")
    chosen += min(of_rates, key=lambda ps: np.mean([point.loss for point in ps]))
  return chosen


def draw(plain: list[Point], connected: list[Point], fitted: Fit, unit: str, path: pathlib.Path) -> None:
  """Draws the points and the fitted lines."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
  span = np.geomspace(min(p.compute for p in plain + connected), max(p.compute for p in plain + connected), 50)
  for kind, runs, color in (("plain", plain, "tab:blue"), ("connected", connected, "tab:orange")):
    axes.plot([p.compute for p in runs], [p.loss for p in runs], "o", color=color, label=kind)
    axes.plot(span, fitted.loss(span, kind), color=color, linewidth=1)
  axes.set(xscale="log", yscale="log", xlabel="training compute, FLOPs", ylabel=f"held-out {unit}")
  axes.set_title(f"compute multiplier {fitted.multiplier:.2f}")
  axes.grid(alpha=0.3, which="both")
  axes.legend()
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def _exponent(points: Sequence[Point]) -> float:
  """The exponent of one kind of model alone."""
  slope, _ = np.polyfit(np.log([x.compute for x in points]), np.log([x.loss for x in points]), 1)
  return -float(slope)


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--study", required=True, type=pathlib.Path, help="yaml/study/NAME.yml")
  parser.add_argument("--results", type=pathlib.Path, help="default: benchmarks/results/study-NAME.jsonl")
  parser.add_argument("--plain", required=True, help="names of the plain models, comma-separated")
  parser.add_argument("--connected", required=True, help="names of the connected models, comma-separated")
  parser.add_argument("--output", help="name of the results; default: scaling-NAME")
  options = parser.parse_args(arguments)
  try:
    plan, results = study_plan.read(options.study), study.results_of(options.study, options.results)
    if not results.path.is_file():
      raise ConfigError(f"{results.path}: there is no such file; name one that benchmarks/study.py wrote.")
    cells = study_plan.cells(plan, options.study.parent, results.ratios())
    plain, connected = (points(plan, cells, results, names.split(",")) for names in (options.plain, options.connected))
    fitted, bounds = fit(plain, connected), interval(plain, connected)
  except ConfigError as error:
    sys.exit(f"maxtext-mudd: {error}")
  name = options.output or f"scaling-{options.study.stem}"
  columns = ["model", "seed", "FLOPs", f"held-out {plan.unit}"]
  table = [[p.size, str(p.seed), f"{p.compute:.3e}", f"{p.loss:.4f}"] for p in (*plain, *connected)]
  text = (
    f"L = a·C^(-{fitted.exponent:.4f}); a is {fitted.plain:.3f} for the plain and {fitted.connected:.3f} for the "
    f"connected models. **Compute multiplier: {fitted.multiplier:.2f}** ({bounds}). Fitted apart, the exponents are "
    f"{_exponent(plain):.4f} and {_exponent(connected):.4f}.\n\n"
    f"{record.table(columns, table)}\n![Fit]({pathlib.Path(name).name}.png)\n"
  )
  place = record.write(name, record.facts("those of the study's results", "machines", ["numpy"]), text, table)
  draw(plain, connected, fitted, plan.unit, place.with_name(f"{place.name}.png"))
  print(text)


if __name__ == "__main__":
  main(sys.argv[1:])
