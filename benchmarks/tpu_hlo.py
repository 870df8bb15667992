"""Counts the HBM bytes that a compiled TPU program moves, from the text of its final HLO.

An instruction counts as reading its operands and writing its results once, times the trips of the loops around it.
In a loop, where a fusion slices an operand, or updates one in place, the slice or the update counts.
"""

import collections
import dataclasses
import math
import re

from record import MeasurementError

KERNEL = 'custom_call_target="tpu_custom_call"'  # marks a Pallas kernel

_BITS = {"pred": 8, "bf16": 16}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
DMA = {"copy-start", "slice-start"}  # opcodes that move bytes between HBM and VMEM
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id"}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of an HLO computation.

  Attributes:
    name: its name.
    opcode: its opcode.
    result: the type of its result, as text.
    operands: names of its operands.
    line: the whole line.
  """

  name: str
  opcode: str
  result: str
  operands: tuple[str, ...]
  line: str


def array_bytes(text: str) -> list[int]:
  """HBM bytes of each array in a type, with the padding of tiles; zero for an array that is kept on the chip."""
  sizes_in_bytes = []
  for dtype, dimensions, layout in _ARRAY.findall(text):
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    sizes = [int(x) for x in dimensions.split(",") if x]
    order, _, rest = layout.partition(":")
    space, tile = re.search(r"S\((\d+)\)", rest), re.match(r"T\(([\d,]+)\)", rest)
    if tile:
      minor = [int(x) for x in order.split(",") if x]
      for axis, size in zip(minor, reversed(tile[1].split(","))):
        sizes[axis] = -(-sizes[axis] // int(size)) * int(size)
    sizes_in_bytes.append(0 if space and space[1] != "0" else math.prod(sizes) * bits // 8)
  return sizes_in_bytes


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for k in range(start, len(text)):
    depth += (text[k] == "(") - (text[k] == ")")
    if depth == 0:
      return k
  raise MeasurementError("A line of the HLO has unbalanced parentheses.")


def computations(hlo: str) -> dict[str, list[Instruction]]:
  """The instructions of each computation, by name; those of the entry computation under ''."""
  by_name, current = {}, None
  for line in hlo.splitlines():
    if not line.startswith(" "):
      head = re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line)
      if head:
        current = by_name.setdefault("" if head[1] else head[2], [])
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
  if "" not in by_name:
    raise MeasurementError("The HLO has no entry computation.")
  return by_name


def hlo_bytes(
  program: dict[str, list[Instruction]],
  name: str = "",
  kernels: bool = False,
  buffer: tuple[int, float] | None = None,
  in_loop: bool = False,
) -> collections.Counter:
  """HBM bytes of each instruction, by name: operands read and results written, times the trips of loops around it.

  In loops, of an operand that a fusion slices, the slice counts; of one that it updates in place, the update. Of the
  branches of a conditional the mean counts.

  Args:
    program: what `computations` returned.
    name: the computation to count, with those that it calls.
    kernels: whether Pallas kernels are counted, as if each read and wrote every array once. An array that a kernel
      updates in place counts as read once and written once.
    buffer: (S, share): of arrays [S, ...] of more than two axes, kernels move this share, on average over the loop.
    in_loop: whether the computation is part of a loop.

  Raises:
    MeasurementError: the bytes of an instruction cannot be counted.
  """
  total = collections.Counter()
  results = {x.name: x.result for x in program[name]}

  def inner(computation, in_loop=in_loop):
    return hlo_bytes(program, computation, kernels, buffer, in_loop)

  for x in program[name]:
    written = array_bytes(x.result)
    if x.opcode in FREE or x.opcode.endswith("-done") or "ConcatBitcast" in x.line:
      continue
    if KERNEL in x.line:
      if kernels:
        # A kernel takes a buffer of sources as one operand for each entry.
        types = [x.result, *(results[y] for y in dict.fromkeys(x.operands))]
        total[x.name] += sum(_moved_by_kernel(part, buffer if in_loop else None) for part in types)
      continue
    if x.opcode == "while":
      for part, size in inner(re.search(r"body=%([\w.\-]+)", x.line)[1], True).items():
        total[part] += size * _trips(program, x)
    elif x.opcode == "conditional":
      named = re.search(r"branch_computations=\{([^}]*)\}", x.line)
      branches = _NAME.findall(named[1] if named else x.line.partition("true_computation=")[2].split(", metadata")[0])
      for branch in branches:
        for part, size in inner(branch).items():
          total[part] += size / len(branches)
    elif x.opcode in ("call", "async-start"):
      raise MeasurementError(f"The HLO instruction {x.name} is a {x.opcode}, whose bytes are not counted here.")
    elif x.opcode in DMA:  # its result names source and target, in either order
      plain = min(array_bytes(x.result.replace("S(1)", ""))[:2])
      total[x.name] += plain * sum(size > 0 for size in written[:2])
    elif x.opcode in ("slice", "dynamic-slice", "gather"):
      total[x.name] += 2 * sum(written)
    elif x.opcode == "dynamic-update-slice" and in_loop:
      total[x.name] += 2 * sum(array_bytes(results[x.operands[1]]))
    elif x.opcode == "fusion" and in_loop:
      total[x.name] += _moved_by_fusion(program, x, results)
    else:
      total[x.name] += sum(sum(array_bytes(results[y])) for y in x.operands) + sum(written)
  return total


def loop_bytes(
  program: dict[str, list[Instruction]], trips: int, kernels: bool = False, buffer: tuple[int, float] | None = None
) -> list[float]:
  """HBM bytes of each loop of the entry computation that runs so many times, in order; other arguments as in
  `hlo_bytes`."""
  bodies = [
    re.search(r"body=%([\w.\-]+)", x.line)[1]
    for x in program[""]
    if x.opcode == "while" and _trips(program, x) == trips
  ]
  return [trips * hlo_bytes(program, body, kernels, buffer, True).total() for body in bodies]


def permuted_bytes(
  program: dict[str, list[Instruction]], name: str = "", beside_loops: bool = False
) -> collections.Counter:
  """Bytes that collective-permutes of the program's own `ppermute` send in loops, by how many pairs of chips each has:
  those of all pairs together, times the trips of the loops. XLA makes further ones of gathers.

  Args:
    program: what `computations` returned, in the order of the schedule.
    name: the computation to count, with those that it calls; '' for the entry computation, which is no loop.
    beside_loops: whether only those count that are under way while a loop within the loop runs.
  """
  total = collections.Counter()
  results = {x.name: x.result for x in program[name]}
  at = {x.name: k for k, x in enumerate(program[name])}
  inner = [k for k, x in enumerate(program[name]) if x.opcode == "while"]
  done = {x.operands[0]: at[x.name] for x in program[name] if x.opcode == "collective-permute-done"}
  for k in inner:
    body = re.search(r"body=%([\w.\-]+)", program[name][k].line)[1]
    for pairs, size in permuted_bytes(program, body, beside_loops).items():
      total[pairs] += size * _trips(program, program[name][k])
  for x in program[name]:
    if name and x.opcode in ("collective-permute", "collective-permute-start") and 'ppermute"' in x.line:
      pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", x.line)[1].count("{")
      (size,) = _unpadded_bytes(results[x.operands[0]])
      if not beside_loops or any(at[x.name] < k < done.get(x.name, -1) for k in inner):
        total[pairs] += pairs * size
  return total


def _unpadded_bytes(text: str) -> list[int]:
  """Bytes of each array in a type, wherever it lies."""
  return array_bytes(re.sub(r"\{[^}]*\}", "", text))


def _trips(program: dict[str, list[Instruction]], loop: Instruction) -> int:
  """How often a loop runs its body, by its annotation, or by the one number in its condition."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line)
  if known:
    return int(known[1])
  condition = program[re.search(r"condition=%([\w.\-]+)", loop.line)[1]]
  numbers = [found[1] for x in condition if (found := re.search(r" constant\((\d+)\)", x.line))]
  if len(numbers) != 1 or not any(x.opcode == "compare" and "direction=LT" in x.line for x in condition):
    raise MeasurementError(f"The HLO loop {loop.name} has no known number of trips.")
  return int(numbers[0])


