"""Two programs timed in turn, so that what slows the machine slows both, and their ratio keeps still."""

from collections.abc import Callable, Sequence
import dataclasses
import statistics
import time

MIN_ROUNDS = 2  # one in each order


@dataclasses.dataclass(frozen=True)
class Spread:
  """The median of some values, and where they lie."""

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
  """What `first` and `second` return in each round: first, second; second, first; and so on.

  Ends before a round that would, by the last one, end after `deadline` of `clock`, but not before MIN_ROUNDS.
  """
  found, took = [], 0.0
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
    found.append((a, b))
    took = clock() - start
  return found


def speed_ratios(seconds: Sequence[tuple[float, float]]) -> list[float]:
  """How fast the second is, as a share of the first, by round."""
  return [first / second for first, second in seconds]
