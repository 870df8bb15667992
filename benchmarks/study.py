"""Runs a study: models trained on the same data from the same seeds, one run after another, and a report of them.

    python benchmarks/study.py yaml/study/table_5.yml              # runs what is not done yet
    python benchmarks/study.py yaml/study/table_5.yml --status     # says what is
    python benchmarks/study.py yaml/study/table_5.yml --report     # writes the report of what is
    python benchmarks/study.py yaml/study/table_5_405m.yml --submit # prints the commands for a cluster

A cell is one model with one seed and one learning rate, trained by this project's launcher. Cells of one seed read the
same rows in the same order and start from the same values of the parameters that they share. When a cell ends, its
result is appended to `results/study-NAME.jsonl`; a later start, on this machine or on another, runs the cells that are
not in there. A cell that was killed resumes from its last checkpoint, which lies in --work.

A run whose loss is not finite ends, and that is its result. Any other failure ends the study with the launcher's words.
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
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from typing import Literal

import paired
import pydantic
import record
import yaml

from maxtext_mudd.cluster.request import NAME_LIMIT
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.interrupts import Interrupts

LAUNCHER = record.ROOT / "MaxText" / "train.py"
EVALUATIONS = 4  # in a run, beside the one before the first step


class Model(pydantic.BaseModel):
  """One model of a study.

  Attributes:
    config: its configuration file, beside the study's file; default: the study's.
    keys: what it sets on top.
    against: the model that it is compared with; default: the study's baseline.
    paper: the perplexity that the paper reports for it.
    same_time_as: a model; this one trains for as many steps as take the time of that one's steps, by `--time`. It
      needs `tokens` above 0.
    tokens: of a run on one device; default: the study's.
  """

  model_config = pydantic.ConfigDict(extra="forbid")
  config: str = ""
  keys: dict[str, bool | int | float | str] = {}
  against: str = ""
  paper: float | None = pydantic.Field(None, gt=1)
  same_time_as: str = ""
  tokens: int = pydantic.Field(0, ge=0)


class Study(pydantic.BaseModel):
  """The plan of a study, as its file states it.

  Attributes:
    config: configuration file of all models, beside the study's file.
    tokens: of one run on one device, rounded to whole steps; n devices train on n times as many. 0: as many steps as
      `config` says.
    unit: of losses; bits per byte needs a tokenizer whose tokens are bytes.
    seeds: of parameters and of data.
    baseline: the model that others are compared with.
    keys: what all models set on top of `config`.
  """

  model_config = pydantic.ConfigDict(extra="forbid")
  config: str
  tokens: int = pydantic.Field(ge=0)
  unit: Literal["bits per byte", "nats per token"] = "bits per byte"
  seeds: list[int] = pydantic.Field(min_length=1)
  learning_rates: list[float] = pydantic.Field(min_length=1)
  baseline: str
  keys: dict[str, bool | int | float | str] = {}
  models: dict[str, Model]

  @pydantic.model_validator(mode="after")
  def _check_names(self):
    named = [("baseline", self.baseline)]
    for name, model in self.models.items():
      named += [(f"models.{name}.{key}", getattr(model, key)) for key in ("against", "same_time_as")]
    for key, name in named:
      if name and name not in self.models:
        raise ValueError(f"{key}={name}: there is no such model; the models are {', '.join(self.models)}")
    for name, model in self.models.items():
      if model.same_time_as and not (model.tokens or self.tokens):
        raise ValueError(f"models.{name}.same_time_as changes the tokens of a run; set tokens above 0")
      if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"models.{name}: a name is lower-case letters, digits and underscores, with a letter first")
    for key, values in (("seeds", self.seeds), ("learning_rates", self.learning_rates)):
      if len(set(values)) != len(values):
        raise ValueError(f"{key}={values} names one of them twice; name each once")
    return self


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a study.

  Attributes:
    config: path of its configuration file.
    keys: what it sets on the command line.
    unit: of its losses.
    steps: that it trains for.
    fingerprint: 16 hexadecimal digits of a hash of the configuration file and the keys, as both were when the cell was
      planned. A result counts only for the fingerprint that it was recorded with.
  """

  model: str
  seed: int
  learning_rate: float
  config: pathlib.Path
  keys: dict
  unit: str
  steps: int
  fingerprint: str

  @property
  def name(self) -> str:
    """Its name in results and messages."""
    return f"{self.model}-lr{self.learning_rate:g}-seed{self.seed}"

  @property
  def run_name(self) -> str:
    """Its name as a folder in --work and as a workload of a cluster: the digits of the fingerprint keep a changed cell
    from reading the events and checkpoints of its earlier form."""
    readable = re.sub("[^a-z0-9]+", "-", self.name.lower())[: NAME_LIMIT - 9].rstrip("-")
    return f"{readable}-{self.fingerprint[:8]}"


