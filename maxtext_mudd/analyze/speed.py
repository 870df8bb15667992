"""Loss of a study against speed of a benchmark (Fig. 9 of the paper)."""

import collections
import json
import pathlib

import numpy as np

from maxtext_mudd.analyze.measurement import Named
from maxtext_mudd.config.errors import ConfigError

DEFINITION = (
  "mean final held-out loss of the runs of a study, its standard error over seeds, and tokens per second relative to "
  "the plain model, the median over paired rounds; of models that are in both files"
)


def arrays(study: pathlib.Path, speeds: tuple[pathlib.Path, ...]) -> dict[str, Named]:
  """The arrays of the figure.

  Raises:
    ConfigError: a file is none of these benchmarks, or they have no model in common.
  """
  losses = _losses(study)
  ratios = {}
  for file in speeds:
    ratios |= _ratios(file)
  common = [name for name in losses if name in ratios]
  if not common:
    raise ConfigError(
      f"--study={study} has the models {', '.join(losses)}, and --speed the models {', '.join(ratios)}; name "
      "files with a model in common."
    )
  labels = {"model": common}
  errors = [np.std(losses[x], ddof=1) / len(losses[x]) ** 0.5 if len(losses[x]) > 1 else np.nan for x in common]
  return {
    "loss": Named(("model",), np.array([np.mean(losses[x]) for x in common]), labels),
    "standard_error": Named(("model",), np.array(errors), labels),
    "speed_ratio": Named(("model",), np.array([ratios[x] for x in common]), labels),
  }


def _losses(file: pathlib.Path) -> dict[str, list[float]]:
  """By model, the final held-out losses of its runs at the learning rate at which their mean is lowest."""
  by_rate = collections.defaultdict(lambda: collections.defaultdict(list))
  try:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
      if row["kind"] == "cell" and row["held_out"]:
        by_rate[row["model"]][row["learning_rate"]].append(row["held_out"][max(row["held_out"], key=int)])
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(
      f"--study={file} is no file of benchmarks/study.py; name benchmarks/results/study-*.jsonl."
    ) from error
  return {model: min(of_rates.values(), key=np.mean) for model, of_rates in by_rate.items()}


def _ratios(file: pathlib.Path) -> dict[str, float]:
  """By model, its speed over that of the plain model, which has 1."""
  try:
    results = json.loads(file.read_text())
    ratios = {row["model"]: row["speed_ratio"]["median"] for row in results["rows"] if not row["refused"]}
    return ratios | {pathlib.Path(results["baseline"]).stem: 1.0}
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"--speed={file} is no file of benchmarks/throughput.py; name one that it wrote.") from error


def summary(found: dict[str, Named]) -> str:
  rows = zip(found["loss"].labels["model"], found["loss"].values, found["speed_ratio"].values)
  return "; ".join(f"{name}: loss {loss:.4f} at {ratio:.3f} of the speed" for name, loss, ratio in rows)
