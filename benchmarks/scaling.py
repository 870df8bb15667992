"""Fits loss against compute for several series of models, each of several sizes, and computes compute multipliers.

    .venv/bin/python benchmarks/scaling.py --study yaml/study/size.yml \\
      plain=plain_48,plain_64,plain_96 MUDD=mudd_48,mudd_64,mudd_96

A series is a line of the picture: a kind of connection as in the paper's Fig. 3, a kind of connection at one depth as
in Fig. 4, or a dense or a MoE model with or without connections as in Fig. 5. The compute multiplier of a series is the
factor by which the compute of the first series must grow to reach the loss of this one.

Loss is modelled as L = a·C^(-b), a straight line in logarithms, with one exponent b for all series. Their lines are
therefore parallel, and a multiplier is one number. The table also has the exponent of each series alone: where these
differ much, the multiplier depends on the size.

C is training compute: MaxText's count of the FLOPs of a step on one device, connections included, times the number of
steps. All runs need the same number of devices. The interval of a multiplier comes from a fit for each seed, by
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
  """L = a·C^(-exponent), with one exponent for all series.

  Attributes:
    factors: a of each series.
    exponent: the exponent.
  """

  factors: dict[str, float]
  exponent: float

  def multiplier(self, series: str) -> float:
    """Compute of the first series over that of another one, at equal loss."""
    first = next(iter(self.factors.values()))
    with np.errstate(over="ignore"):  # infinite if the exponent is almost zero
      return float(np.float64(first / self.factors[series]) ** (1 / self.exponent))

  def loss(self, series: str, compute):
    """The loss of a series by the fit."""
    return self.factors[series] * np.asarray(compute) ** -self.exponent


def fit(series: dict[str, Sequence[Point]]) -> Fit:
  """The least-squares fit in logarithms.

  Raises:
    ConfigError: a series has fewer than two sizes, or loss does not fall with compute.
  """
  for name, points in series.items():
    if len({point.size for point in points}) < 2:
      raise ConfigError(f"{name} has results of fewer than two sizes; a line needs at least two.")
  points = [point for points in series.values() for point in points]
  of_series = np.repeat(np.eye(len(series)), [len(points) for points in series.values()], axis=0)
  design = np.column_stack([of_series, -np.log([point.compute for point in points])])
  (*factors, exponent), *_ = np.linalg.lstsq(design, np.log([point.loss for point in points]), rcond=None)
  if exponent <= 0:
    raise ConfigError(f"the fitted exponent is {exponent:.4f}: loss does not fall with compute in these results.")
  return Fit({name: float(np.exp(factor)) for name, factor in zip(series, factors)}, float(exponent))


@dataclasses.dataclass(frozen=True)
class Interval:
  """The 95% interval of a compute multiplier.

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


def intervals(series: dict[str, Sequence[Point]]) -> dict[str, Interval]:
  """The interval of each series but the first, by Student's t of the logarithms of the multipliers of single seeds.

  Raises:
    ConfigError: no seed is shared by all series, or the points of a seed have no fit.
  """
  seeds = sorted(set.intersection(*({point.seed for point in points} for points in series.values())))
  if not seeds:
    raise ConfigError(f"{', '.join(series)} have finished runs of no common seed; an interval needs one at least.")
  fits = {}
  for seed in seeds:
    try:
      fits[seed] = fit({name: [x for x in points if x.seed == seed] for name, points in series.items()})
    except ConfigError as error:
      raise ConfigError(f"seed {seed} alone: {error}") from error
  found = {}
  for name in list(series)[1:]:
    multipliers = {seed: fitted.multiplier(name) for seed, fitted in fits.items()}
    low = high = np.nan
    if len(seeds) > 1:
      logarithms = np.log([*multipliers.values()])
      half = scipy.stats.t.ppf(0.975, len(seeds) - 1) * logarithms.std(ddof=1) / len(seeds) ** 0.5
      low, high = (float(np.exp(logarithms.mean() + sign * half)) for sign in (-1, 1))
    found[name] = Interval(low, high, multipliers)
  return found


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


