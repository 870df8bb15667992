"""Reads what the TPU compiler made: the schedule it dumps for a kernel or fusion, and the bytes its final HLO moves.

A bundle is one cycle, empty ones included: they are latencies that the scheduler could not fill. What the dump cannot
show is time spent waiting for DMAs, which is why cycles are one side of a bracket and bytes the other.
"""

import collections
import dataclasses
import functools
import math
import pathlib
import re

SCHEDULE = "packed-bundles-post-ra"
SLOTS = "pre-delay_hlo-static-per-bundle-utilization"
DELAY_SLOTS = 4  # bundles after a branch that are run before it takes effect; on a TPU7x more
MOST_DELAY_SLOTS = 8
MOST_STAGES = 16  # trips that a pipeline may run beyond its grid

_BUNDLE = re.compile(r"^\s*(?:0x([0-9a-f]+)|0)\s+(?:[A-Z]{2})?\s*:\s*([> ]*)\{(.*)")
_BRANCH = re.compile(r"sbr\.rel\s*(?:\((!?)%(\w+)\))?\s*target bundleno = (\d+)")
_EXIT = re.compile(r"%(\w+) = scmp\.ge\.s32\.totalorder %(\w+), (\d+) /\* loop exit test")
_SPILL = re.compile(r"= v(?:st|ld)[^;]*\[vmem:\[#allocation\d+_spill\][^;]*?sm:\$\w+\](?: \((!?)%(\w+)\))?")
_BOUNDS = re.compile(r"iteration_bounds: \(([0-9, ]+)\)")


class NotUnderstood(ValueError):
  """The dump, or the HLO, is not of the form this reader knows; one sentence."""


@dataclasses.dataclass(frozen=True)
class Bundle:
  depth: int  # loops around it, as the dump marks them
  text: str


@dataclasses.dataclass(frozen=True)
class Loop:
  """Bundles `first` to `last`. The loop over the grid, a pipeline, runs a few more trips than the grid has steps, to
  fetch ahead and to write behind; the body runs in none of those, and they are not counted."""

  first: int
  last: int
  trips: int
  is_grid: bool


@dataclasses.dataclass
class Schedule:
  """One kernel's bundles, each with how often it runs on one core.

  Attributes:
    name: of the HLO instruction.
    loops: outermost first.
    once: ranges of bundles inside the grid loop that only its first step runs.
    grid: the steps of each grid axis that one core takes; empty where the compiler shows none.
    names_core: the kernel reads which of two cores it runs on.
    slots: the names of the issue slots, and what each can take in one cycle.
    used: by bundle, what each slot takes.
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
    """The share of each slot that is taken, over all cycles."""
    total = max(self.cycles, 1)
    sums = [sum(self.weight(k) * row[i] for k, row in enumerate(self.used)) for i in range(len(self.slots))]
    return {name: s / (total * room) for (name, room), s in zip(self.slots.items(), sums)}

  def counted(self, loop: Loop) -> dict[str, int]:
    """What each slot takes in one trip through a loop."""
    rows = self.used[loop.first : loop.last + 1]
    return {name: sum(row[i] for row in rows) for i, name in enumerate(self.slots)}

  def spills(self, loop: Loop) -> int:
    """Vector registers stored and loaded because there are too few, in every trip through a loop; not those that only
    its last trip stores or loads, for what comes after."""
    text = [bundle.text for bundle in self.bundles[loop.first : loop.last + 1]]
    exits = {name for line in text for name, _, _ in _EXIT.findall(line)}
    return sum(not (name in exits and not sign) for line in text for sign, name in _SPILL.findall(line))

  def parts(self) -> dict[str, float]:
    """Cycles for one grid step: before the inner loop, in it, after it."""
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
  """The schedule of the HLO instruction `name` out of the compiler's dump."""
  text, slots = (_one_file(folder, name, pass_).read_text() for pass_ in (SCHEDULE, SLOTS))
  return parse(name, text, slots)


def _one_file(folder: pathlib.Path, name: str, compiler_pass: str) -> pathlib.Path:
  pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-{re.escape(compiler_pass)}\.txt")
  found = sorted(x for x in folder.iterdir() if pattern.fullmatch(x.name))
  if not found:
    raise NotUnderstood(f"The compiler's dump has no {compiler_pass} for {name}; another libtpu may name it otherwise.")
  return found[-1]


