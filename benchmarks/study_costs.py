"""A table of a study's report: what each model costs, and how it compares with plain models of the same cost.

The loss of a plain model of any cost is interpolated, seed by seed, between the plain models of several lengths or
sizes that the study names in `references`: linear in the logarithm of the number of steps, or of parameters.
"""

from collections.abc import Mapping, Sequence
import math

import numpy as np
import record
from study_report import Difference, Summary

NOTES = """
Step time: over that of `{baseline}`, the median of rounds in turn in one process. Memory: of the train step on one
device, its arguments and the most that it holds beside them, as the compiler states them, over those of `{baseline}`.
Difference at equal time, or at equal parameters: loss minus that of a plain model which takes as long, or which has as
many parameters, with its 95% interval over seeds. The loss of that plain model is interpolated between {references},
seed by seed, linear in the logarithm. Empty: no time was measured, runs are missing or diverged, or no plain models of
the study lie on both sides.
"""


def table(study, summaries: Sequence[Summary], timings: Mapping[str, dict]) -> str:
  """Markdown: a row for each model beside the references, at each learning rate.

  Args:
    timings: the latest row of a timing, by model.
  """
  rows = []
  references = {name for names in study.references.values() for name in names}
  by_model = {(x.learning_rate, x.model): x for x in summaries}
  for summary in summaries:
    if summary.model in references:
      continue
    timing = timings.get(summary.model)
    ratios = {"time": timing and timing["ratio"]["median"], "parameters": _parameters(summary)}
    if plain := by_model.get((summary.learning_rate, study.baseline)):
      ratios["parameters"] /= _parameters(plain)
    cells = [summary.model, f"{summary.learning_rate:g}", f"{ratios['parameters']:.4f}"]
    cells += [f"{timing['ratio']['median']:.2f}", f"{_memory(timing):.2f}"] if timing else ["", ""]
    for cost in ("time", "parameters"):
      plains = [by_model.get((summary.learning_rate, name)) for name in study.references.get(cost, ())]
      cells.append(_written(difference(summary, plains, cost, ratios[cost])))
    rows.append(cells)
  names = " and ".join(f"`{'`, `'.join(names)}`" for names in study.references.values())
  header = ["model", "rate", "parameters", "step time", "memory", "at equal time", "at equal parameters"]
  return record.table(header, rows) + NOTES.format(baseline=study.baseline, references=names)


def difference(summary: Summary, plains: Sequence[Summary | None], cost: str, ratio: float | None) -> Difference | None:
  """The loss of a model minus that of a plain model of the same cost; None if it is not known.

  Args:
    plains: the references, of which the first has the cost 1.
    cost: "time" or "parameters".
    ratio: the cost of the model.
  """
  if ratio is None or summary.dead or not plains or None in plains or any(x.dead for x in plains):
    return None
  of_plains = [x.rows[0]["steps_done"] if cost == "time" else _parameters(x) for x in plains]
  order = np.argsort(of_plains)
  costs = np.array(of_plains)[order] / of_plains[0]
  if not costs[0] <= ratio <= costs[-1]:
    return None
  seeds = set.intersection(*(set(x.losses) for x in (summary, *plains)))
  differences = []
  for seed in sorted(seeds):
    losses = np.array([x.losses[seed] for x in plains])[order]
    differences.append(summary.losses[seed] - float(np.interp(math.log(ratio), np.log(costs), losses)))
  return Difference.of(differences) if differences else None


def _parameters(summary: Summary) -> int:
  return summary.rows[0]["parameters"]


def _memory(timing: dict) -> float:
  of_plain, of_model = timing["bytes"]
  return of_model / of_plain


def _written(x: Difference | None) -> str:
  if x is None:
    return ""
  return f"{x.mean:+.4f}" + (f" ± {x.half_width:.4f}" if math.isfinite(x.half_width) else "")
