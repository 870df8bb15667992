"""Compiles models for TPU pods; reports the time to compile and the memory of a chip that they need.

    .venv/bin/python benchmarks/aot.py --models 405m,2p8b --output 2026-11-22-aot
    .venv/bin/python benchmarks/aot.py --models gemma3-12b,deepseek2-16b --output 2026-11-29-aot-other-decoders
    .venv/bin/python benchmarks/aot.py --models 2p8b,6p9b,llama2-70b --pipeline 4 --microbatches 16

Each row is the train step of one configuration in yaml/, with the batch size of its file, compiled ahead of time on
this host for all chips of a topology; or of a model that MaxText has by name, with MUDD's default keys. Rows named
`stock` are the plain model of the same size in MaxText without connections. With --pipeline, both are on a pipeline
without repeats, with FSDP within its stages, and no FFN is re-allocated. No TPU is needed, and no compiled program
runs.
"""

import argparse
import json
import sys

import compiled_step
import families
import record
from record import MeasurementError
import tpu_hlo
import tpu_step_traffic

from maxtext_mudd.config import versions

# Topologies by model. The first is the one on which the file in yaml/ has the paper's batch.
MODELS = {"405m": ("v5p-16", "v6e-8"), "1p4b": ("v5p-32",), "2p8b": ("v5p-128",), "6p9b": ("v5p-128",)}
# Models of MaxText's that have other decoder blocks, by their names there, with keys for one sequence on each chip.
BY_NAME = {"gemma3-12b": ("v5p-64",), "deepseek2-16b": ("v5p-64",), "llama2-70b": ("v5p-128",)}
OF_NAMED = {"max_target_length": 4096, "per_device_batch_size": 1, "remat_policy": "full"}
LAYERS = {"405m": 24, "1p4b": 24, "2p8b": 32, "6p9b": 32, "llama2-70b": 80}  # of models that can be on a pipeline
ALSO_SINGLE = ("405m",)  # models that are compiled with single layers, too
# Default keys of MUDD models whose layers are scanned and whose FFNs are re-allocated.
SCANNED_KEYS = {"mudd_ffn_groups": 2, "mudd_ffn_parts": 2}
CHIP_GIB = {"v5p": 95.74, "v6e": 31.25}  # memory that the compiler lets a program use
COLUMNS = [
  "model",
  "topology",
  "layers",
  "code",
  "compile, s",
  "to stock",
  "arguments GB",
  "temporaries GB",
  "to stock",
  "HBM GB",
  "beyond stock / floor",
]
COLUMNS += ["both, of the chip"]
OF_PIPELINE = ["sent GB", "not in rings / plan", "beside blocks"]  # further columns
NOTES = """
Memory is that of one chip. Models by name have no re-allocated FFNs. For files of yaml/: {widths}
Arguments: parameters, moments and data, which are updated in place. Temporaries: the most memory that the step holds
besides the arguments, as the compiler states it, with the outputs that do not replace arguments. To stock: the value
divided by that of the stock row above. HBM: bytes that the final HLO moves in a step on one chip, as
benchmarks/tpu_step_traffic.py counts them; those beyond stock are divided by what the aggregates have to move, as
benchmarks/families.py states it. Compile seconds were measured on this host and depend on its other load. Nothing
ran on a TPU.
"""
PIPELINE_NOTES = """
{stages} stages of equally many blocks, {microbatches} microbatches, no repeats; layers of a stage are scanned. Sent:
bytes that the pipeline's own collective-permutes send in a step, of all chips together. In a ring of stages stock moves
inputs and results of the pipeline, and what passes between stages. With connections the latter is sent between
neighbours alone; plan is what `python3 -m maxtext_mudd.complexity` says of that with pipeline={stages}, forward and
backward, in every turn. Beside blocks: the share of sent that the schedule has under way while the loop over the blocks
of a stage runs.
"""
_FALSE = ("false", "no", "off", "f", "n", "0")  # the texts that MaxText reads as false


def cases(models: list[str], single: bool = True):
  """(model, topology, whether scanned, whether MUDD) of each row.

  Args:
    single: whether some models are compiled with single layers, too.
  """
  for model in models:
    for topology in (MODELS | BY_NAME)[model]:
      for scan in (True, False) if single and model in ALSO_SINGLE else (True,):
        for mudd in (False, True):
          yield model, topology, scan, mudd


