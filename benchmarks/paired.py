"""Times two programs in turn and compares them round by round.

Other load on the machine slows both programs, so the ratio of their times varies less than the times.
"""

from collections.abc import Callable, Sequence
import dataclasses
import statistics
import time

MIN_ROUNDS = 2  # one round in each order


@dataclasses.dataclass(frozen=True)
class Spread:
  """Median, quartiles and extremes of some values."""

  median: float
  lower_quartile: float
  upper_quartile: float
  min: float
  max: float

  @classmethod
  def of(cls, values: Sequence[float]) -> "Spread":
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return cls(statistics.median(values), quartiles[0], quartiles[2], min(values), max(values))


def alternate(
  first: Callable[[], float],
  second: Callable[[], float],
  rounds: int,
  deadline: float = float("inf"),
  clock: Callable[[], float] = time.monotonic,
) -> list[tuple[float, float]]:
  """Calls `first` and `second` in turn. In every other round `second` comes first.

  Args:
    first: returns a time.
    second: returns a time.
    rounds: the most rounds.
    deadline: time of `clock` before which every round should end. No round starts that would end later if it took as
      long as the round before. At least MIN_ROUNDS rounds run in any case.
    clock: returns the current time.

  Returns:
    The results of (first, second) in each round.
  """
  results, took = [], 0.0
  for i in range(rounds):
    start = clock()
    if i >= MIN_ROUNDS and start + took > deadline:
      break
    if i % 2:
      b = second()
      a = first()
    else:
      a = first()
      b = second()
    results.append((a, b))
    took = clock() - start
  return results


def speed_ratios(seconds: Sequence[tuple[float, float]]) -> list[float]:
  """The speed of the second program over that of the first, for each round."""
  return [first / second for first, second in seconds]