def read(path: pathlib.Path) -> Study:
  """The plan in a file.

  Raises:
    ConfigError: it cannot be read, a key is not known, or a value cannot work.
  """
  try:
    values = yaml.safe_load(path.read_text())
  except OSError as error:
    raise ConfigError(f"{path} cannot be read ({error.strerror}); name a study, as yaml/study/table_5.yml.") from error
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
  if not isinstance(values, dict):
    raise ConfigError(f"{path}: a study maps keys to values, as in `tokens: 2_000_000`.")
  try:
    study = Study(**values)
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
      message = f"is not a key of studies; those are {', '.join(Study.model_fields)}"
    raise ConfigError(f"{path}: {key + ': ' if key else ''}{message}.") from None
  for config in (study.config, *(model.config for model in study.models.values())):
    if config and not (path.parent / config).is_file():
      raise ConfigError(f"{path}: config: {config}: there is no such file beside it.")
  return study


def merged_values(config: pathlib.Path) -> dict:
  """What a configuration file and those that it builds on set, less defaults: MaxText's own, and mudd_base.yml."""
  values = yaml.safe_load(config.read_text()) or {}
  base = config.parent / values.pop("base_config", "")
  is_model = base.is_file() and base.name != "mudd_base.yml"
  return (merged_values(base) if is_model else {}) | values


def fingerprint(values: dict, keys: dict) -> str:
  """The fingerprint of a cell whose configuration file sets `values` and whose command line sets `keys`."""
  return hashlib.sha256(json.dumps([values, keys], sort_keys=True).encode()).hexdigest()[:16]


def cells(study: Study, folder: pathlib.Path, ratios: dict[str, float]) -> list[Cell]:
  """All runs of a study, seed by seed, so that early results are of whole comparisons.

  Args:
    folder: of the study's file.
    ratios: step time of a model over that of the one it is compared with, for those that others name in
      `same_time_as`; runs whose ratio is not known are left out.

  Raises:
    ConfigError: two runs would write to one folder.
  """
  planned = {}
  for seed in study.seeds:
    for rate in study.learning_rates:
      for name, model in study.models.items():
        if model.same_time_as and model.same_time_as not in ratios:
          continue
        config = (folder / (model.config or study.config)).resolve()
        values, keys = merged_values(config), study.keys | model.keys
        tokens = (model.tokens or study.tokens) * ratios.get(model.same_time_as, 1)
        keys |= _steps(tokens, values | keys) if tokens else {}
        keys |= {"learning_rate": rate, "init_weights_seed": seed, "data_shuffle_seed": seed}
        steps = (values | keys)["steps"]
        cell = Cell(name, seed, rate, config, keys, study.unit, steps, fingerprint(values, keys))
        if other := planned.get(cell.run_name):
          raise ConfigError(
            f"models.{other.model} and models.{name} are trained in the same way, and the folder of both would be "
            f"{cell.run_name}; rename one so that the names differ in their first characters."
          )
        planned[cell.run_name] = cell
  return list(planned.values())


def _steps(tokens: float, values: dict) -> dict[str, int]:
  """The length of a run on one device: MaxText's batch size is for each device, so that n devices train on n·tokens.

  MaxText evaluates after steps 0, interval, 2·interval, ..., and so after the last one.
  """
  rows = values["per_device_batch_size"] * values.get("gradient_accumulation_steps", 1)
  tokens_per_step = rows * values["max_target_length"]
  interval = max(round(tokens / tokens_per_step / EVALUATIONS), 1)
  return {"steps": EVALUATIONS * interval + 1, "eval_interval": interval}