def pipeline_keys(model: str, stages: int, microbatches: int, overrides: dict) -> dict:
  """The keys that put a model on a pipeline without repeats."""
  return {
    "ici_pipeline_parallelism": stages,
    "num_layers_per_pipeline_stage": int(overrides.get("base_num_decoder_layers", LAYERS[model])) // stages,
    "num_pipeline_microbatches": microbatches,
    "scan_layers_per_stage": True,
  }


def keys_of(scan: bool, mudd: bool, overrides: dict) -> dict:
  """The keys that a row sets on top of its file. Stock rows leave out the overrides that only connections read."""
  keys = {"scan_layers": scan, **overrides}
  if not mudd:
    import compared_models  # late, because it imports MaxText

    return compared_models.stock_keys(keys)
  return SCANNED_KEYS | keys if scan and _reallocated(overrides) else keys


def _reallocated(overrides: dict) -> bool:
  return str(overrides.get("mudd_ffn_reallocation", True)).lower() not in _FALSE


def widths(overrides: dict) -> str:
  """A sentence about the FFNs of MUDD rows, for the notes below the table."""
  scanned, single = ({"mudd_ffn_groups": 0, "mudd_ffn_parts": 1} | keys_of(x, True, overrides) for x in (True, False))

  def named(keys):
    return ", ".join(f"{key}={keys[key]}" for key in SCANNED_KEYS)

  if not _reallocated(overrides):
    return f"No FFN is re-allocated (mudd_ffn_reallocation=false, mudd_ffn_parts={scanned['mudd_ffn_parts']})."
  return (
    f"FFNs of MUDD are re-allocated: scanned by {named(scanned)}, single by {named(single)}.\n"
    "Blocks of a group have one width; with 0 groups each has its own, as in the paper."
  )


def measure(model: str, topology: str, scan: bool, mudd: bool, overrides: dict) -> dict:
  """Compiles one row."""
  if model in BY_NAME:
    fixed = {"model_name": model, "override_model_config": True, "mudd": mudd, "scan_layers": scan, **OF_NAMED}
    yaml, keys = "yaml/mudd_base.yml", fixed | overrides
  else:
    yaml, keys = f"yaml/{'mudd' if mudd else 'transformer_pp'}_{model}.yml", keys_of(scan, mudd, overrides)
  row = {"model": model, "yaml": yaml, "topology": topology, "scan_layers": scan, "mudd": mudd}
  try:
    config, compiled, seconds = compiled_step.compile_step(yaml, topology, keys)
  except compiled_step.DoesNotFit as error:
    return row | {"does_not_fit": str(error)}
  memory = compiled.memory_analysis()
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  array = int(config.per_device_batch_size * config.max_target_length * config.emb_dim)
  hlo = compiled.as_text()
  if config.using_pipeline_parallelism:
    row |= sent_bytes(config, hlo)
  return row | {
    "per_device_batch_size": config.per_device_batch_size,
    "compile_seconds": seconds,
    "hbm_bytes": tpu_step_traffic.step_bytes(hlo, families.buffer_of(config))["hbm_bytes"],
    "floor_bytes": families.floor_units(config) * 2 * array,
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes + outputs,
  }


def sent_bytes(config, hlo: str) -> dict:
  """What the collective-permutes in the loops of a step on a pipeline send. In stock all go round in rings of stages;
  with connections only inputs and results of the pipeline do."""
  from maxtext_mudd.complexity import pipeline

  program = tpu_hlo.computations(hlo)
  sent, beside = (tpu_hlo.permuted_bytes(program, beside_loops=x) for x in (False, True))
  ring = sum(size for pairs, size in sent.items() if pairs == config.num_target_devices)
  counted = {"sent_bytes": sent.total(), "ring_bytes": ring, "beside_blocks_bytes": beside.total()}
  if not config.mudd:
    return counted
  tokens = config.micro_batch_size_to_train_on // config.num_pipeline_microbatches * config.max_target_length
  turns = config.num_pipeline_microbatches + config.ici_pipeline_parallelism - 1
  planned = 2 * turns * pipeline.traffic(config).total_bytes * tokens
  return counted | {"planned_bytes": planned}


