"""Warns once when the weights or the gradients of connections grow much faster than they did before."""

from collections import deque
from collections.abc import Mapping, Sequence
import logging
import math
import statistics

from maxtext_mudd import connections

TOTALS = "mudd"  # in MaxText's metrics of a step: by name of a total, its parts by the number of blocks before a reader
LARGEST_WEIGHT = "max_weight"
GRADIENT_NORM = "grad_norm"

GROWTH = 10.0
WINDOW = 100  # steps of the running median
FIRST_STEPS = 50  # the median is compared with from then on

# Static weights start at one, and dynamic ones at zero, so the latter grow by any factor while they are small.
_HARMLESS = {LARGEST_WEIGHT: 1.0, GRADIENT_NORM: 0.0}
_HOW_TOTALLED = {LARGEST_WEIGHT: max, GRADIENT_NORM: lambda parts: math.sqrt(sum(x * x for x in parts))}


class Watch:
  """Compares the totals of a step with their running medians.

  Attributes:
    remedies: keys that help against instability, as "mudd_pre_norm=true".
  """

  def __init__(self, remedies: Sequence[str]):
    self.remedies = tuple(remedies)
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
    remedies = ", ".join([*self.remedies, "a lower learning_rate"])
    return (
      f"step {step}: mudd/{name} is {total:.3g}, and its median over the last {WINDOW} steps is {median:.3g}; the "
      f"largest part is of da_{place:03d} (docs/metrics.md). If the loss does not recover, go back to an earlier "
      f"checkpoint with one of: {remedies}."
    )


def with_warnings(stock):
  """MaxText's `MetricLogger` that logs the warning of `Watch`."""

  class MuddMetricLogger(stock):
    """MaxText's logger of metrics, which also watches the totals of connections."""

    def __init__(self, config, *args, **kwargs):
      super().__init__(config, *args, **kwargs)
      self._watch = Watch(_remedies(config)) if getattr(config, "mudd", False) else None

    def write_metrics(self, metrics, step, metric_type="train"):
      if self._watch and metrics and metric_type == "train" and metrics.get(TOTALS):
        totals = {name: {k: float(x) for k, x in parts.items()} for name, parts in metrics[TOTALS].items()}
        if sentence := self._watch.warning(step, totals):
          logging.warning(sentence)
      super().write_metrics(metrics, step, metric_type)

  MuddMetricLogger.__name__ = MuddMetricLogger.__qualname__ = stock.__name__
  return MuddMetricLogger


def _remedies(config) -> list[str]:
  """Keys of the family that are not set yet."""
  known = connections.family(config).Keys.model_fields
  remedies = {"mudd_pre_norm": "true", "mudd_post_norm": "true", "mudd_weight_cap": "10"}
  return [f"{key}={value}" for key, value in remedies.items() if key in known and not getattr(config, key)]
