"""Compares what the families of depth connections cost in the same Transformer++: compiled for TPUs, or run here.

    .venv/bin/python benchmarks/families.py
    .venv/bin/python benchmarks/families.py --run

The first compiles the step of a plain model and of the same model with each family, ahead of time for a TPU topology,
with scanned layers and full rematerialisation; no TPU is needed, only libtpu, and nothing runs. The second trains small
models in turn on the devices of this machine. No FFN is re-allocated. With --output NAME the results go to
benchmarks/results/.
"""

import argparse
import json
import pathlib
import random
import sys

import compiled_step
import paired
import record
from record import MeasurementError
import tpu_hlo
import tpu_step_traffic

from maxtext_mudd.config import versions

PLAIN = "plain"
FAMILIES = {
  PLAIN: {"mudd": False},
  "MUDD": {},
  "DenseFormer": {"mudd_ways": 1, "mudd_dynamic": False},
  "DDFormer": {"mudd_ways": 1, "mudd_last_hidden_expansion": 1.0},
  "DHC×4": {"depth_connection": "hyper_connections"},
  "mHC×4": {"depth_connection": "mhc"},
  "mHC×4 of permutations": {"depth_connection": "mhc", "mudd_mhc_mixing": "permutations"},
  "AttnRes": {"depth_connection": "attnres"},
  "block AttnRes": {"depth_connection": "attnres", "mudd_attnres_block": None},  # of 8 blocks
  "DCA": {"depth_connection": "dca"},
  "k-DCA": {"depth_connection": "dca", "mudd_dca_sources": "middle_sum"},
}
COMPILED = {"mudd_ffn_reallocation": False, "remat_policy": "full", "scan_layers": True}
RUN = {"enable_checkpointing": False, "dataset_type": "synthetic", "log_config": False, "run_name": "families"}
FIXED = "yaml/transformer_tiny.yml"

COLUMNS = ["family", "parameters", "TFLOP", "HBM GB", "HBM beyond plain, units", "floor, units", "beyond plain / floor"]
COLUMNS += ["forward, D per sublayer", "temporaries GB", "compile, s"]
PLAIN_FORWARD = 3  # a residual stream and an output are read, and a residual stream is written
NOTES = """
All figures are those of one chip and one step, and none was measured on a TPU. TFLOP: what the model needs, by
MaxText's formula, without rematerialisation. HBM: bytes of the final HLO, as benchmarks/tpu_step_traffic.py counts
them; kernels read the sources that there are. DHC and mHC run in plain JAX, the others fused kernels. Units: arrays of
[B,T,D] in bfloat16, with B per device. Temporaries: the most memory held beside the arguments. Forward: arrays of D
numbers for each token that the connection of a sublayer reads and writes in the forward loop. It is what the loop moves
beyond that of the plain model, over 2L, plus the 3 of a plain residual connection, which are not counted but two reads
and one write. It includes what more norms read, logits, and what is kept for the backward pass, but not the final
aggregate.

Floor: what the connections have to move beyond the plain model if each pass reads each source or stream once and
writes what it makes once. An aggregate of N sources and C streams: forward N + C; backward, which makes the streams
again, N sources, N gradients of sources in and out, C streams and C gradients of streams: 4N + 3C in all. A sublayer
with n residual streams: forward n in, n out, its input and its output; backward n streams, n gradients in and out, and
its input, its output and their gradients; less that of a plain sublayer: 5n - 2.
"""
RUN_COLUMNS = ["family", "step, ms", "of the plain model's", "quartiles", "extremes", "last loss"]
RUN_NOTES = """
All models train on the same synthetic batch, {steps} step(s) in a round, in an order that is drawn for each of the
{rounds} rounds; one step of each ran before. Step: median over rounds. Ratio: time of a step by that of the plain model
in the same round, as the median over rounds with quartiles and extremes.
"""


