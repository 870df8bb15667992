"""Counts the HBM bytes of a whole compiled train step, with connections and without. No TPU is needed, only libtpu.

    .venv/bin/python benchmarks/tpu_step_traffic.py --layers 4 --which stock,xla,fused

Each row is MaxText's train step, compiled ahead of time for a topology: `stock` is the model without MUDD connections,
`xla` has them with mudd_kernel=xla, `fused` with mudd_kernel=auto. No FFN is re-allocated, so that only the connections
differ. Nothing runs. Bytes are counted in the final HLO of one chip. Arrays that stay in VMEM do not count; a copy into
VMEM counts once.
"""

import argparse
import collections
import json
import pathlib
import sys

import compiled_step
import record
from record import MeasurementError
import tpu_hlo

from maxtext_mudd.config import versions

FORMS = {
  "stock": {"mudd": False},
  "xla": {"mudd_kernel": "xla"},
  "fused": {"mudd_kernel": "auto"},
}
COMMON = {"mudd_ffn_reallocation": False, "remat_policy": "full", "scan_layers": False}
KERNEL_PREFIX = "depth_aggregate_"  # the names of the fused kernels begin with it
PASSES = ("forward", "backward", "push")


def measure(form: str, yaml: str, topology: str, keys: dict, keep: str | None) -> dict:
  """Compiles one row of the table.

  Args:
    form: one of FORMS.
    keep: a folder to write the HLO to.
  """
  config, compiled, seconds = compiled_step.compile_step(yaml, topology, COMMON | keys | FORMS[form])
  hlo = compiled.as_text()
  if keep:
    (pathlib.Path(keep) / f"{form}.txt").write_text(hlo)
  memory = compiled.memory_analysis()
  return {
    "form": form,
    "yaml": yaml,
    "topology": topology,
    "layers": config.num_decoder_layers,
    "unit_bytes": int(2 * config.per_device_batch_size * config.max_target_length * config.emb_dim),
    "compile_seconds": seconds,
    "temporary_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
  } | step_bytes(hlo)


def step_bytes(hlo: str, buffer: tuple[int, float] | None = None) -> dict:
  """HBM bytes of one chip: in all, by Pallas kernel (with the number of calls), and by opcode for the rest.

  Args:
    buffer: as in `tpu_hlo.hlo_bytes`.
  """
  program = tpu_hlo.computations(hlo)
  instructions = {x.name: x for part in program.values() for x in part}
  kernels, calls, opcodes = collections.Counter(), collections.Counter(), collections.Counter()
  for name, size in tpu_hlo.hlo_bytes(program, kernels=True, buffer=buffer).items():
    if tpu_hlo.KERNEL in instructions[name].line:
      kernel = name.rstrip(".0123456789")
      kernels[kernel] += size
      calls[kernel] += 1
    else:
      opcodes[instructions[name].opcode] += size
  total = kernels.total() + opcodes.total()
  return {"hbm_bytes": total, "kernel_bytes": kernels, "kernel_calls": calls, "opcode_bytes": opcodes}


# ---------------------------------------------------------------- the tables

COLUMNS = ["code", "L", "compile, s", "HBM GB", "units", "beyond stock", "temporaries GB", "units"]
COLUMNS += [*PASSES, "all else"]
NOTES = """
All figures are those of one chip and one step. Units: HBM bytes in arrays of [B,T,D] in bfloat16, with B per device.
Temporaries: the most memory held beside the arguments, as the compiler states it. Forward, backward, push: units moved
by the fused kernels. All else: units moved by the rest of the step, attention included.
Each instruction counts as reading its operands and writing its results, with the padding of tiles, times the trips of
the loops around it. An array that a kernel updates in place is read once and written once. Arrays that stay in VMEM do
not count; a copy into or out of VMEM counts once. Collectives read their operand and write their result on this chip;
traffic between chips does not count. Kernels count as moving each array once, although attention moves some more often;
fusions count as reading a whole operand, although they may use a slice of it. Both hold for stock as well. Nothing ran
on a TPU.
"""


