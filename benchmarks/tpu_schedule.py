"""Reads the schedules that the TPU compiler dumps for kernels and fusions, and counts their cycles.

A schedule is a list of bundles, each of which takes one cycle. Empty bundles count, too: in these cycles the scheduler
had no instruction to issue. A schedule does not show the time that a kernel waits for DMAs. So its cycles give one
lower bound of the time, and the HBM bytes (`tpu_hlo.py`) give another.
"""

import dataclasses
import functools
import math
import pathlib
import re

from record import MeasurementError
import tpu_hlo

# Names of the compiler passes whose dumps are read.
SCHEDULE = "packed-bundles-post-ra"
SLOTS = "pre-delay_hlo-static-per-bundle-utilization"
DELAY_SLOTS = 4  # bundles after a branch that run before the branch takes effect; there are more on a TPU7x
MOST_DELAY_SLOTS = 8
MOST_STAGES = 16  # the most trips that a pipeline may run beyond the steps of its grid

_BUNDLE = re.compile(r"^\s*(?:0x([0-9a-f]+)|0)\s+(?:[A-Z]{2})?\s*:\s*([> ]*)\{(.*)")
_BRANCH = re.compile(r"sbr\.rel\s*(?:\((!?)%(\w+)\))?\s*target bundleno = (\d+)")
_EXIT = re.compile(r"%(\w+) = scmp\.ge\.s32\.totalorder %(\w+), (\d+) /\* loop exit test")
_SPILL = re.compile(r"= v(?:st|ld)[^;]*\[vmem:\[#allocation\d+_spill\][^;]*?sm:\$\w+\](?: \((!?)%(\w+)\))?")
_BOUNDS = re.compile(r"iteration_bounds: \(([0-9, ]+)\)")


@dataclasses.dataclass(frozen=True)
class Bundle:
  """The instructions that one core issues in one cycle.

  Attributes:
    depth: number of loops around it, as the dump marks them.
    text: its lines in the dump.
  """

  depth: int
  text: str


@dataclasses.dataclass(frozen=True)
class Loop:
  """A loop of a schedule: bundles `first` to `last`.

  The loop over the grid is a pipeline, which runs a few more trips than the grid has steps, to fetch the first blocks
  and to write the last. The body does not run in these trips, and they are not counted.

  Attributes:
    trips: how often the body runs.
    is_grid: whether this is the loop over the grid.
  """

  first: int
  last: int
  trips: int
  is_grid: bool


@dataclasses.dataclass
class Schedule:
  """The schedule of one kernel or fusion on one core.

  Attributes:
    name: name of the HLO instruction.
    bundles: its bundles.
    loops: its loops, outermost first.
    once: ranges of bundles inside the grid loop that only the first grid step runs.
    grid: steps of each grid axis that one core runs; empty if the compiler does not show them.
    names_core: whether the kernel reads which of two cores it runs on.
    slots: how many instructions each kind of issue slot can take in one cycle, by its name.
    used: for each bundle, how many instructions each kind of slot takes.
  """

  name: str
  bundles: list[Bundle]
  loops: list[Loop]
  once: list[range]
  grid: tuple[int, ...]
  names_core: bool
  slots: dict[str, int]
  used: list[list[int]]

  def weight(self, k: int) -> int:
    """How often bundle k runs."""
    around = [loop for loop in self.loops if loop.first <= k <= loop.last]
    if any(k in one for one in self.once):
      around = [loop for loop in around if not loop.is_grid]
    return math.prod(loop.trips for loop in around)

  @property
  def cycles(self) -> int:
    return sum(self.weight(k) for k in range(len(self.bundles)))

  @property
  def inner(self) -> Loop | None:
    """The loop that takes the most cycles among those with no loop inside."""
    leaves = [x for x in self.loops if not any(y is not x and x.first <= y.first <= x.last for y in self.loops)]
    return max(leaves, key=lambda x: self.weight(x.first) * (x.last - x.first + 1), default=None)

  def busy(self) -> dict[str, float]:
    """The share of each kind of slot that is taken, over all cycles."""
    total = max(self.cycles, 1)
    sums = [sum(self.weight(k) * row[i] for k, row in enumerate(self.used)) for i in range(len(self.slots))]
    return {name: s / (total * capacity) for (name, capacity), s in zip(self.slots.items(), sums)}

  def counted(self, loop: Loop) -> dict[str, int]:
    """How many instructions each kind of slot takes in one trip through a loop."""
    rows = self.used[loop.first : loop.last + 1]
    return {name: sum(row[i] for row in rows) for i, name in enumerate(self.slots)}

  def spills(self, loop: Loop) -> int:
    """Spills: vector registers that every trip through a loop stores to or loads from VMEM for lack of registers.

    Spills of the last trip alone, for the code after the loop, do not count.
    """
    text = [bundle.text for bundle in self.bundles[loop.first : loop.last + 1]]
    exits = {name for line in text for name, _, _ in _EXIT.findall(line)}
    return sum(not (name in exits and not sign) for line in text for sign, name in _SPILL.findall(line))

  def parts(self) -> dict[str, float]:
    """Cycles of one grid step before the inner loop, in it, and after it; empty if there is no such loop."""
    inner = self.inner
    grid = next((x for x in self.loops if x.is_grid), None)
    if inner is None or grid is None or inner is grid:
      return {}
    steps = grid.trips
    before = sum(self.weight(k) for k in range(grid.first, inner.first))
    inside = sum(self.weight(k) for k in range(inner.first, inner.last + 1))
    after = sum(self.weight(k) for k in range(inner.last + 1, grid.last + 1))
    return {"before": before / steps, "inner": inside / steps, "after": after / steps}