def parse(name: str, schedule: str, utilisation: str) -> Schedule:
  """A schedule from the text of the two dumps."""
  bundles = _bundles(schedule)
  slots, used = _slots(utilisation)
  if len(used) != len(bundles) or not bundles:
    raise NotUnderstood(f"{name}: {len(bundles)} bundles, but the use of the slots is given for {len(used)}.")
  bounds = {tuple(int(x) for x in found.split(",")) for found in _BOUNDS.findall(schedule)}
  if len(bounds) > 1:
    raise NotUnderstood(
      f"{name}: more than one grid, {sorted(bounds)}; the cycles of such a kernel cannot be weighted."
    )
  grid = bounds.pop() if bounds else ()
  loops = _loops(name, bundles, grid)
  for k, bundle in enumerate(bundles):
    if bundle.depth > sum(x.first <= k <= x.last for x in loops):
      raise NotUnderstood(f"{name}: bundle {k:#x} is marked as inside a loop whose end was not found.")
  once = _once(bundles, loops, grid)
  return Schedule(name, bundles, loops, once, grid, "megacore core id" in schedule, slots, used)


def _bundles(text: str) -> list[Bundle]:
  found, lines = [], []
  for line in text.splitlines():
    match = _BUNDLE.match(line)
    if match:
      address = int(match[1] or "0", 16)
      if address != len(found):
        raise NotUnderstood(f"Bundle {address:#x} of the schedule stands where {len(found):#x} was expected.")
      lines = [match[3]]
      found.append((match[2].count(">"), lines))
    elif found:
      lines.append(line)
  return [Bundle(depth, "\n".join(lines)) for depth, lines in found]


def _slots(text: str) -> tuple[dict[str, int], list[list[int]]]:
  lines = text.splitlines()
  if len(lines) < 4 or "MATMUL" not in lines[1]:
    raise NotUnderstood("The dump of slot use does not begin with the names of the slots.")
  names = [x.strip() for x in lines[1].split(",")]
  slots = dict(zip(names, map(int, lines[2].split())))
  return slots, [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]


def _loops(name: str, bundles: list[Bundle], grid: tuple[int, ...]) -> list[Loop]:
  """Each backward branch ends a loop; its predicate is the exit test, which counts by one from zero."""
  limits = {match[1]: (match[2], int(match[3])) for bundle in bundles for match in _EXIT.finditer(bundle.text)}
  loops = []
  for k, bundle in enumerate(bundles):
    for match in _BRANCH.finditer(bundle.text):
      target = int(match[3])
      if target > k:
        continue
      if match[2] not in limits or match[1] != "!":
        raise NotUnderstood(f"{name}: the loop that ends at bundle {k:#x} has no constant number of trips.")
      counter, limit = limits[match[2]]
      if not _counts_by_one(bundles, counter):
        raise NotUnderstood(f"{name}: the loop that ends at bundle {k:#x} does not count by one.")
      loops.append((target, _loop_end(bundles, target, k), limit))
  loops.sort(key=lambda x: (x[0], -x[1]))
  steps = math.prod(grid)
  outermost = [x for x in loops if not any(y is not x and y[0] <= x[0] and x[1] <= y[1] for y in loops)]
  grids = [x for x in outermost if grid and steps < x[2] <= steps + MOST_STAGES]
  if steps > 1 and len(grids) != 1:
    raise NotUnderstood(f"{name}: no outermost loop is that of a pipeline over the grid {grid}.")
  return [Loop(first, last, steps if x in grids else trips, x in grids) for x in loops for first, last, trips in [x]]


def _loop_end(bundles: list[Bundle], first: int, branch: int) -> int:
  """The last bundle that runs after the branch that ends a loop: as far as the dump marks them as inside it."""
  after = range(branch + 1, min(branch + MOST_DELAY_SLOTS + 1, len(bundles)))
  marked = [k for k in after if bundles[k].depth >= bundles[first].depth]
  return min(max(branch + DELAY_SLOTS, *marked, 0), len(bundles) - 1)


def _counts_by_one(bundles: list[Bundle], counter: str) -> bool:
  """Follows the counter to its addition, through a spill to scalar memory if need be."""
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
  """What only the first step runs: no DMA inside, and skipped where the index of an axis is not zero. With two axes
  of more than one step, which of them is not known; then such a part counts as run in every step."""
  grid = next((x for x in loops if x.is_grid), None)
  if grid is None or sum(n > 1 for n in steps) > 1:
    return []
  found = []
  for k in range(grid.first, grid.last + 1):
    for match in _BRANCH.finditer(bundles[k].text):
      target = int(match[3])
      if match[1] or not match[2] or target <= k or target > grid.last:
        continue
      inside = range(k + DELAY_SLOTS + 1, target)
      if _first_step(bundles[:k], match[2]) and not any("dma." in bundles[i].text for i in inside):
        found.append(inside)
  return found


def _first_step(before: list[Bundle], predicate: str) -> bool:
  test = re.compile(rf"%{predicate} = scmp\.ne\.s32\.totalorder %(\w+), 0\b")
  for k in range(len(before) - 1, -1, -1):
    match = test.search(before[k].text)
    if match:
      index = re.compile(rf"%{match[1]} = [^;]*?/\*[^*]*iteration index")
      return any(index.search(x.text) for x in before[:k])
  return False