def cells(row: dict, stock: dict | None, on_pipeline: bool = False) -> list[str]:
  """The cells of a row in the table. `stock` is the stock row to compare it with."""

  def ratio(key):
    return f"{row[key] / stock[key]:.2f}" if row["mudd"] and stock and key in stock else "-"

  chip = CHIP_GIB[row["topology"].split("-")[0]] * 2**30
  case = [row["topology"], "scanned" if row["scan_layers"] else "single", "MUDD" if row["mudd"] else "stock"]
  of_pipeline = ["-"] * len(OF_PIPELINE) if on_pipeline else []
  if "sent_bytes" in row:
    of_connections = row["sent_bytes"] - row["ring_bytes"]
    share = f"{of_connections / row['planned_bytes']:.3f}" if "planned_bytes" in row else "-"
    beside = f"{100 * row['beside_blocks_bytes'] / row['sent_bytes']:.0f} %"
    of_pipeline = [f"{row['sent_bytes'] / 1e9:.1f}", share, beside]
  if "does_not_fit" in row:
    return [row["model"], *case, *["-"] * 7, "does not fit", *of_pipeline]
  beyond = "-"
  if row["mudd"] and stock and "hbm_bytes" in stock:
    beyond = f"{(row['hbm_bytes'] - stock['hbm_bytes']) / row['floor_bytes']:.2f}"
  return [
    f"{row['model']}, batch {row['per_device_batch_size']:g}",
    *case,
    f"{row['compile_seconds']:.0f}",
    ratio("compile_seconds"),
    f"{row['argument_bytes'] / 1e9:.2f}",
    f"{row['temporary_bytes'] / 1e9:.2f}",
    ratio("temporary_bytes"),
    f"{row['hbm_bytes'] / 1e9:.0f}",
    beyond,
    f"{100 * (row['argument_bytes'] + row['temporary_bytes']) / chip:.0f} %",
    *of_pipeline,
  ]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--models", default=",".join(MODELS), help="comma-separated; by default all: %(default)s")
  parser.add_argument("--pipeline", type=int, default=1, metavar="S", help="stages of a pipeline; default: no pipeline")
  parser.add_argument("--microbatches", type=int, metavar="M", help="of the pipeline; default: S")
  parser.add_argument("--output", help="name of the .md and .json to write to benchmarks/results/")
  parser.add_argument(
    "overrides", nargs="*", metavar="key=value", help="for all rows that read it, as per_device_batch_size=4"
  )
  options = parser.parse_args()
  models = options.models.split(",")
  unknown = [model for model in models if model not in MODELS | BY_NAME]
  wrong = [x for x in options.overrides if "=" not in x]
  stages, microbatches = options.pipeline, options.microbatches or options.pipeline
  off_pipelines = [model for model in models if stages > 1 and model not in LAYERS]
  problem = versions.missing_libtpu()
  if unknown:
    problem = f"--models has {unknown[0]!r}; use some of {', '.join(MODELS | BY_NAME)}."
  elif off_pipelines:
    problem = f"--pipeline is for {', '.join(LAYERS)}, and not for {off_pipelines[0]}."
  elif wrong:
    problem = f"{wrong[0]!r} is not key=value."
  if problem:
    print(problem, file=sys.stderr)
    return 2
  keys = dict(x.split("=", 1) for x in options.overrides)
  columns, notes = COLUMNS, NOTES
  if stages > 1:
    keys["mudd_ffn_reallocation"] = "false"
    columns, notes = COLUMNS + OF_PIPELINE, NOTES + PIPELINE_NOTES
  about = record.facts(", ".join(sorted({topology for model in models for topology in (MODELS | BY_NAME)[model]})))
  rows, lines, failed, stock = [], [], False, None
  print(record.table(columns, []), end="", flush=True)
  for case in cases(models, single=stages == 1):
    of_case = keys | (pipeline_keys(case[0], stages, microbatches, keys) if stages > 1 else {})
    try:
      row = record.in_own_process(
        __file__, " ".join(map(str, case)), [json.dumps([*case, of_case])], compiled_step.INIT_ARGS
      )
    except MeasurementError as error:
      print(error, file=sys.stderr, flush=True)
      failed, stock = True, None
      continue
    stock = stock if row["mudd"] else row
    rows.append(row)
    if "does_not_fit" in row:
      print(row["does_not_fit"], file=sys.stderr, flush=True)
    lines.append(cells(row, stock, on_pipeline=stages > 1))
    print(record.table(columns, lines[-1:]).splitlines()[-1], flush=True)
  refused = [f"- {row['model']} on {row['topology']}: {row['does_not_fit']}\n" for row in rows if "does_not_fit" in row]
  notes = notes.format(widths=widths(keys), stages=stages, microbatches=microbatches) + "".join(
    ["\n", *refused] if refused else []
  )
  print(notes)
  if options.output:
    record.write(options.output, about, record.table(columns, lines) + notes, rows)
  return 2 if failed else 0


if __name__ == "__main__":
  if sys.argv[1:2] == ["_one"]:
    print(json.dumps(measure(*json.loads(sys.argv[2]))))
  else:
    sys.exit(main())