def _moved_by_kernel(types: str, buffer: tuple[int, float] | None) -> float:
  total = 0
  for (_, dimensions, _), size in zip(_ARRAY.findall(types), array_bytes(types)):
    axes = dimensions.split(",")
    total += size * (buffer[1] if buffer and len(axes) > 2 and axes[0] == str(buffer[0]) else 1)
  return total


def _moved_by_fusion(program: dict[str, list[Instruction]], x: Instruction, results: dict[str, str]) -> int:
  """Bytes that a fusion reads and writes; `results` are the types of its operands, by name."""
  called = re.search(r"calls=%([\w.\-]+)", x.line)[1]
  total = 0
  for k, operand in enumerate(x.operands):
    whole = sum(array_bytes(results[operand]))
    part = _read_of_parameter(program, called, k) if whole else 0
    total += whole if part is None else min(part, whole)
  sizes = array_bytes(x.result)
  updates = _updates(program, called)
  return total + sum(min(size, update) if update is not None else size for size, update in zip(sizes, updates))


def _read_of_parameter(program: dict[str, list[Instruction]], name: str, number: int) -> int | None:
  """Bytes that a computation reads of a parameter, where it only slices or updates it; None: it reads all."""
  parameter = next(x for x in program[name] if x.opcode == "parameter" and f"parameter({number})" in x.line)
  return _read(program, name, parameter.name)


def _read(program: dict[str, list[Instruction]], name: str, value: str) -> int | None:
  total = 0
  for x in program[name]:
    for k in (k for k, operand in enumerate(x.operands) if operand == value):
      if x.opcode in ("dynamic-slice", "slice") and k == 0:
        part = sum(array_bytes(x.result))
      elif x.opcode == "dynamic-update-slice" and k == 0:
        part = 0
      elif x.opcode == "bitcast":
        part = _read(program, name, x.name)
      elif x.opcode == "fusion":
        part = _read_of_parameter(program, re.search(r"calls=%([\w.\-]+)", x.line)[1], k)
      else:
        return None
      if part is None:
        return None
      total += part
  return total


def _updates(program: dict[str, list[Instruction]], name: str) -> list[int | None]:
  """For each result of a fused computation, the bytes that it changes of an operand; None: it makes the whole."""
  by_name = {x.name: x for x in program[name]}
  root = next(x for x in program[name] if x.line.lstrip().startswith("ROOT "))

  def update(x: Instruction) -> int | None:
    if x.opcode == "bitcast":
      return update(by_name[x.operands[0]])
    if x.opcode == "dynamic-update-slice":
      return sum(array_bytes(by_name[x.operands[1]].result))
    if x.opcode == "fusion":
      (inside,) = _updates(program, re.search(r"calls=%([\w.\-]+)", x.line)[1])[:1]
      return inside
    return None

  return [update(by_name[y]) for y in root.operands] if root.opcode == "tuple" else [update(root)]


def vmem_bytes(x: Instruction) -> int:
  """Bytes of VMEM that an instruction uses."""
  used = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', x.line)
  sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used[1]) if used else []
  return sum(map(int, sizes))