class Results:
  """Results of a study, one JSON object a line; only ever appended to."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def rows(self) -> list[dict]:
    """All of them; a last line that a killed process left unfinished is not one."""
    lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

  def append(self, row: dict) -> None:
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with self.path.open("a+b") as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(0)
      whole = file.read().rfind(b"\n") + 1
      if whole != size:
        file.truncate(whole)
      file.write((json.dumps(row) + "\n").encode())
      file.flush()
      os.fsync(file.fileno())

  def of(self, cell: Cell) -> dict | None:
    for row in self.rows():
      if row["kind"] == "cell" and row["cell"] == cell.name and row["fingerprint"] == cell.fingerprint:
        return row
    return None

  def ratios(self) -> dict[str, float]:
    """The newest step-time ratio of each model that was timed."""
    return {row["model"]: row["ratio"]["median"] for row in self.rows() if row["kind"] == "timing"}


def results_of(study_file: pathlib.Path, path: pathlib.Path | None = None) -> Results:
  """The results of a study, in `path` or in the default place."""
  return Results(path or record.RESULTS / f"study-{study_file.stem}.jsonl")


def command(cell: Cell, work: pathlib.Path) -> list[str]:
  """The launcher's command for a cell."""
  keys = {"run_name": cell.run_name, "base_output_directory": str(work), **cell.keys}
  return [sys.executable, str(LAUNCHER), str(cell.config), *(f"{key}={_written(x)}" for key, x in keys.items())]


def _written(value) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def run(cell: Cell, work: pathlib.Path) -> dict:
  """Trains a cell to its end, from its last checkpoint if it has one; its result.

  Raises:
    ConfigError: the launcher failed, for another reason than a loss that is not finite; or the configuration file is
      not the one that the cell was planned with.
  """
  if fingerprint(merged_values(cell.config), cell.keys) != cell.fingerprint:
    raise ConfigError(f"{cell.config} has changed since the study started; start the study again.")
  folder = work / cell.run_name
  folder.mkdir(parents=True, exist_ok=True)
  if is_done(row := result(cell, folder), cell):  # killed between its last step and its result
    return row
  with Interrupts(), (folder / "launcher.txt").open("a") as log:
    process = subprocess.Popen(command(cell, work), cwd=record.ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
      status = process.wait()
    except KeyboardInterrupt:  # the launcher saves a checkpoint before it ends
      process.terminate()
      process.wait()
      raise
  row = result(cell, folder)
  if not is_done(row, cell):
    lines = (folder / "launcher.txt").read_text(errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.startswith("maxtext-mudd: ")), f"see {folder}/launcher.txt")
    raise ConfigError(f"{cell.name}: the launcher ended with status {status}: {said.removeprefix('maxtext-mudd: ')}")
  return row


def is_done(row: dict, cell: Cell) -> bool:
  """Whether this is the result of a whole run, or of one that died."""
  return bool(row["dead"]) or cell.steps - 1 in row.get("held_out", {})


