"""Compiles one depth-wise aggregate for TPUs and derives a lower bound of its time. No TPU is needed, only libtpu.

    .venv/bin/python benchmarks/tpu_static_cost.py --chips v5p,v6e --shapes 2p8b --weights mlp,array

Each row is one compilation. Its lower bound, called bracket, is the larger of two times: HBM bytes over bandwidth, and
the scheduled cycles of each core over the clock. The floor is the same bound for a program that reads every input once
and writes every output once. Bytes are those of the compiled program, with every copy around a kernel. The JSON also
has the bytes of XLA's `cost_analysis`, which leaves out the traffic of kernels and includes arrays that stay in VMEM.
Cycles are those of the compiler's schedule, weighted by its loops. Nothing runs, so the achieved bandwidth is unknown.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import re
import sys
import tempfile

import record
from record import MeasurementError
import shapes
import tpu_hlo
import tpu_schedule

from maxtext_mudd.config import versions


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device of a kind of TPU.

  Attributes:
    topology: topology to compile for.
    cores: number of cores, which share the memory of the device.
    gigahertz: clock.
    gigabytes: bandwidth of its memory in GB/s.
    inferred: names of the figures that are inferred, not published.
  """

  topology: str
  cores: int
  gigahertz: float
  gigabytes: float
  inferred: str = ""


# A TPU7x has two dies. Each is a JAX device with half of the chip's 7380 GB/s. Its clock is inferred from the v6e's by
# the ratio of the bfloat16 peaks (2307 TFLOP/s of two cores, 918 of one), since the schedules show equal MXUs.
CHIPS = {
  "v5e": Chip("v5e:2x2", 1, 1.5, 819),
  "v5p": Chip("v5p:2x2x1", 2, 1.75, 2765),
  "v6e": Chip("v6e:2x2x1", 1, 1.75, 1640, "clock"),
  "tpu7x": Chip("tpu7x:2x2x1", 1, 2.2, 3690, "clock, and bandwidth as half a chip's"),
}
LISTS = {  # the options that take several names, with the names that they take
  "chips": CHIPS,
  "shapes": shapes.PAPER,
  "implementations": ("xla", "pallas"),
  "weights": ("mlp", "array", "channels"),
  "directions": ("forward", "backward"),
}
DEFAULTS = {"weights": "mlp"}  # the other options take all names by default
MOST_UNSCHEDULED = 0.01  # no cycles are given if instructions without a schedule move a larger share of the bytes


# ---------------------------------------------------------------- bytes of a Pallas kernel


def pallas_calls(jaxpr):
  """All equations of a jaxpr that call a Pallas kernel."""
  from jax._src import core  # JAX has no public function that walks over nested jaxprs

  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
    else:
      for inner in core.jaxprs_in_params(equation.params):
        yield from pallas_calls(inner)


