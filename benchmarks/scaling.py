"""Fits loss against compute for a plain and a connected model, and says how much compute the connections are worth.

    python benchmarks/scaling.py benchmarks/results/study-size.jsonl --plain plain_s,plain_m,plain_l \\
      --connected mudd_s,mudd_m,mudd_l

Loss is modelled as L = a·C^(-b), a straight line in logarithms, with one exponent b for both kinds of model: their
lines are parallel, as in the paper's Fig. 3, and the compute multiplier is one number, the factor by which the plain
model's compute must grow to reach the connected one's loss. C is training compute by MaxText's count of the FLOPs of a
step, connections included, times the steps. The interval comes from drawing the seeds again with replacement.

Writes NAME.md and NAME.png to benchmarks/results/.
"""

import argparse
import collections
from collections.abc import Sequence
import dataclasses
import pathlib
import sys

import numpy as np
import record
import study
import study_report

from maxtext_mudd.errors import ConfigError

DRAWS = 2000  # bootstrap samples; the interval's ends move by less than a tenth of its width between seeds of the draw


@dataclasses.dataclass(frozen=True)
class Point:
  """One trained model.

  Attributes:
    compute: of its training, in FLOPs.
    loss: bits per byte, held out.
  """

  size: str
  seed: int
  compute: float
  loss: float


@dataclasses.dataclass(frozen=True)
class Fit:
  """L = a·C^(-exponent), with one exponent and a factor for each kind.

  Attributes:
    multiplier: compute of the plain model over that of the connected one, at equal loss.
  """

  plain: float
  connected: float
  exponent: float

  @property
  def multiplier(self) -> float:
    return float((self.plain / self.connected) ** (1 / self.exponent))

  def loss(self, compute, kind: str):
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


def interval(plain: Sequence[Point], connected: Sequence[Point], draws: int = DRAWS) -> tuple[float, float]:
  """95% interval of the multiplier: seeds, which both kinds share, are drawn again with replacement."""
  seeds = sorted({point.seed for point in plain} & {point.seed for point in connected})
  random = np.random.default_rng(0)
  multipliers = []
  for _ in range(draws):
    drawn = random.choice(seeds, len(seeds))
    samples = [[point for seed in drawn for point in points if point.seed == seed] for points in (plain, connected)]
    multipliers.append(fit(*samples).multiplier)
  low, high = np.quantile(multipliers, (0.025, 0.975))
  return float(low), float(high)


def points(rows: list[dict], models: list[str]) -> list[Point]:
  """The finished runs of some models; of several learning rates, the one with the lowest mean loss of each model.

  Raises:
    ConfigError: one of the models has no finished run.
  """
  found = []
  for model in models:
    by_rate = collections.defaultdict(list)
    for row in rows:
      if row["kind"] == "cell" and row["model"] == model and study_report.final(row) is not None:
        compute = row["tflops_per_step"] * 1e12 * row["steps_done"]
        by_rate[row["learning_rate"]].append(Point(model, row["seed"], compute, study_report.final(row)))
    if not by_rate:
      raise ConfigError(f"{model}: there is no finished run of it in these results.")
    found += min(by_rate.values(), key=lambda ps: np.mean([point.loss for point in ps]))
  return found


def draw(plain: list[Point], connected: list[Point], fitted: Fit, path: pathlib.Path) -> None:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
  span = np.geomspace(min(p.compute for p in plain + connected), max(p.compute for p in plain + connected), 50)
  for kind, own, color in (("plain", plain, "tab:blue"), ("connected", connected, "tab:orange")):
    axes.plot([p.compute for p in own], [p.loss for p in own], "o", color=color, label=kind)
    axes.plot(span, fitted.loss(span, kind), color=color, linewidth=1)
  axes.set(xscale="log", yscale="log", xlabel="training compute, FLOPs", ylabel="held-out bits per byte")
  axes.set_title(f"compute multiplier {fitted.multiplier:.2f}")
  axes.grid(alpha=0.3, which="both")
  axes.legend()
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("results", type=pathlib.Path, help="of benchmarks/study.py")
  parser.add_argument("--plain", required=True, help="names of the plain models, by commas")
  parser.add_argument("--connected", required=True, help="names of the connected models, by commas")
  parser.add_argument("--output", help="name of the results; default: scaling-NAME")
  options = parser.parse_args(arguments)
  try:
    if not options.results.is_file():
      raise ConfigError(f"{options.results}: there is no such file; name one that benchmarks/study.py wrote.")
    rows = study.Results(options.results).rows()
    plain, connected = (points(rows, names.split(",")) for names in (options.plain, options.connected))
    fitted, (low, high) = fit(plain, connected), interval(plain, connected)
  except ConfigError as error:
    sys.exit(f"maxtext-mudd: {error}")
  name = options.output or f"scaling-{options.results.stem.removeprefix('study-')}"
  table = [[p.size, str(p.seed), f"{p.compute:.3e}", f"{p.loss:.4f}"] for p in (*plain, *connected)]
  text = (
    f"L = a·C^(-{fitted.exponent:.4f}); a is {fitted.plain:.3f} for the plain and {fitted.connected:.3f} for the "
    f"connected models. **Compute multiplier: {fitted.multiplier:.2f}** (95% interval {low:.2f} to {high:.2f}, over "
    f"seeds).\n\n{record.table(['model', 'seed', 'FLOPs', 'held-out bits per byte'], table)}\n![Fit]({name}.png)\n"
  )
  place = record.write(name, record.facts("those of the study's results", "machines"), text, table)
  draw(plain, connected, fitted, place.with_name(f"{place.name}.png"))
  print(text)


if __name__ == "__main__":
  main(sys.argv[1:])
