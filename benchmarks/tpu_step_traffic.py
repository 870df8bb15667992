"""HBM bytes of a whole compiled train step, beyond those of stock MaxText: no TPU is needed, only libtpu.

    python benchmarks/tpu_step_traffic.py --layers 4 --which stock,xla,fused

Each row is MaxText's train step, compiled ahead of time for a topology: `stock` is the model without MUDD connections,
`xla` has them by mudd_kernel=xla, `fused` by mudd_kernel=auto. No FFN is re-allocated, so that only the connections
differ. Nothing runs. Bytes are those of the final HLO of one chip, and so the compiler's word on what it left to move:
what stays in VMEM is not counted, what is copied into it is counted once.
"""

import argparse
import collections
import json
import pathlib
import sys

import compiled_step
import record
import tpu_schedule
from tpu_schedule import NotUnderstood

from maxtext_mudd import versions

FORMS = {
  "stock": {"mudd": False},
  "xla": {"mudd_kernel": "xla"},
  "fused": {"mudd_kernel": "auto"},
}
COMMON = {"mudd_ffn_reallocation": False, "remat_policy": "full", "scan_layers": False}
OURS = "depth_aggregate_"
PASSES = ("forward", "backward", "push")


def measure(form: str, yaml: str, topology: str, keys: dict, keep: str | None) -> dict:
  """One row of the table."""
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


def step_bytes(hlo: str) -> dict:
  """HBM bytes of one chip: all, by Pallas kernel (with the number of calls), and by opcode of all else."""
  program = tpu_schedule.computations(hlo)
  instructions = {x.name: x for part in program.values() for x in part}
  kernels, calls, opcodes = collections.Counter(), collections.Counter(), collections.Counter()
  for name, size in tpu_schedule.hlo_bytes(program, kernels=True).items():
    if tpu_schedule.KERNEL in instructions[name].line:
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
Of one chip and one step. Units: HBM bytes in arrays of [B,T,D] in bfloat16, with B per device. Temporaries: the most
memory held beside the arguments, by the compiler's own account. Forward, backward, push: units moved by the fused
kernels; all else: by the rest of the step, attention included.
Counted: each instruction reads its operands and writes its results, padding to tiles included, loops weighted. An
array that a kernel updates in place is read once and written once. What stays in VMEM is not counted, and a copy into
it or out of it counts once. Collectives read their operand and write their result, on this chip; links are not
counted. Kernels are taken to move each array once, which attention does not, and fusions to read all of an operand of
which they may use a slice; both hold for stock as well. Nothing ran on a TPU.
"""


def cells(row: dict, stock: dict | None) -> list[str]:
  unit = row["unit_bytes"]
  ours = {x: row["kernel_bytes"].get(OURS + x, 0) for x in PASSES}
  return [
    row["form"],
    str(row["layers"]),
    f"{row['compile_seconds']:.0f}",
    f"{row['hbm_bytes'] / 1e9:.1f}",
    f"{row['hbm_bytes'] / unit:.0f}",
    f"{(row['hbm_bytes'] - stock['hbm_bytes']) / unit:.0f}" if stock else "-",
    f"{row['temporary_bytes'] / 1e9:.2f}",
    f"{row['temporary_bytes'] / unit:.1f}",
    *(f"{size / unit:.0f}" if size else "-" for size in ours.values()),
    f"{(row['hbm_bytes'] - sum(ours.values())) / unit:.0f}",
  ]


def stock_of(rows: list[dict]) -> dict | None:
  return next((x for x in rows if x["form"] == "stock"), None)


def by_kind(rows: list[dict]) -> str:
  """Units by kind of instruction: where the difference to stock lies."""
  kinds = {}
  for i, row in enumerate(rows):
    for name, size in [*row["kernel_bytes"].items(), *row["opcode_bytes"].items()]:
      calls = row["kernel_calls"].get(name)
      kinds.setdefault(name, ["-"] * len(rows))[i] = f"{size / row['unit_bytes']:.0f}" + (
        f" in {calls}" if calls else ""
      )
  shown = {x: line for x, line in kinds.items() if any(cell[:1] not in "-0" for cell in line)}
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
    except NotUnderstood as error:
      print(error, file=sys.stderr, flush=True)
      failed = True
  text = record.table(COLUMNS, [cells(x, stock_of(rows)) for x in rows]) + NOTES + "\n" + by_kind(rows)
  print(NOTES + "\n" + by_kind(rows))
  if options.output:
    record.write(options.output, about, text, rows)
  return 2 if failed else 0


def refusal(options) -> str | None:
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