def keys_of(family: str, layers: int) -> dict:
  """The keys of a family in a model of so many blocks."""
  keys = {"mudd": True} | FAMILIES[family]
  if "mudd_attnres_block" in keys:
    keys["mudd_attnres_block"] = -(-2 * layers // 8)
  return keys


def floor_units(config) -> int:
  """Arrays [B,T,D] that the connections of a model have to move, beyond the plain model."""
  from maxtext_mudd import connections
  from maxtext_mudd.connections.attnres import keys as attnres

  if not config.mudd:
    return 0
  if config.depth_connection in ("hyper_connections", "mhc"):
    return 2 * config.num_decoder_layers * (5 * config.mudd_expansion_rate - 2)
  sites = [(len(site.sources), site.ways) for site in connections.plan(config).sites.values()]
  if config.depth_connection == "attnres":
    sites = [(attnres.count_sources(config, s), 1) for s in range(attnres.sublayers(config) + 1)]
  return sum(4 * sources + 3 * ways for sources, ways in sites)


def buffer_of(config) -> tuple[int, float] | None:
  """Number of entries of the buffer of sources, and the share of them that an aggregate reads on average."""
  from maxtext_mudd.connections.attnres import keys as attnres

  if not config.mudd:
    return None
  reads_all = config.depth_connection == "dca" and config.mudd_dca_sources == "all"
  if config.depth_connection == "dense" or reads_all:
    entries, counts = config.num_decoder_layers + 1, range(1, config.num_decoder_layers + 1)
  elif config.depth_connection == "attnres":
    number = attnres.sublayers(config)
    entries, counts = attnres.count_sources(config, number), [attnres.count_sources(config, s) for s in range(number)]
  else:
    return None
  return entries, sum(counts) / len(counts) / entries


# ---------------------------------------------------------------- compiled for TPUs


def measure(family: str, yaml: str, topology: str, batch: float, layers: int) -> dict:
  """Compiles one row of the table."""
  from maxtext.utils import maxtext_utils

  from maxtext_mudd.model import counts

  keys = COMPILED | keys_of(family, layers) | {"per_device_batch_size": batch, "base_num_decoder_layers": layers}
  config, compiled, seconds = compiled_step.compile_step(yaml, topology, keys)
  memory, hlo, buffer = compiled.memory_analysis(), compiled.as_text(), buffer_of(config)
  loops = tpu_hlo.loop_bytes(tpu_hlo.computations(hlo), layers, kernels=True, buffer=buffer)
  if len(loops) != 2:
    raise MeasurementError(
      f"The HLO has {len(loops)} loops of {layers} trips; one forward and one backward are needed."
    )
  return {
    "family": family,
    "yaml": yaml,
    "topology": topology,
    "unit_bytes": int(2 * batch * config.max_target_length * config.emb_dim),
    "parameters": counts.parameters(config),
    "tflops": maxtext_utils.calculate_tflops_training_per_device(config, log=False)[0],
    "sublayers": 2 * layers,
    "forward_bytes": loops[0],
    "floor_units": floor_units(config),
    "temporary_bytes": memory.temp_size_in_bytes,
    "compile_seconds": seconds,
  } | tpu_step_traffic.step_bytes(hlo, buffer)


def cells(row: dict, plain: dict | None) -> list[str]:
  """The cells of a row in the table."""
  line = [row["family"], f"{row['parameters']:,}", f"{row['tflops']:.1f}", f"{row['hbm_bytes'] / 1e9:.1f}"]
  floor = row["floor_units"]
  if plain and floor:
    beyond = (row["hbm_bytes"] - plain["hbm_bytes"]) / row["unit_bytes"]
    forward = PLAIN_FORWARD + (row["forward_bytes"] - plain["forward_bytes"]) / row["unit_bytes"] / row["sublayers"]
    line += [f"{beyond:.0f}", str(floor), f"{beyond / floor:.2f}", f"{forward:.1f}"]
  else:
    line += ["-"] * 3 + [str(PLAIN_FORWARD)]
  return [*line, f"{row['temporary_bytes'] / 1e9:.2f}", f"{row['compile_seconds']:.0f}"]


def compile_all(options) -> tuple[str, list[dict]]:
  """The text of the tables, and their rows."""
  text, rows = "", []
  for yaml, layers in ((yaml, options.layers or layers) for yaml, layers in options.models):
    name = pathlib.Path(yaml).stem
    print(f"\n{name}, {layers} blocks\n\n" + record.table(COLUMNS, []), end="", flush=True)
    of_model = []
    for family in options.families:
      case = [family, yaml, options.topology, options.batch, layers]
      try:
        of_model.append(record.in_own_process(__file__, family, [json.dumps(case)], compiled_step.INIT_ARGS))
      except MeasurementError as error:
        print(error, file=sys.stderr, flush=True)
        continue
      plain = next((x for x in of_model if x["family"] == PLAIN), None)
      print(record.table(COLUMNS, [cells(of_model[-1], plain)]).splitlines()[-1], flush=True)
    plain = next((x for x in of_model if x["family"] == PLAIN), None)
    text += f"## {name}, {layers} blocks\n\n" + record.table(COLUMNS, [cells(x, plain) for x in of_model]) + "\n"
    rows += of_model
  return text + NOTES, rows


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Draws, for the last model, HBM bytes and temporaries by those of the plain model."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  rows = [x for x in rows if x["yaml"] == rows[-1]["yaml"]]
  plain = next((x for x in rows if x["family"] == PLAIN), None)
  others = [x for x in rows if x["family"] != PLAIN]
  if not plain or not others:
    return
  figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.4 * len(others) + 1.2), sharey=True, layout="constrained")
  for axis, key, title in (
    (axes[0], "hbm_bytes", "HBM bytes of a train step"),
    (axes[1], "temporary_bytes", "memory held during a step"),
  ):
    ratios = [x[key] / plain[key] for x in others]
    bars = axis.barh([x["family"] for x in others], ratios, color="tab:blue")
    axis.bar_label(bars, [f" {x:.2f}" for x in ratios])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(title=title, xlim=(0, 1.15 * max(ratios)))
  axes[0].invert_yaxis()
  figure.suptitle(f"{pathlib.Path(plain['yaml']).stem}, by the plain model; compiled for {plain['topology']}, not run")
  figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- run on this machine