def read(folder: pathlib.Path, name: str) -> Schedule:
  """The schedule of the HLO instruction `name`, from a folder with the compiler's dumps.

  Raises:
    MeasurementError: there is no dump of it, or it has another form than this file can read.
  """
  text, slots = (_one_file(folder, name, pass_).read_text() for pass_ in (SCHEDULE, SLOTS))
  return parse(name, text, slots)


def _one_file(folder: pathlib.Path, name: str, compiler_pass: str) -> pathlib.Path:
  pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-{re.escape(compiler_pass)}\.txt")
  files = sorted(x for x in folder.iterdir() if pattern.fullmatch(x.name))
  if not files:
    raise MeasurementError(
      f"The compiler's dump has no {compiler_pass} for {name}; another libtpu may name it otherwise."
    )
  return files[-1]


def parse(name: str, schedule: str, utilisation: str) -> Schedule:
  """A schedule from the text of the two dumps.

  Raises:
    MeasurementError: the dumps have another form than this file can read.
  """
  bundles = _bundles(schedule)
  slots, used = _slots(utilisation)
  if len(used) != len(bundles) or not bundles:
    raise MeasurementError(f"{name}: {len(bundles)} bundles, but the use of the slots is given for {len(used)}.")
  bounds = {tuple(int(x) for x in match.split(",")) for match in _BOUNDS.findall(schedule)}
  if len(bounds) > 1:
    raise MeasurementError(
      f"{name}: more than one grid, {sorted(bounds)}; the cycles of such a kernel cannot be weighted."
    )
  grid = bounds.pop() if bounds else ()
  loops = _loops(name, bundles, grid)
  for k, bundle in enumerate(bundles):
    if bundle.depth > sum(x.first <= k <= x.last for x in loops):
      raise MeasurementError(f"{name}: bundle {k:#x} is marked as inside a loop whose end was not found.")
  once = _once(bundles, loops, grid)
  return Schedule(name, bundles, loops, once, grid, "megacore core id" in schedule, slots, used)


def _bundles(text: str) -> list[Bundle]:
  bundles, lines = [], []
  for line in text.splitlines():
    match = _BUNDLE.match(line)
    if match:
      address = int(match[1] or "0", 16)
      if address != len(bundles):
        raise MeasurementError(f"Bundle {address:#x} of the schedule stands where {len(bundles):#x} was expected.")
      lines = [match[3]]
      bundles.append((match[2].count(">"), lines))
    elif bundles:
      lines.append(line)
  return [Bundle(depth, "\n".join(lines)) for depth, lines in bundles]


def _slots(text: str) -> tuple[dict[str, int], list[list[int]]]:
  """`Schedule.slots` and `Schedule.used`."""
  lines = text.splitlines()
  if len(lines) < 4 or "MATMUL" not in lines[1]:
    raise MeasurementError("The dump of slot use does not begin with the names of the slots.")
  names = [x.strip() for x in lines[1].split(",")]
  slots = dict(zip(names, map(int, lines[2].split())))
  return slots, [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]