def kernel_bytes(equation, cores: int) -> int:
  """HBM bytes of one kernel: a block is copied whenever its index differs from the index in the step before."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  mapping = equation.params["grid_mapping"]
  if mapping.num_index_operands:
    raise MeasurementError("The kernel's blocks depend on prefetched scalars; their bytes cannot be counted here.")
  steps = np.stack(np.unravel_index(np.arange(math.prod(mapping.grid)), mapping.grid)).astype(np.int32)
  total = 0
  for block in mapping.block_mappings:
    whole = block.array_aval
    if re.search("<(any|hbm)>", str(block.transformed_block_aval)):  # the kernel copies it itself: assumed to be once
      total += math.prod(whole.shape) * whole.dtype.itemsize
      continue
    sizes = np.array([getattr(x, "block_size", x if isinstance(x, int) else 1) for x in block.block_shape])
    index_map = block.index_map_jaxpr
    indices = jax.vmap(functools.partial(jax.core.eval_jaxpr, index_map.jaxpr, index_map.consts))(
      *(jnp.asarray(x) for x in steps)
    )
    starts = np.stack([np.asarray(x) for x in indices], axis=1) * sizes
    moved = np.minimum(sizes, np.array(whole.shape) - starts).prod(1)
    is_copied = np.ones(len(starts), bool)
    is_copied[1:] = (starts[1:] != starts[:-1]).any(1)
    is_copied[:: -(-len(starts) // cores)] = True  # the first step of each core
    total += int(moved[is_copied].sum()) * whole.dtype.itemsize
  return total


def kernel_loops(jaxpr) -> set[int]:
  """The trips of all loops in the source of a kernel. Those in its schedule must be among them."""
  from jax._src import core

  trips = set()
  for equation in jaxpr.eqns:
    if equation.primitive.name == "scan":
      trips.add(equation.params["length"] // equation.params["unroll"])
    for inner in core.jaxprs_in_params(equation.params):
      trips |= kernel_loops(inner)
  return trips


# ---------------------------------------------------------------- one compilation


@dataclasses.dataclass(frozen=True)
class Case:
  """One row of the table: what is compiled, and for which chip."""

  chip: str
  shape: str
  implementation: str
  weights: str
  direction: str
  sources: int
  width: int
  ways: int
  hidden: int
  batch: int
  length: int


def compile_case(case: Case):
  """The traced and the compiled program. The backward one is the VJP, whose residuals are the inputs."""
  import jax
  from jax.experimental import topologies
  import jax.numpy as jnp
  import numpy as np

  from maxtext_mudd import kernels

  topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[case.chip].topology)
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

  row = array(case.batch, case.length, case.width)
  if case.weights == "mlp":
    w2, a = array(case.hidden, case.ways, case.sources), array(case.ways, case.sources)
    weights = kernels.WeightMLP(array(case.width, case.hidden), w2, a)
  elif case.weights == "channels":
    of_tokens = array(case.batch, case.length, case.ways, 1, case.sources)
    weights = kernels.ChannelWeights(of_tokens, array(case.ways, case.width, case.sources))
  else:
    weights = array(case.batch, case.length, case.ways, case.sources)
  call = functools.partial(kernels.mix, implementation=case.implementation)
  args = ([row] * case.sources, weights)
  if case.direction == "forward":
    step = call
  else:

    def step(sources, weights, cotangents):
      return jax.vjp(call, sources, weights)[1](cotangents)

    args = (*args, [row] * case.ways)
  traced = jax.jit(step).trace(*args)
  return traced, traced.lower().compile()


def floor_bytes(case: Case) -> int:
  """HBM bytes if every input is read once and every output is written once, in bfloat16."""
  tokens, columns = case.batch * case.length, case.ways * case.sources
  row = tokens * case.width
  weights = {
    "array": tokens * columns,
    "channels": (tokens + case.width) * columns,
    "mlp": case.width * case.hidden + columns * (case.hidden + 1),
  }[case.weights]
  rows = case.sources + case.ways if case.direction == "forward" else 2 * case.sources + case.ways
  return 2 * (rows * row + weights * (1 if case.direction == "forward" else 2))


def measure(case: Case, folder: pathlib.Path) -> dict:
  """Compiles one case; `folder` has the compiler's dumps."""
  chip = CHIPS[case.chip]
  traced, compiled = compile_case(case)
  program = tpu_hlo.computations(compiled.as_text())
  sizes = tpu_hlo.hlo_bytes(program)
  kernels = read_kernels(program, traced.jaxpr.jaxpr, folder, chip)
  sizes.update({name: kernel["hbm_bytes"] for name, kernel in kernels.items()})
  hbm = sum(sizes.values())
  cycles, unscheduled = 0, 0
  schedules = tpu_schedule.Schedules(program, folder)
  for x in program[""]:
    schedule = kernels.get(x.name) or schedules.of(x)
    cycles += schedule["cycles"] if schedule else 0
    unscheduled += sizes[x.name] if not schedule and x.opcode not in tpu_hlo.DMA else 0
  if unscheduled > MOST_UNSCHEDULED * hbm:
    cycles = None
  large = [x for x in program[""] if sizes[x.name] > hbm / 100]
  cores = [kernels[x.name]["cores"] if x.name in kernels else fusion_cores(x, chip) for x in large]
  row = dataclasses.asdict(case) | {
    "hbm_bytes": hbm,
    "floor_bytes": floor_bytes(case),
    "around_kernel_bytes": hbm - sum(x["hbm_bytes"] for x in kernels.values()),
    "analysed_bytes": compiled.cost_analysis().get("bytes accessed"),
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    "vmem_bytes": max(map(tpu_hlo.vmem_bytes, program[""])),
    "cycles": cycles,
    "unscheduled_bytes": unscheduled,
    "cores": None if None in cores else min(cores),
    "kernels": list(kernels.values()),
    "hbm_seconds": hbm / (chip.gigabytes * 1e9),
    "cycle_seconds": None if cycles is None else cycles / (chip.gigahertz * 1e9),
  }
  row["floor_seconds"] = row["floor_bytes"] / (chip.gigabytes * 1e9)
  row["bracket_seconds"] = max(row["hbm_seconds"], row["cycle_seconds"] or 0)
  row["bound"] = "HBM" if row["bracket_seconds"] == row["hbm_seconds"] else "cycles"
  return row


