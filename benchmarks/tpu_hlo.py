"""Counts the HBM bytes that a compiled TPU program moves, from the text of its final HLO.

An instruction counts as reading its operands and writing its results once, times the trips of the loops around it.
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


def hlo_bytes(program: dict[str, list[Instruction]], name: str = "", kernels: bool = False) -> collections.Counter:
  """HBM bytes of each instruction, by name: operands read and results written, times the trips of loops around it.

  Args:
    program: what `computations` returned.
    name: the computation to count, with those that it calls.
    kernels: whether Pallas kernels are counted, as if each read and wrote every array once. An array that a kernel
      updates in place counts as read once and written once.

  Raises:
    MeasurementError: the bytes of an instruction cannot be counted.
  """
  total = collections.Counter()
  results = {x.name: x.result for x in program[name]}
  for x in program[name]:
    written = array_bytes(x.result)
    if x.opcode in FREE or x.opcode.endswith("-done") or "ConcatBitcast" in x.line:
      continue
    if KERNEL in x.line and not kernels:
      continue
    if x.opcode == "while":
      trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.line)
      if not trips:
        raise MeasurementError(f"The HLO loop {x.name} has no known number of trips.")
      for inner, size in hlo_bytes(program, re.search(r"body=%([\w.\-]+)", x.line)[1], kernels).items():
        total[inner] += size * int(trips[1])
    elif x.opcode in ("call", "conditional", "async-start"):
      raise MeasurementError(f"The HLO instruction {x.name} is a {x.opcode}, whose bytes are not counted here.")
    elif x.opcode in DMA:  # its result names source and target, in either order
      plain = min(array_bytes(x.result.replace("S(1)", ""))[:2])
      total[x.name] += plain * sum(size > 0 for size in written[:2])
    elif x.opcode in ("slice", "dynamic-slice", "gather"):
      total[x.name] += 2 * sum(written)
    else:
      total[x.name] += sum(sum(array_bytes(results[y])) for y in x.operands) + sum(written)
  return total


def vmem_bytes(x: Instruction) -> int:
  """Bytes of VMEM that an instruction uses."""
  used = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', x.line)
  sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used[1]) if used else []
  return sum(map(int, sizes))
