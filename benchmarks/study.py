"""Runs a study: trains several models on the same data from the same seeds, one run after another, to compare them.

    .venv/bin/python benchmarks/study.py yaml/study/table_5.yml               # run the cells that have no result yet
    .venv/bin/python benchmarks/study.py yaml/study/table_5.yml --status      # print how far each cell is
    .venv/bin/python benchmarks/study.py yaml/study/table_5.yml --report      # write a report of the results so far
    .venv/bin/python benchmarks/study.py yaml/study/table_5_405m.yml --submit # print the commands for a cluster

A cell is one run of MaxText/train.py: one model with one seed and one learning rate (`study_plan.py`). When a cell
ends, its result is appended to `results/study-NAME.jsonl`. A later call, on this machine or on another, runs the cells
that have no result there. A cell that was killed resumes from its last checkpoint, which is in --work.

If the loss of a run is not finite, the run ends, and counts as a result. After any other failure the study ends with
the error of the run.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import pathlib
import platform
import shlex
import shutil
import statistics
import subprocess
import sys

import paired
import record
import study_plan
from study_plan import Cell, Study

from maxtext_mudd.checkpoints.interrupts import Interrupts
from maxtext_mudd.config.errors import ConfigError

LAUNCHER = record.ROOT / "MaxText" / "train.py"


class Results:
  """The results of a study: a file with one JSON object a line, to which rows are appended."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def rows(self) -> list[dict]:
    """All rows. A last line that a killed process left unfinished is ignored."""
    lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

  def append(self, row: dict) -> None:
    """Appends a row, after removing a last line that a killed process left unfinished."""
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with self.path.open("a+b") as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(0)
      end_of_rows = file.read().rfind(b"\n") + 1
      if end_of_rows != size:
        file.truncate(end_of_rows)
      file.write((json.dumps(row) + "\n").encode())
      file.flush()
      os.fsync(file.fileno())

  def of(self, cell: Cell) -> dict | None:
    """The result of a cell; None if there is none."""
    for row in self.rows():
      if row["kind"] == "cell" and row["cell"] == cell.name and row["fingerprint"] == cell.fingerprint:
        return row
    return None

  def ratios(self) -> dict[str, float]:
    """The latest step-time ratio of each model that was timed."""
    return {row["model"]: row["ratio"]["median"] for row in self.rows() if row["kind"] == "timing"}


def results_of(study_file: pathlib.Path, path: pathlib.Path | None = None) -> Results:
  """The results of a study, in `path` or in the default place."""
  return Results(path or record.RESULTS / f"study-{study_file.stem}.jsonl")


def command(cell: Cell, work: pathlib.Path) -> list[str]:
  """The command that trains a cell."""
  keys = {"run_name": cell.run_name, "base_output_directory": str(work), **cell.keys}
  return [sys.executable, str(LAUNCHER), str(cell.config), *(f"{key}={_written(x)}" for key, x in keys.items())]