def result(cell: Cell, folder: pathlib.Path) -> dict:
  """What is kept of a cell, from the TensorBoard events of its run; of one that ended before its first step, little.

  `dead` says why a run is one, or is None: MaxText ends a run whose loss is not finite.
  """
  from maxtext_mudd import report

  scalars = report.read_scalars(folder)
  if not scalars.get(report.TRAIN_LOSS):
    return {"dead": None}
  losses = dict(sorted(scalars[report.TRAIN_LOSS].items()))
  wrong = next((step for step, loss in losses.items() if not math.isfinite(loss)), None)
  scale = math.log(2) if cell.unit == "bits per byte" else 1
  speeds = sorted(scalars[report.SPEED].values())
  tflops, seconds = scalars["perf/per_device_tflops_per_sec"], scalars["perf/step_time_seconds"]
  steady = sorted(tflops[step] * seconds[step] for step in tflops.keys() & seconds.keys())
  return {
    "kind": "cell",
    "cell": cell.name,
    "fingerprint": cell.fingerprint,
    "model": cell.model,
    "seed": cell.seed,
    "learning_rate": cell.learning_rate,
    "keys": cell.keys,
    "dead": None if wrong is None else f"the loss of step {wrong} is not finite",
    "steps_done": max(losses) + 1,
    "held_out": {step: _finite(x / scale) for step, x in sorted(scalars.get(report.EVAL_LOSS, {}).items())},
    "train": _thinned({step: x / scale for step, x in losses.items()}),
    "largest_gradient_norm": _finite(max(scalars["learning/raw_grad_norm"].values())),
    "tokens_per_second": speeds[len(speeds) // 2],
    "tflops_per_step": steady[len(steady) // 2],
    "median_step_seconds": statistics.median(seconds.values()),
    "parameters": int(report.read_texts(folder)["num_model_parameters"]),
  }


def _thinned(losses: dict[int, float], width: int = 10) -> dict[int, float]:
  """Means over blocks of `width` steps, by the last step of each block.

  A killed process can lose the events of its last few steps. The blocks of all runs of a length end at the same steps
  nevertheless, so that their curves can be compared.
  """
  blocks = collections.defaultdict(list)
  for step, loss in losses.items():
    blocks[step // width].append(loss)
  return {min((i + 1) * width - 1, max(losses)): _finite(statistics.fmean(x)) for i, x in sorted(blocks.items())}


def _finite(x: float) -> float | None:
  """JSON has no other numbers."""
  return round(x, 6) if math.isfinite(x) else None


def machine() -> dict:
  """What a result was measured on."""
  cpu = platform.processor() or platform.machine()
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
  return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "commit": record.commit()}


def status_lines(study: Study, folder: pathlib.Path, results: Results, work: pathlib.Path) -> list[str]:
  """One line a cell: done, with its loss; how far it is; or not begun."""
  lines = []
  for cell in cells(study, folder, results.ratios()):
    row = results.of(cell)
    saved = [int(x.name) for x in (work / cell.run_name / "checkpoints").glob("*") if x.name.isdigit()]
    if row and row["dead"]:
      what = f"dead after {row['steps_done']} of {cell.steps} steps: {row['dead']}"
    elif row:
      what = f"done: {list(row['held_out'].values())[-1]:.4f} {study.unit}"
    elif saved:
      what = f"step {max(saved) + 1} of {cell.steps}"
    else:
      what = "not begun"
    lines.append(f"{cell.name:<44} {what}")
  untimed = {x.same_time_as for x in study.models.values() if x.same_time_as} - results.ratios().keys()
  lines += [f"models with same_time_as: {name} wait for --time" for name in sorted(untimed)]
  return lines


def run_all(study: Study, folder: pathlib.Path, results: Results, work: pathlib.Path, most: int | None) -> None:
  """Runs the cells without a result, at most `most` of them, and appends each result as soon as it is there."""
  waiting = [cell for cell in cells(study, folder, results.ratios()) if results.of(cell) is None][:most]
  for number, cell in enumerate(waiting, 1):
    record.say(f"{cell.name}: {number} of {len(waiting)}")
    row = run(cell, work) | machine() | {"date": datetime.date.today().isoformat()}
    results.append(row)
    shutil.rmtree(work / cell.run_name / "checkpoints", ignore_errors=True)
    record.say(f"{cell.name}: {row['dead'] or list(row['held_out'].values())[-1]}")


def collect(study: Study, folder: pathlib.Path, results: Results, work: pathlib.Path) -> None:
  """Appends the results of runs that ended elsewhere, as workloads of a cluster.

  Args:
    work: a copy of their OUTPUT; the folder of a run in it has the name of the run's WORKLOAD.
  """
  elsewhere = {"cpu": "elsewhere", "cores": None, "commit": "unknown"}  # events of a run do not say
  for cell in cells(study, folder, results.ratios()):
    if results.of(cell) is None and is_done(row := result(cell, work / cell.run_name), cell):
      results.append(row | elsewhere | {"date": datetime.date.today().isoformat()})
      record.say(f"{cell.name}: {row['dead'] or list(row['held_out'].values())[-1]}")


def submissions(study: Study, folder: pathlib.Path, results: Results) -> list[str]:
  """`make xpk` lines of the cells without a result; CLUSTER, TPU_TYPE, NUM_SLICES and OUTPUT are the user's to set.

  Raises:
    ConfigError: the study counts tokens, and the number of devices that would share them is not known here.
  """
  lengths = {"tokens": study.tokens} | {f"models.{name}.tokens": model.tokens for name, model in study.models.items()}
  for key, tokens in lengths.items():
    if tokens:
      raise ConfigError(
        f"{key}={tokens} is for one device, and a run on a cluster trains on that many for each of its devices; set "
        "tokens: 0, and steps in the configuration."
      )
  lines = []
  for cell in cells(study, folder, results.ratios()):
    if results.of(cell) is None:
      arguments = shlex.join(f"{key}={_written(x)}" for key, x in cell.keys.items())
      config = os.path.relpath(cell.config, record.ROOT)
      lines.append(f"make xpk CONFIG={config} WORKLOAD={cell.run_name} ARGS={shlex.quote(arguments)}")
  return lines


def time_all(study: Study, folder: pathlib.Path, results: Results, rounds: int) -> None:
  """Times each model that others name in `same_time_as` against the one that it is compared with, and appends the
  ratios of their step times."""
  by_model = {cell.model: cell for cell in reversed(cells(study, folder, {}))}
  for name in sorted({model.same_time_as for model in study.models.values() if model.same_time_as}):
    against = study.models[name].against or study.baseline
    seconds = step_seconds(by_model[against], by_model[name], rounds)
    ratio = dataclasses.asdict(paired.Spread.of([second / first for first, second in seconds]))
    row = {"kind": "timing", "model": name, "against": against, "ratio": ratio, "seconds": seconds}
    results.append(row | machine() | {"date": datetime.date.today().isoformat()})
    record.say(f"{name}: a step takes {ratio['median']:.3f} times that of {against}")


def step_seconds(first: Cell, second: Cell, rounds: int) -> list[tuple[float, float]]:
  """Seconds of a train step of each, measured in turn in this process on random tokens."""
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
  return paired.alternate(lambda: steps[0].run(batch, 2), lambda: steps[1].run(batch, 2), rounds)


def parse(arguments: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("study", type=pathlib.Path, help="yaml/study/NAME.yml")
  what = parser.add_mutually_exclusive_group()
  what.add_argument("--status", action="store_true", help="one line a cell, and end")
  what.add_argument("--report", action="store_true", help="write results/study-NAME.md and .png, and end")
  what.add_argument("--submit", action="store_true", help="print a make xpk line for each cell not done, and end")
  what.add_argument(
    "--collect", action="store_true", help="take the results of a cluster's runs from --work, a copy of OUTPUT, and end"
  )
  what.add_argument("--time", action="store_true", help="time the models that same_time_as names, and end")
  parser.add_argument("--cells", type=int, help="run at most this many; default: all")
  parser.add_argument("--rounds", type=int, default=10, help="of --time; default: %(default)s")
  parser.add_argument("--work", type=pathlib.Path, help="folder of the runs; default: runs/study/NAME")
  parser.add_argument("--results", type=pathlib.Path, help="default: benchmarks/results/study-NAME.jsonl")
  return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
  options = parse(arguments)
  try:
    study, folder, name = read(options.study), options.study.parent, options.study.stem
    results = results_of(options.study, options.results)
    work = (options.work or record.ROOT / "runs" / "study" / name).absolute()
    if options.status:
      print("\n".join(status_lines(study, folder, results, work)))
    elif options.report:
      import study_report

      print(study_report.write(study, cells(study, folder, results.ratios()), results, options.study))
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
    sys.exit("maxtext-mudd: interrupted; the next start resumes.")


if __name__ == "__main__":
  main(sys.argv[1:])