# ---------------------------------------------------------------- the optimised HLO

KERNEL = 'custom_call_target="tpu_custom_call"'

_BITS = {"pred": 8, "bf16": 16}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
DMA = {"copy-start", "slice-start"}
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id"}


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  opcode: str
  result: str
  operands: tuple[str, ...]
  line: str


def array_bytes(text: str) -> list[int]:
  """Bytes in HBM of each array that a type names, tile padding included; zero for one kept on the chip."""
  found = []
  for dtype, dimensions, layout in _ARRAY.findall(text):
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    sizes = [int(x) for x in dimensions.split(",") if x]
    order, _, rest = layout.partition(":")
    space, tile = re.search(r"S\((\d+)\)", rest), re.match(r"T\(([\d,]+)\)", rest)
    if tile:
      minor = [int(x) for x in order.split(",") if x]
      for axis, size in zip(minor, reversed(tile[1].split(","))):
        sizes[axis] = -(-sizes[axis] // int(size)) * int(size)
    found.append(0 if space and space[1] != "0" else math.prod(sizes) * bits // 8)
  return found


def _closing(text: str, start: int) -> int:
  depth = 0
  for k in range(start, len(text)):
    depth += (text[k] == "(") - (text[k] == ")")
    if depth == 0:
      return k
  raise NotUnderstood("A line of the HLO has unbalanced parentheses.")


def computations(hlo: str) -> dict[str, list[Instruction]]:
  """Instructions by computation; the entry's under ''."""
  found, current = {}, None
  for line in hlo.splitlines():
    if not line.startswith(" "):
      head = re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line)
      if head:
        current = found.setdefault("" if head[1] else head[2], [])
      continue
    head = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = ", line)
    if current is None or not head:
      continue
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opcode = re.match(r" ([\w\-]+)\(", line[end:])
    opened = end + opcode.end() - 1
    operands = tuple(_NAME.findall(line[opened : _closing(line, opened)]))
    current.append(Instruction(head[1], opcode[1], line[start:end], operands, line))
  if "" not in found:
    raise NotUnderstood("The HLO has no entry computation.")
  return found


def hlo_bytes(parts: dict[str, list[Instruction]], name: str = "", kernels: bool = False) -> collections.Counter:
  """HBM bytes by instruction: operands read, results written, loops weighted. Of Pallas kernels only if asked for, and
  as if they read and wrote each array once; an array that one updates in place is read once and written once."""
  total = collections.Counter()
  results = {x.name: x.result for x in parts[name]}
  for x in parts[name]:
    written = array_bytes(x.result)
    if x.opcode in FREE or x.opcode.endswith("-done") or "ConcatBitcast" in x.line:
      continue
    if KERNEL in x.line and not kernels:
      continue
    if x.opcode == "while":
      trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.line)
      if not trips:
        raise NotUnderstood(f"The HLO loop {x.name} has no known number of trips.")
      for inner, size in hlo_bytes(parts, re.search(r"body=%([\w.\-]+)", x.line)[1], kernels).items():
        total[inner] += size * int(trips[1])
    elif x.opcode in ("call", "conditional", "async-start"):
      raise NotUnderstood(f"The HLO instruction {x.name} is a {x.opcode}, whose bytes are not counted here.")
    elif x.opcode in DMA:  # a DMA: source and target, in either order
      plain = min(array_bytes(x.result.replace("S(1)", ""))[:2])
      total[x.name] += plain * sum(size > 0 for size in written[:2])
    elif x.opcode in ("slice", "dynamic-slice", "gather"):
      total[x.name] += 2 * sum(written)
    else:
      total[x.name] += sum(sum(array_bytes(results[y])) for y in x.operands) + sum(written)
  return total


def vmem_bytes(x: Instruction) -> int:
  used = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', x.line)
  sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used[1]) if used else []
  return sum(map(int, sizes))


class Schedules:
  """Cycles of what XLA compiles itself. Instructions of equal types share one compilation, and one dump."""

  def __init__(self, program, folder: pathlib.Path):
    self.folder = folder
    self.types = {x.name: x.result for x in program[""]}
    self.by_kind = {}
    for x in program[""]:
      found = self._read(x)
      if found:
        self.by_kind.setdefault(self._kind(x), found)

  def of(self, x: Instruction) -> dict | None:
    return self._read(x) or self.by_kind.get(self._kind(x))

  def _kind(self, x: Instruction):
    return x.opcode, x.result, tuple(self.types[y] for y in x.operands)

  @functools.cache  # noqa: B019
  def _read(self, x: Instruction) -> dict | None:
    if x.opcode in FREE or KERNEL in x.line:
      return None
    try:
      return {"cycles": read(self.folder, x.name).cycles}
    except NotUnderstood:
      return None
