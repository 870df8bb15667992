"""Loss of a study against speed of a benchmark (Fig. 9 of the paper)."""

import collections
from collections.abc import Mapping, Sequence
import json
import pathlib

import numpy as np

from maxtext_mudd.analyze.measurement import Named
from maxtext_mudd.config.errors import ConfigError

DEFINITION = (
  "mean final held-out loss of the runs of a study, in its unit, at the learning rate that is best for the model, with "
  "the standard error over seeds; and tokens per second relative to the plain model, the median over paired rounds; of "
  "models that have both, and no run of which ended early"
)


def arrays(study: pathlib.Path, speeds: Sequence[tuple[pathlib.Path, Mapping[str, str]]]) -> dict[str, Named]:
  """The arrays of the figure.

  Args:
    speeds: files, and for each the models of the study whose names it does not have, with the names that it has.

  Raises:
    ConfigError: a file is none of these benchmarks, or no model has both a loss and a speed.
  """
  losses, ratios = _read_study(study)
  for file, names in speeds:
    of_file = _read_speeds(file)
    for model, name in names.items():
      for key, known, where in ((model, losses, f"--study={study}"), (name, of_file, f"--speed={file}")):
        if key not in known:
          raise ConfigError(f"--speed: {model}={name}: {where} has no {key}; it has {', '.join(known)}.")
    of_file |= {model: of_file[name] for model, name in names.items()}
    if not of_file.keys() & losses.keys():
      raise ConfigError(
        f"--speed={file} has speeds of {', '.join(of_file)}, and none of the models of --study={study}: "
        f"{', '.join(losses)}; say which are the same by --speed {file} MODEL_OF_STUDY=MODEL_OF_FILE."
      )
    ratios |= of_file
  common = [name for name in losses if name in ratios]
  if not common:
    raise ConfigError(
      f"--study={study} has losses of {', '.join(losses) or 'no model'}, and speeds of "
      f"{', '.join(ratios) or 'no model'}; run the study with --time, or name a --speed file with one of these models."
    )
  labels = {"model": common}
  losses, rates = {x: losses[x][1] for x in common}, [losses[x][0] for x in common]
  errors = [np.std(losses[x], ddof=1) / len(losses[x]) ** 0.5 if len(losses[x]) > 1 else np.nan for x in common]
  return {
    "learning_rate": Named(("model",), np.array(rates), labels),
    "runs": Named(("model",), np.array([len(losses[x]) for x in common]), labels),
    "loss": Named(("model",), np.array([np.mean(losses[x]) for x in common]), labels),
    "standard_error": Named(("model",), np.array(errors), labels),
    "speed_ratio": Named(("model",), np.array([ratios[x] for x in common]), labels),
  }


def _read_study(file: pathlib.Path) -> tuple[dict[str, tuple[float, list[float]]], dict[str, float]]:
  """By model: the learning rate at which the mean final held-out loss is lowest, with these losses; and of models that
  the study has timed, the speed over that of the plain model. Of several rows of one run the last counts."""
  by_rate = collections.defaultdict(lambda: collections.defaultdict(dict))
  ratios, plain = {}, set()
  try:
    *complete, unfinished = file.read_text().split("\n")  # a study may be writing the next line
    for row in map(json.loads, complete or [unfinished]):
      if row["kind"] == "timing":
        ratios |= {row["against"]: 1.0, row["model"]: 1 / row["ratio"]["median"]}
        plain.add(row["against"])
      else:
        held_out = row["held_out"]
        last = None if row["dead"] or not held_out else held_out[max(held_out, key=int)]
        by_rate[row["model"]][row["learning_rate"]][row["seed"]] = np.inf if last is None else last
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConfigError(
      f"--study={file} is no file of benchmarks/study.py; name benchmarks/results/study-*.jsonl."
    ) from error
  if len(plain) > 1:
    raise ConfigError(
      f"--study={file} has speeds against several models, {', '.join(sorted(plain))}; name one of a single plain model."
    )
  losses = {
    model: min(((rate, [*x.values()]) for rate, x in of_rates.items()), key=lambda x: np.mean(x[1]))
    for model, of_rates in by_rate.items()
  }
  return {model: x for model, x in losses.items() if np.isfinite(x[1]).all()}, ratios


def _read_speeds(file: pathlib.Path) -> dict[str, float]:
  """By model, its speed over that of the plain model, which is there too."""
  try:
    results = json.loads(file.read_text())
    ratios = {row["model"]: row["ratio"]["median"] for row in results["rows"] if not row["refused"]}
    return {pathlib.Path(results["baseline"]).stem: 1.0} | ratios
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConfigError(f"--speed={file} is no file of benchmarks/throughput.py; name one that it wrote.") from error


def summary(results: dict[str, Named]) -> str:
  rows = zip(results["loss"].labels["model"], results["loss"].values, results["speed_ratio"].values)
  return "; ".join(f"{name}: loss {loss:.4f} at {ratio:.3f} of the speed" for name, loss, ratio in rows)