def run_all(options) -> tuple[str, list[dict]]:
  """Trains all models in turn."""
  from maxtext_mudd import plugin

  plugin.install()
  from maxtext.configs import pyconfig
  import train_steps

  models, batch = [], None
  for family in options.families:
    layers = options.layers or 6
    keys = RUN | keys_of(family, layers) | {"base_num_decoder_layers": layers}
    config = pyconfig.initialize(["", FIXED], **keys)
    train_steps.set_up(config)
    record.say(f"{family}: compiling")
    models.append(train_steps.TrainStep(family, config))
    models[-1].load()
    batch = train_steps.make_batch(config) if batch is None else batch
    models[-1].run(batch, 1)
  seconds, order = {x.name: [] for x in models}, random.Random(0)
  for number in range(options.rounds):
    record.say(f"round {number + 1} of {options.rounds}")
    for model in order.sample(models, len(models)):
      seconds[model.name].append(model.run(batch, options.steps))
  rows = []
  for model in models:
    ratios = [x / plain for x, plain in zip(seconds[model.name], seconds[PLAIN])]
    rows.append({"family": model.name, "seconds": seconds[model.name], "ratios": ratios, "last_loss": model.loss()})
  lines = []
  for row in rows:
    spread = paired.Spread.of(row["ratios"])
    step = paired.Spread.of(row["seconds"]).median
    quartiles = f"{spread.lower_quartile:.3f} to {spread.upper_quartile:.3f}"
    extremes = f"{spread.min:.3f} to {spread.max:.3f}"
    loss = f"{row['last_loss']:.3f}"
    lines.append([row["family"], f"{1000 * step:.0f}", f"{spread.median:.3f}", quartiles, extremes, loss])
  text = record.table(RUN_COLUMNS, lines) + RUN_NOTES.format(steps=options.steps, rounds=options.rounds)
  print(text)
  return record.caution("CPU") + text, rows


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--run", action="store_true", help="train small models here in place of compiling for TPUs")
  parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated; default: %(default)s")
  parser.add_argument("--models", default="405m,2p8b", help="sizes to compile; default: %(default)s")
  parser.add_argument("--layers", type=int, help="base_num_decoder_layers; by default the model's")
  parser.add_argument("--batch", type=float, default=4, help="per_device_batch_size to compile; default: %(default)s")
  parser.add_argument("--topology", default="v5p-8", help="as MaxText names them; default: %(default)s")
  parser.add_argument("--rounds", type=int, default=8, help="rounds to run; default: %(default)s")
  parser.add_argument("--steps", type=int, default=2, help="steps of each model in a round; default: %(default)s")
  parser.add_argument("--output", help="name of the results; by default none are written")
  options = parser.parse_args()
  sizes = {"405m": 24, "2p8b": 32}
  options.families = options.families.split(",")
  for name, known in ((options.models.split(","), sizes), (options.families, FAMILIES)):
    unknown = [x for x in name if x not in known]
    if unknown:
      print(f"{unknown[0]!r} is unknown; use some of {', '.join(known)}.", file=sys.stderr)
      return 2
  if options.run and PLAIN not in options.families:
    print(f"--families leaves out {PLAIN}, which the others are compared with.", file=sys.stderr)
    return 2
  for name in ("layers", "batch", "rounds", "steps"):
    value = getattr(options, name)
    if value is not None and not value >= 1:
      print(f"--{name} is {value}; at least 1 is needed.", file=sys.stderr)
      return 2
  problem = None if options.run else versions.missing_libtpu()
  if problem:
    print(problem, file=sys.stderr)
    return 2
  options.models = [(f"yaml/transformer_pp_{size}.yml", sizes[size]) for size in options.models.split(",")]
  about = record.facts("CPU" if options.run else options.topology)
  text, rows = run_all(options) if options.run else compile_all(options)
  if options.output:
    path = record.write(options.output, about, text, rows)
    if not options.run:
      draw(rows, path.with_name(f"{path.name}.png"))
  return 0 if len(rows) else 2


if __name__ == "__main__":
  if sys.argv[1:2] == ["_one"]:
    print(json.dumps(measure(*json.loads(sys.argv[2]))))
  else:
    sys.exit(main())