def _loops(name: str, bundles: list[Bundle], grid: tuple[int, ...]) -> list[Loop]:
  """The loops. A backward branch ends each; its predicate is the exit test of a counter that starts at zero."""
  limits = {match[1]: (match[2], int(match[3])) for bundle in bundles for match in _EXIT.finditer(bundle.text)}
  loops = []
  for k, bundle in enumerate(bundles):
    for match in _BRANCH.finditer(bundle.text):
      target = int(match[3])
      if target > k:
        continue
      if match[2] not in limits or match[1] != "!":
        raise MeasurementError(f"{name}: the loop that ends at bundle {k:#x} has no constant number of trips.")
      counter, limit = limits[match[2]]
      if not _counts_by_one(bundles, counter):
        raise MeasurementError(f"{name}: the loop that ends at bundle {k:#x} does not count by one.")
      loops.append((target, _loop_end(bundles, target, k), limit))
  loops.sort(key=lambda x: (x[0], -x[1]))
  steps = math.prod(grid)
  outermost = [x for x in loops if not any(y is not x and y[0] <= x[0] and x[1] <= y[1] for y in loops)]
  grids = [x for x in outermost if grid and steps < x[2] <= steps + MOST_STAGES]
  if steps > 1 and len(grids) != 1:
    raise MeasurementError(f"{name}: no outermost loop is that of a pipeline over the grid {grid}.")
  return [Loop(first, last, steps if x in grids else trips, x in grids) for x in loops for first, last, trips in [x]]


def _loop_end(bundles: list[Bundle], first: int, branch: int) -> int:
  """The last bundle of a loop. Some bundles after its branch run, too; the dump marks them as inside the loop."""
  after = range(branch + 1, min(branch + MOST_DELAY_SLOTS + 1, len(bundles)))
  marked = [k for k in after if bundles[k].depth >= bundles[first].depth]
  return min(max(branch + DELAY_SLOTS, *marked, 0), len(bundles) - 1)


def _counts_by_one(bundles: list[Bundle], counter: str) -> bool:
  """Whether the addition that advances the counter adds one; follows a counter that is spilled to scalar memory."""
  step = re.compile(rf"%{counter} = (?:sadd\.s32 (\d+), |sld \[smem:\[#(allocation\d+_spill)\]\])")
  for bundle in bundles:
    match = step.search(bundle.text)
    if match and match[1]:
      return match[1] == "1"
    if match:
      stored = re.compile(rf"sst \[smem:\[#{match[2]}\]\] %(\w+)")
      return any(_counts_by_one(bundles, x[1]) for b in bundles for x in stored.finditer(b.text))
  return False


def _once(bundles: list[Bundle], loops: list[Loop], steps: tuple[int, ...]) -> list[range]:
  """Ranges of bundles that only the first grid step runs: they hold no DMA, and a branch skips them unless the index of
  a grid axis is zero.

  With two axes of more than one step it is not known which index is tested. Then such bundles count for every step.
  """
  grid = next((x for x in loops if x.is_grid), None)
  if grid is None or sum(n > 1 for n in steps) > 1:
    return []
  ranges = []
  for k in range(grid.first, grid.last + 1):
    for match in _BRANCH.finditer(bundles[k].text):
      target = int(match[3])
      if match[1] or not match[2] or target <= k or target > grid.last:
        continue
      inside = range(k + DELAY_SLOTS + 1, target)
      if _first_step(bundles[:k], match[2]) and not any("dma." in bundles[i].text for i in inside):
        ranges.append(inside)
  return ranges


def _first_step(before: list[Bundle], predicate: str) -> bool:
  """Whether a predicate tests that the index of a grid axis is not zero."""
  test = re.compile(rf"%{predicate} = scmp\.ne\.s32\.totalorder %(\w+), 0\b")
  for k in range(len(before) - 1, -1, -1):
    match = test.search(before[k].text)
    if match:
      index = re.compile(rf"%{match[1]} = [^;]*?/\*[^*]*iteration index")
      return any(index.search(x.text) for x in before[:k])
  return False


class Schedules:
  """The schedules of instructions that XLA compiles itself; instructions of equal types share one dump."""

  def __init__(self, program, folder: pathlib.Path):
    self.folder = folder
    self.types = {x.name: x.result for x in program[""]}
    self.by_kind = {}
    for x in program[""]:
      schedule = self._read(x)
      if schedule:
        self.by_kind.setdefault(self._kind(x), schedule)

  def of(self, x: tpu_hlo.Instruction) -> dict | None:
    """{"cycles": cycles of an instruction}; None if it has no schedule."""
    return self._read(x) or self.by_kind.get(self._kind(x))

  def _kind(self, x: tpu_hlo.Instruction):
    return x.opcode, x.result, tuple(self.types[y] for y in x.operands)

  @functools.cache  # noqa: B019
  def _read(self, x: tpu_hlo.Instruction) -> dict | None:
    if x.opcode in tpu_hlo.FREE or tpu_hlo.KERNEL in x.line:
      return None
    try:
      return {"cycles": read(self.folder, x.name).cycles}
    except MeasurementError:
      return None