def cells(row: dict, stock: dict | None) -> list[str]:
  """The cells of a row in the table. `stock` is the stock row to compare it with."""
  unit = row["unit_bytes"]
  pass_bytes = {x: row["kernel_bytes"].get(KERNEL_PREFIX + x, 0) for x in PASSES}
  return [
    row["form"],
    str(row["layers"]),
    f"{row['compile_seconds']:.0f}",
    f"{row['hbm_bytes'] / 1e9:.1f}",
    f"{row['hbm_bytes'] / unit:.0f}",
    f"{(row['hbm_bytes'] - stock['hbm_bytes']) / unit:.0f}" if stock else "-",
    f"{row['temporary_bytes'] / 1e9:.2f}",
    f"{row['temporary_bytes'] / unit:.1f}",
    *(f"{size / unit:.0f}" if size else "-" for size in pass_bytes.values()),
    f"{(row['hbm_bytes'] - sum(pass_bytes.values())) / unit:.0f}",
  ]


def stock_of(rows: list[dict]) -> dict | None:
  return next((x for x in rows if x["form"] == "stock"), None)


def by_kind(rows: list[dict]) -> str:
  """A table of units by kind of instruction, which shows where the difference to stock comes from."""
  units = {}
  for i, row in enumerate(rows):
    for name, size in [*row["kernel_bytes"].items(), *row["opcode_bytes"].items()]:
      calls = row["kernel_calls"].get(name)
      units.setdefault(name, ["-"] * len(rows))[i] = f"{size / row['unit_bytes']:.0f}" + (
        f" in {calls}" if calls else ""
      )
  shown = {x: line for x, line in units.items() if any(cell[:1] not in "-0" for cell in line)}
  return record.table(["units (in calls)", *(x["form"] for x in rows)], [[x, *line] for x, line in shown.items()])


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--yaml", default="yaml/mudd_2p8b.yml", help="a model with MUDD connections; default: %(default)s"
  )
  parser.add_argument("--layers", type=int, help="base_num_decoder_layers; by default the YAML's")
  parser.add_argument("--batch", type=float, default=4, help="per_device_batch_size; default: %(default)s")
  parser.add_argument("--which", default=",".join(FORMS), help="comma-separated; by default all: %(default)s")
  parser.add_argument("--topology", default="v5p-8", help="as MaxText names them; default: %(default)s")
  parser.add_argument("--output", help="name of the .md and .json to write to benchmarks/results/")
  parser.add_argument("--keep", type=pathlib.Path, help="a folder, to keep the HLO in")
  options = parser.parse_args()
  problem = refusal(options)
  if problem:
    print(problem, file=sys.stderr)
    return 2
  if options.keep:
    options.keep.mkdir(parents=True, exist_ok=True)
  keys = {"per_device_batch_size": options.batch}
  if options.layers:
    keys["base_num_decoder_layers"] = options.layers
  case = [options.yaml, options.topology, keys, str(options.keep.absolute()) if options.keep else None]
  about = record.facts(options.topology)
  rows, failed = [], False
  print(record.table(COLUMNS, []), end="", flush=True)
  for form in options.which.split(","):
    try:
      rows.append(record.in_own_process(__file__, form, [json.dumps([form, *case])], compiled_step.INIT_ARGS))
      print(record.table(COLUMNS, [cells(rows[-1], stock_of(rows))]).splitlines()[-1], flush=True)
    except MeasurementError as error:
      print(error, file=sys.stderr, flush=True)
      failed = True
  text = record.table(COLUMNS, [cells(x, stock_of(rows)) for x in rows]) + NOTES + "\n" + by_kind(rows)
  print(NOTES + "\n" + by_kind(rows))
  if options.output:
    record.write(options.output, about, text, rows)
  return 2 if failed else 0


def refusal(options) -> str | None:
  """A sentence about an option that cannot work; None if all can."""
  for name in options.which.split(","):
    if name not in FORMS:
      return f"--which has {name!r}; use some of {', '.join(FORMS)}."
  if not pathlib.Path(options.yaml).is_file():
    return f"--yaml {options.yaml} is not a file; name one, such as yaml/mudd_2p8b.yml."
  if options.layers is not None and options.layers < 1:
    return f"--layers is {options.layers}; at least 1 is needed."
  if not options.batch > 0:
    return f"--batch is {options.batch:g}; more than 0 is needed."
  return versions.missing_libtpu()


if __name__ == "__main__":
  if sys.argv[1:2] == ["_one"]:
    print(json.dumps(measure(*json.loads(sys.argv[2]))))
  else:
    sys.exit(main())