def read_kernels(program, jaxpr, folder: pathlib.Path, chip: Chip) -> dict[str, dict]:
  """The figures of each Pallas kernel of a program, by name, from its schedule.

  Raises:
    MeasurementError: the schedule does not agree with the traced kernel.
  """
  equations = {x.params["name"]: x for x in pallas_calls(jaxpr)}
  kernels = {}
  for x in program[""]:
    if tpu_hlo.KERNEL not in x.line:
      continue
    equation = next((e for name, e in equations.items() if name in x.name), None)
    if equation is None:
      raise MeasurementError(f"The kernel {x.name} of the HLO was not found in the traced program.")
    schedule = tpu_schedule.read(folder, x.name)
    traced = kernel_loops(equation.params["jaxpr"])
    unknown = [y.trips for y in schedule.loops if not y.is_grid and y.trips not in traced]
    if unknown:
      raise MeasurementError(f"{x.name} loops {unknown} times in its schedule, but {sorted(traced)} times as traced.")
    grid = equation.params["grid_mapping"].grid
    cores = kernel_cores(schedule, grid, chip)
    others = {"grid": grid, "cores": cores, "hbm_bytes": kernel_bytes(equation, cores or 1)}
    kernels[x.name] = describe(schedule) | others
  return kernels


def kernel_cores(schedule, grid: tuple[int, ...], chip: Chip) -> int | None:
  """How many cores share a kernel: its grid steps over those of one core. None if the compiler does not show it."""
  if chip.cores == 1:
    return 1
  if not schedule.grid:
    return None
  cores = -(-math.prod(grid) // math.prod(schedule.grid))
  return cores if cores == 1 or (cores == chip.cores and schedule.names_core) else None


def fusion_cores(x: tpu_hlo.Instruction, chip: Chip) -> int | None:
  """How many cores share a fusion, by XLA's note on it. None if there is no note, as for copies."""
  if chip.cores == 1:
    return 1
  return chip.cores if re.search(r'"megacore_split_dim":"\d+"', x.line) else None


def describe(schedule: tpu_schedule.Schedule) -> dict:
  """The figures of a schedule, for the results."""
  inner = schedule.inner
  counted = schedule.counted(inner) if inner else {}
  return {
    "name": schedule.name,
    "cycles": schedule.cycles,
    "core_grid": schedule.grid,
    "loops": [dataclasses.asdict(x) | {"trips": x.trips} for x in schedule.loops],
    "cycles_per_step": schedule.parts(),
    "busy": schedule.busy(),
    "slots": schedule.slots,
    "inner_bundles": inner.last - inner.first + 1 if inner else None,
    "inner_counts": counted,
    "inner_spills": schedule.spills(inner) if inner else None,
  }


# ---------------------------------------------------------------- the table

COLUMNS = (
  "chip",
  "shape",
  "N",
  "code",
  "weights",
  "direction",
  "units",
  "HBM / floor",
  "VMEM MB",
  "kcycles",
  "cores",
  "spills",
)
COLUMNS += ("slots, %", "HBM µs", "cycles µs", "bound by", "bracket / floor")
SHOWN = {"MATMUL": "matmul", "MATPUSH": "push", "VALU": "VALU", "VLOAD": "load", "VSTORE": "store", "XLU": "XLU"}
NOTES = f"""
Units: HBM bytes over the bytes of one array [B,T,D]. Every instruction around the kernel counts. Arrays that a kernel
copies by its own DMAs count once. Floor: the bytes if each input is read once and each output is written once, and the
time that HBM takes for these bytes. VMEM: the most that one kernel or fusion holds. Cycles: those of one core, weighted
by loops, with latencies; "-" if instructions without a schedule move more than {MOST_UNSCHEDULED:.0%} of the bytes.
Cores: how many share each large instruction, by the grid in the schedule of one core or by XLA's note; "?" if the
compiler does not show it. Spills: vector registers stored to VMEM plus those loaded back, in every trip through the
kernel's inner loop. Slots: the share of all cycles in which a slot is taken, for {", ".join(SHOWN.values())}.
Bracket: a lower bound of the time, the larger of HBM time and cycle time. Nothing ran on a TPU.
Inferred: {"; ".join(f"{name}, {x.inferred}" for name, x in CHIPS.items() if x.inferred)}.
"""


def cells(row: dict) -> list[str]:
  """The cells of a row in the table."""
  kernel = max(row["kernels"], key=lambda k: k["cycles"], default=None)
  unit = 2 * row["batch"] * row["length"] * row["width"]
  return [
    *(str(row[x]) for x in ("chip", "shape", "sources", "implementation", "weights", "direction")),
    f"{row['hbm_bytes'] / unit:.1f}",
    f"{row['hbm_bytes'] / row['floor_bytes']:.3f}",
    f"{row['vmem_bytes'] / 2**20:.1f}",
    "-" if row["cycles"] is None else f"{row['cycles'] / 1e3:.0f}",
    str(row["cores"] or "?"),
    str(kernel["inner_spills"]) if kernel else "-",
    " ".join(f"{100 * kernel['busy'][x]:.0f}" for x in SHOWN) if kernel else "-",
    f"{row['hbm_seconds'] * 1e6:.0f}",
    "-" if row["cycles"] is None else f"{row['cycle_seconds'] * 1e6:.0f}",
    row["bound"],
    f"{row['bracket_seconds'] / row['floor_seconds']:.2f}",
  ]


def markdown(rows: list[dict]) -> str:
  return record.table(COLUMNS, [cells(row) for row in rows])


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, known in LISTS.items():
    values = f"comma-separated, some of {', '.join(known)}; default: %(default)s"
    parser.add_argument(f"--{name}", default=DEFAULTS.get(name, ",".join(known)), help=values)
  parser.add_argument("--sources", type=int, help="N; by default L + 1")
  parser.add_argument("--ways", type=int, default=4)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--length", type=int, default=2048)
  parser.add_argument("--output", help="name of the .md and .json to write to benchmarks/results/")
  parser.add_argument("--keep", type=pathlib.Path, help="a new folder, to keep the compiler's dumps in")
  options = parser.parse_args()
  problem = refusal(options)
  if problem:
    print(problem, file=sys.stderr)
    return 2
  about = record.facts(", ".join(f"{x} (compiled for {CHIPS[x].topology})" for x in options.chips.split(",")))
  rows, failed = [], False
  print(markdown([]), end="", flush=True)
  for case in cases(options):
    try:
      rows.append(in_own_process(case, options.keep))
      print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    except MeasurementError as error:
      print(error, file=sys.stderr, flush=True)
      failed = True
  print(NOTES)
  if options.output:
    record.write(options.output, about, markdown(rows) + NOTES, rows)
  return 2 if failed else 0


def refusal(options) -> str | None:
  """A sentence about an option that cannot work; None if all can."""
  for key, known in LISTS.items():
    for name in getattr(options, key).split(","):
      if name not in known:
        return f"--{key} has {name!r}; use some of {', '.join(known)}."
  for name in ("sources", "ways", "batch", "length"):
    value = getattr(options, name)
    if value is not None and value < 1:
      return f"--{name} is {value}; at least 1 is needed."
  if options.keep and options.keep.exists():
    return f"--keep {options.keep} exists already; name a new folder."
  return versions.missing_libtpu()


def cases(options):
  """All combinations of the options, as `Case`s."""
  chips, names, *others = (getattr(options, key).split(",") for key in LISTS)
  for name, chip, implementation, weights, direction in itertools.product(names, chips, *others):
    shape = shapes.PAPER[name]
    sources = options.sources or shape.sources
    hidden = shapes.hidden_width(options.ways, sources)
    sizes = (sources, shape.width, options.ways, hidden, options.batch, options.length)
    yield Case(chip, name, implementation, weights, direction, *sizes)


def in_own_process(case: Case, keep: pathlib.Path | None) -> dict:
  """`measure` in a process of its own, whose compiler dumps go to `keep` or to a temporary folder."""
  name = "-".join((case.chip, case.shape, case.implementation, case.weights, case.direction))
  with tempfile.TemporaryDirectory() as scratch:
    folder = (keep or pathlib.Path(scratch)).absolute() / name
    folder.mkdir(parents=True)
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    return record.in_own_process(__file__, name, [json.dumps(dataclasses.asdict(case)), str(folder)], dump)


if __name__ == "__main__":
  if sys.argv[1:2] == ["_one"]:
    print(json.dumps(measure(Case(**json.loads(sys.argv[2])), pathlib.Path(sys.argv[3]))))
  else:
    sys.exit(main())
