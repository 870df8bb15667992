"""Warns once when the weights or the gradients of connections grow much faster than they did before."""

from collections import deque
from collections.abc import Mapping, Sequence
import logging
import math
import statistics

import jax
import numpy as np

from maxtext_mudd import connections

TOTALS = "mudd"  # in MaxText's metrics of a step: by name of a total, its parts by the number of blocks before a reader
LARGEST_WEIGHT = "max_weight"
GRADIENT_NORM = "grad_norm"

GROWTH = 10.0
WINDOW = 100  # steps of the running median
FIRST_STEPS = 50  # the median is compared with from then on

# Static weights start at one, and dynamic ones at zero, so the latter grow by any factor while they are small.
_HARMLESS = {LARGEST_WEIGHT: 1.0, GRADIENT_NORM: 0.0}
_HOW_TOTALLED = {  # a part that is NaN makes the total NaN
  LARGEST_WEIGHT: lambda parts: float(np.max([*parts])),
  GRADIENT_NORM: lambda parts: math.sqrt(sum(x * x for x in parts)),
}


class Watch:
  """Compares the totals of a step with their running medians.

  Attributes:
    on_resume: what helps against instability when a run is resumed, as "a lower learning_rate".
    in_new_run: what helps, and changes the parameters of the model.
  """

  def __init__(self, on_resume: Sequence[str], in_new_run: Sequence[str] = ()):
    self.on_resume = tuple(on_resume)
    self.in_new_run = tuple(in_new_run)
    self._before = {name: deque(maxlen=WINDOW) for name in _HOW_TOTALLED}
    self._has_warned = False

  def warning(self, step: int, totals: Mapping[str, Mapping[int, float]]) -> str | None:
    """One sentence when a total is `GROWTH` times its median over the last `WINDOW` steps; None otherwise, and ever
    after the first.

    Args:
      step: number of the step.
      totals: by name of a total, its parts by the number of blocks before their reader.
    """
    sentence = None
    for name, parts in totals.items():
      before, total = self._before[name], _HOW_TOTALLED[name](parts.values())
      if not self._has_warned and len(before) >= FIRST_STEPS:
        median = statistics.median(before)
        is_harmless = total <= max(GROWTH * median, _HARMLESS[name])
        if not is_harmless or not math.isfinite(total):
          self._has_warned = True
          place = max(parts, key=lambda block: (math.isnan(parts[block]), parts[block]))
          sentence = self._sentence(step, name, total, median, place)
      if math.isfinite(total):
        before.append(total)
    return sentence

  def _sentence(self, step: int, name: str, total: float, median: float, place: int) -> str:
    norms = f"; a new run is stable at higher rates with {' '.join(self.in_new_run)}" if self.in_new_run else ""
    return (
      f"step {step}: mudd/{name} is {total:.3g}, and its median over the last {WINDOW} steps is {median:.3g}; the "
      f"largest is that of DA_{place} (da_{place:03d} in the metrics). If the loss does not recover, resume from an "
      f"earlier checkpoint with {' or '.join(self.on_resume)}{norms}."
    )


def with_warnings(stock):
  """MaxText's `MetricLogger` that logs the warning of `Watch`."""

  class MuddMetricLogger(stock):
    """MaxText's logger of metrics, which also watches the totals of connections."""

    def __init__(self, config, *args, **kwargs):
      super().__init__(config, *args, **kwargs)
      self._watch = Watch(*_remedies(config)) if getattr(config, "mudd", False) else None

    def write_metrics(self, metrics, step, metric_type="train"):
      if self._watch and metrics and metric_type == "train" and metrics.get(TOTALS):
        totals = jax.tree.map(float, jax.device_get(metrics[TOTALS]))
        if sentence := self._watch.warning(step, totals):
          logging.warning(sentence)
      super().write_metrics(metrics, step, metric_type)

  MuddMetricLogger.__name__ = MuddMetricLogger.__qualname__ = stock.__name__
  return MuddMetricLogger


def _remedies(config) -> tuple[list[str], list[str]]:
  """The arguments of `Watch`. Of dense these are norms: `mudd_weight_cap` and `mudd_weight_scale` help less. In the
  results of yaml/study/stability.yml runs with them diverge, with norms none."""
  on_resume = ["a lower learning_rate", "a lower mudd_learning_rate_factor"]
  return on_resume, connections.family(config).stabilising(config)