def _written(value) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def run(cell: Cell, work: pathlib.Path) -> dict:
  """Trains a cell to its end, from its last checkpoint if it has one, and returns its result.

  Raises:
    ConfigError: the run failed for another reason than a loss that is not finite, or the configuration file has changed
      since the cell was planned.
  """
  if study_plan.fingerprint(study_plan.merged_values(cell.config), cell.keys) != cell.fingerprint:
    raise ConfigError(f"{cell.config} has changed since the study started; start the study again.")
  folder = work / cell.run_name
  folder.mkdir(parents=True, exist_ok=True)
  if is_done(row := result(cell, folder), cell):  # the study was killed after the last step, before it wrote the result
    return row
  with Interrupts(), (folder / "launcher.txt").open("a") as log:
    process = subprocess.Popen(command(cell, work), cwd=record.ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
      status = process.wait()
    except KeyboardInterrupt:  # the run saves a checkpoint before it ends
      process.terminate()
      process.wait()
      raise
  row = result(cell, folder)
  if not is_done(row, cell):
    lines = (folder / "launcher.txt").read_text(errors="replace").splitlines()
    error = next((line for line in reversed(lines) if line.startswith("maxtext-mudd: ")), f"see {folder}/launcher.txt")
    raise ConfigError(f"{cell.name}: the run ended with status {status}: {error.removeprefix('maxtext-mudd: ')}")
  return row


def is_done(row: dict, cell: Cell) -> bool:
  """Whether this is the result of a run that ended, by its last step or by a loss that is not finite."""
  return bool(row["dead"]) or cell.steps - 1 in row.get("held_out", {})


def result(cell: Cell, folder: pathlib.Path) -> dict:
  """The result of a cell so far, from the TensorBoard events of its run.

  `dead` is the reason if the run ended early, as MaxText ends runs whose loss is not finite; else None. It is the only
  entry if there are no events yet.
  """
  from maxtext_mudd import report

  scalars = report.read_scalars(folder)
  if not scalars.get(report.TRAIN_LOSS):
    return {"dead": None}
  losses = dict(sorted(scalars[report.TRAIN_LOSS].items()))
  not_finite = next((step for step, loss in losses.items() if not math.isfinite(loss)), None)
  scale = math.log(2) if cell.unit == "bits per byte" else 1
  speeds = sorted(scalars[report.SPEED].values())
  tflops, seconds = scalars["perf/per_device_tflops_per_sec"], scalars["perf/step_time_seconds"]
  step_tflops = sorted(tflops[step] * seconds[step] for step in tflops.keys() & seconds.keys())
  return {
    "kind": "cell",
    "cell": cell.name,
    "fingerprint": cell.fingerprint,
    "model": cell.model,
    "seed": cell.seed,
    "learning_rate": cell.learning_rate,
    "keys": cell.keys,
    "dead": None if not_finite is None else f"the loss of step {not_finite} is not finite",
    "steps_done": max(losses) + 1,
    "held_out": {step: _finite(x / scale) for step, x in sorted(scalars.get(report.EVAL_LOSS, {}).items())},
    "train": _thinned({step: x / scale for step, x in losses.items()}),
    "largest_gradient_norm": _finite(max(scalars["learning/raw_grad_norm"].values())),
    "tokens_per_second": speeds[len(speeds) // 2],
    "tflops_per_step": step_tflops[len(step_tflops) // 2],
    "median_step_seconds": statistics.median(seconds.values()),
    "parameters": int(report.read_texts(folder)["num_model_parameters"]),
  }


def _thinned(losses: dict[int, float], width: int = 10) -> dict[int, float]:
  """The mean loss of each block of `width` steps, by the last step of the block.

  A killed process can lose the events of its last few steps. Blocks still end at the same steps in all runs, so that
  the curves of different runs can be compared.
  """
  blocks = collections.defaultdict(list)
  for step, loss in losses.items():
    blocks[step // width].append(loss)
  return {min((i + 1) * width - 1, max(losses)): _finite(statistics.fmean(x)) for i, x in sorted(blocks.items())}


def _finite(x: float) -> float | None:
  """The number, or None if it is not finite: JSON has no such numbers."""
  return round(x, 6) if math.isfinite(x) else None


def machine() -> dict:
  """The machine and the commit that a result was measured on."""
  cpu = platform.processor() or platform.machine()
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
  return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "commit": record.commit()}


def corpus(cell: Cell) -> str | None:
  """12 hexadecimal digits of a hash of the data files that a cell reads; None if its configuration names no files of
  this machine.

  A corpus that was built from other versions of its packages has other rows, in another order.
  """
  values = study_plan.merged_values(cell.config) | cell.keys
  digest = hashlib.sha256()
  files = [record.ROOT / values[key] for key in ("grain_train_files", "grain_eval_files") if values.get(key)]
  if not files or not all(file.is_file() for file in files):
    return None
  for file in files:
    digest.update(file.read_bytes())
  return digest.hexdigest()[:12]


def status_lines(study: Study, folder: pathlib.Path, results: Results, work: pathlib.Path) -> list[str]:
  """One line for each cell: its loss, how far it is, or that it has not begun."""
  lines = []
  for cell in study_plan.cells(study, folder, results.ratios()):
    row = results.of(cell)
    saved = [int(x.name) for x in (work / cell.run_name / "checkpoints").glob("*") if x.name.isdigit()]
    if row and row["dead"]:
      state = f"ended early, after {row['steps_done']} of {cell.steps} steps: {row['dead']}"
    elif row:
      state = f"done: {list(row['held_out'].values())[-1]:.4f} {study.unit}"
    elif saved:
      state = f"step {max(saved) + 1} of {cell.steps}"
    else:
      state = "not begun"
    lines.append(f"{cell.name:<44} {state}")
  untimed = {x.same_time_as for x in study.models.values() if x.same_time_as} - results.ratios().keys()
  lines += [f"models with same_time_as: {name} wait for --time" for name in sorted(untimed)]
  return lines


def run_all(study: Study, folder: pathlib.Path, results: Results, work: pathlib.Path, most: int | None) -> None:
  """Runs the cells without a result, at most `most` of them, and appends each result as soon as its run ends."""
  waiting = [cell for cell in study_plan.cells(study, folder, results.ratios()) if results.of(cell) is None][:most]
  for number, cell in enumerate(waiting, 1):
    record.say(f"{cell.name}: {number} of {len(waiting)}")
    row = run(cell, work) | machine() | {"corpus": corpus(cell), "date": datetime.date.today().isoformat()}
    results.append(row)
    shutil.rmtree(work / cell.run_name / "checkpoints", ignore_errors=True)
    record.say(f"{cell.name}: {row['dead'] or list(row['held_out'].values())[-1]}")


def collect(study: Study, folder: pathlib.Path, results: Results, work: pathlib.Path) -> None:
  """Appends the results of runs that ended on other machines, such as the workloads of a cluster.

  Args:
    work: a copy of their OUTPUT, in which the folder of a run has the name of its WORKLOAD.
  """
  elsewhere = {"cpu": "elsewhere", "cores": None, "commit": "unknown"}  # the events of a run do not state them
  for cell in study_plan.cells(study, folder, results.ratios()):
    if results.of(cell) is None and is_done(row := result(cell, work / cell.run_name), cell):
      results.append(row | elsewhere | {"date": datetime.date.today().isoformat()})
      record.say(f"{cell.name}: {row['dead'] or list(row['held_out'].values())[-1]}")


def submissions(study: Study, folder: pathlib.Path, results: Results) -> list[str]:
  """The `make xpk` lines of the cells without a result. The user adds CLUSTER, TPU_TYPE, NUM_SLICES and OUTPUT.

  Raises:
    ConfigError: the study states the length of runs in tokens of one device, and the number of devices is not known.
  """
  lengths = {"tokens": study.tokens} | {f"models.{name}.tokens": model.tokens for name, model in study.models.items()}
  for key, tokens in lengths.items():
    if tokens:
      raise ConfigError(
        f"{key}={tokens} is for one device, and a run on a cluster would train on that many for each of its devices; "
        "set tokens: 0, and steps in the configuration."
      )
  lines = []
  for cell in study_plan.cells(study, folder, results.ratios()):
    if results.of(cell) is None:
      arguments = shlex.join(f"{key}={_written(x)}" for key, x in cell.keys.items())
      config = os.path.relpath(cell.config, record.ROOT)
      lines.append(f"make xpk CONFIG={config} WORKLOAD={cell.run_name} ARGS={shlex.quote(arguments)}")
  return lines


def time_all(study: Study, folder: pathlib.Path, results: Results, rounds: int) -> None:
  """Measures the step time and the memory of models, relative to the model that each is compared with, and appends the
  ratios: of all models of a study with references, else of those that others name in `same_time_as`."""
  by_model = {cell.model: cell for cell in reversed(study_plan.cells(study, folder, {}))}
  names = {model.same_time_as for model in study.models.values() if model.same_time_as}
  if study.references:
    names |= by_model.keys() - {name for group in study.references.values() for name in group}
  for name in sorted(names):
    against = study.models[name].against or study.baseline
    seconds, sizes = step_costs(by_model[against], by_model[name], rounds)
    ratio = dataclasses.asdict(paired.Spread.of([second / first for first, second in seconds]))
    row = {"kind": "timing", "model": name, "against": against, "ratio": ratio, "seconds": seconds, "bytes": sizes}
    results.append(row | machine() | {"date": datetime.date.today().isoformat()})
    record.say(f"{name}: a step takes {ratio['median']:.3f} times that of {against}")


def step_costs(first: Cell, second: Cell, rounds: int) -> tuple[list[tuple[float, float]], list[int]]:
  """Seconds of a train step of two cells in each round, measured in turn in this process on random tokens; and the
  bytes that the step of each holds."""
  from maxtext.configs import pyconfig
  import train_steps

  from maxtext_mudd import plugin

  plugin.install()
  steps = []
  for cell in (first, second):
    keys = cell.keys | {"run_name": "timing", "dataset_type": "synthetic", "enable_checkpointing": False}
    config = pyconfig.initialize(["", str(cell.config)], **keys)
    train_steps.set_up(config)
    steps.append(train_steps.TrainStep(cell.name, config))
    steps[-1].load()
  batch = train_steps.make_batch(config)
  for step in steps:
    step.run(batch, 2)
  seconds = paired.alternate(lambda: steps[0].run(batch, 2), lambda: steps[1].run(batch, 2), rounds)
  sizes = [step.argument_bytes + step.temporary_bytes for step in steps]
  for step in steps:
    step.free()
  return seconds, sizes


def parse(arguments: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("study", type=pathlib.Path, help="yaml/study/NAME.yml")
  action = parser.add_mutually_exclusive_group()
  action.add_argument("--status", action="store_true", help="print one line for each cell")
  action.add_argument("--report", action="store_true", help="write results/study-NAME.md and .png")
  action.add_argument("--submit", action="store_true", help="print a make xpk line for each cell without a result")
  action.add_argument(
    "--collect", action="store_true", help="read the results of a cluster's runs from --work, a copy of OUTPUT"
  )
  action.add_argument(
    "--time", action="store_true", help="measure step times and memory (study_plan.py says of which models)"
  )
  parser.add_argument("--cells", type=int, help="the most cells to run; default: all")
  parser.add_argument("--rounds", type=int, default=10, help="rounds of --time; default: %(default)s")
  parser.add_argument("--work", type=pathlib.Path, help="folder of the runs; default: runs/study/NAME")
  parser.add_argument("--results", type=pathlib.Path, help="default: benchmarks/results/study-NAME.jsonl")
  return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
  options = parse(arguments)
  try:
    study, folder, name = study_plan.read(options.study), options.study.parent, options.study.stem
    results = results_of(options.study, options.results)
    work = (options.work or record.ROOT / "runs" / "study" / name).absolute()
    if options.status:
      print("\n".join(status_lines(study, folder, results, work)))
    elif options.report:
      import study_report

      print(study_report.write(study, study_plan.cells(study, folder, results.ratios()), results, options.study))
    elif options.submit:
      print("\n".join(submissions(study, folder, results)))
    elif options.collect:
      collect(study, folder, results, work)
    elif options.time:
      time_all(study, folder, results, options.rounds)
    else:
      run_all(study, folder, results, work, options.cells)
  except ConfigError as error:
    sys.exit(f"maxtext-mudd: {error}")
  except KeyboardInterrupt:
    sys.exit("maxtext-mudd: interrupted; the same command resumes.")


if __name__ == "__main__":
  main(sys.argv[1:])