def draw(series: dict[str, list[Point]], fitted: Fit, unit: str, path: pathlib.Path) -> None:
  """Draws the points and the fitted lines."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
  compute = [point.compute for points in series.values() for point in points]
  span = np.geomspace(min(compute), max(compute), 50)
  for number, (name, points) in enumerate(series.items()):
    label = f"{name}: compute multiplier {fitted.multiplier(name):.2f}" if number else name
    axes.plot([p.compute for p in points], [p.loss for p in points], "o", color=f"C{number}", label=label)
    axes.plot(span, fitted.loss(name, span), color=f"C{number}", linewidth=1)
  axes.set(xscale="log", yscale="log", xlabel="training compute, FLOPs", ylabel=f"held-out {unit}")
  for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
    which("{x:g}")  # losses are of one order of magnitude
  axes.grid(alpha=0.3, which="both")
  axes.legend()
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def _exponent(points: Sequence[Point]) -> float:
  """The exponent of one series alone."""
  slope, _ = np.polyfit(np.log([x.compute for x in points]), np.log([x.loss for x in points]), 1)
  return -float(slope)


def read_series(arguments: Sequence[str]) -> dict[str, list[str]]:
  """The models of each series, from arguments NAME=MODEL,MODEL,...

  Raises:
    ConfigError: an argument has another form, a name occurs twice, or there are fewer than two series.
  """
  series = {}
  for argument in arguments:
    name, _, models = argument.partition("=")
    if not name or not models:
      raise ConfigError(f"{argument!r} is not a series; write NAME=MODEL,MODEL,... with models of the study.")
    if name in series:
      raise ConfigError(f"there are two series {name}; give them different names.")
    series[name] = models.split(",")
  if len(series) < 2:
    raise ConfigError(f"{', '.join(series)} is a single series; name two or more, the first to compare with.")
  return series


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--study", required=True, type=pathlib.Path, help="yaml/study/NAME.yml")
  parser.add_argument("--results", type=pathlib.Path, help="default: benchmarks/results/study-NAME.jsonl")
  parser.add_argument("--output", help="name of the results; default: scaling-NAME")
  parser.add_argument("series", nargs="+", metavar="NAME=MODEL,MODEL,...", help="series to fit, the plain one first")
  options = parser.parse_args(arguments)
  try:
    names = read_series(options.series)
    plan, results = study_plan.read(options.study), study.results_of(options.study, options.results)
    if not results.path.is_file():
      raise ConfigError(f"{results.path}: there is no such file; name one that benchmarks/study.py wrote.")
    cells = study_plan.cells(plan, options.study.parent, results.ratios())
    series = {name: points(plan, cells, results, models) for name, models in names.items()}
    fitted, bounds = fit(series), intervals(series)
  except ConfigError as error:
    sys.exit(f"maxtext-mudd: {error}")
  name = options.output or f"scaling-{options.study.stem}"
  lines = [
    [x, f"{fitted.factors[x]:.3f}", f"{_exponent(series[x]):.4f}"]
    + ([f"**{fitted.multiplier(x):.2f}**", str(bounds[x])] if x in bounds else ["1", ""])
    for x in series
  ]
  columns = ["series", "model", "seed", "FLOPs", f"held-out {plan.unit}"]
  table = [[x, p.size, str(p.seed), f"{p.compute:.3e}", f"{p.loss:.4f}"] for x in series for p in series[x]]
  text = (
    f"L = a·C^(-{fitted.exponent:.4f}).\n\n"
    f"{record.table(['series', 'a', 'exponent alone', 'compute multiplier', 'interval of the multiplier'], lines)}\n"
    f"{record.table(columns, table)}\n![Fit]({pathlib.Path(name).name}.png)\n"
  )
  place = record.write(name, record.facts("those of the study's results", "machines", ["numpy"]), text, table)
  draw(series, fitted, plan.unit, place.with_name(f"{place.name}.png"))
  print(text)


if __name__ == "__main__":
  main(sys.argv[1:])
