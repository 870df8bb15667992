"""Trains a small plain model, puts MUDD connections into it, trains on, and draws the curves: docs/upcycle.png.

    .venv/bin/python benchmarks/upcycle.py        # or `make upcycle`, which builds the corpus first

docs/upcycle.md walks through the same commands. The losses go to benchmarks/results/. Runs are in --work; a call that
was interrupted continues with the run and the step that it had reached.
"""

import argparse
import datetime
import pathlib
import subprocess
import sys

import record
from record import MeasurementError
import study

from maxtext_mudd import report

PLAIN, MUDD = "yaml/transformer_tiny.yml", "yaml/mudd_tiny.yml"
UPCYCLED_AT, STEPS = 200, 500
COMMON = ["eval_interval=50", "eval_start_step=49", "checkpoint_period=1000"]
WHOLE = f"learning_rate_schedule_steps={STEPS}"
SAME_WIDTHS = "mudd_ffn_reallocation=false"
# The runs of the figure by name: what each is, and its color.
RUNS = {
  "plain": ("plain model", "tab:blue"),
  "kept": (f"upcycled after step {UPCYCLED_AT}, optimizer state kept", "tab:orange"),
  "fresh": (f"upcycled after step {UPCYCLED_AT}, optimizer and schedule fresh", "tab:green"),
  "new": ("MUDD from the start", "tab:gray"),
}


def call(log: pathlib.Path, *arguments: str) -> None:
  """Runs a command of this project in a process of its own.

  Args:
    log: the file that its output is appended to.

  Raises:
    MeasurementError: it failed.
  """
  with log.open("a") as file:
    status = subprocess.run(
      [sys.executable, *arguments], cwd=record.ROOT, stdout=file, stderr=subprocess.STDOUT
    ).returncode
  if status:
    lines = log.read_text(errors="replace").splitlines()
    raise MeasurementError(next((line for line in reversed(lines) if line.startswith("maxtext-mudd: ")), f"see {log}"))


def train(work: pathlib.Path, name: str, config: str, steps: int, *keys: str) -> None:
  """Trains a run up to a step, from where it is."""
  saved = [int(x.name) for x in (work / name / "checkpoints").glob("*") if x.name.isdigit()]
  if max(saved, default=-1) >= steps - 1:
    return
  record.say(f"{name}: up to step {steps}")
  run = [f"run_name={name}", f"base_output_directory={work}", f"steps={steps}", *COMMON, *keys]
  call(work / f"{name}.txt", "MaxText/train.py", config, *run)


def upcycle(work: pathlib.Path, option: str, name: str) -> pathlib.Path:
  """The plain run's checkpoint with connections, in the folder `name`."""
  target = work / name
  if not target.exists():
    record.say(f"{name}: upcycle")
    checkpoint = work / "plain" / "checkpoints" / str(UPCYCLED_AT - 1)
    command = ["upcycle", "--checkpoint", str(checkpoint), option, str(target), MUDD, SAME_WIDTHS]
    call(work / f"{name}.txt", "-m", "maxtext_mudd.convert", *command)
  return target


def run_all(work: pathlib.Path) -> None:
  """Trains and converts all that is not there yet."""
  work.mkdir(parents=True, exist_ok=True)
  train(work, "plain", PLAIN, UPCYCLED_AT, WHOLE)
  upcycle(work, "--run", "kept")
  parameters = upcycle(work, "--maxtext-dir", "upcycled") / "items"
  train(work, "kept", MUDD, STEPS, WHOLE, SAME_WIDTHS)
  train(work, "fresh", MUDD, STEPS - UPCYCLED_AT, SAME_WIDTHS, f"load_parameters_path={parameters}")
  train(work, "plain", PLAIN, STEPS, WHOLE)
  train(work, "new", MUDD, STEPS, WHOLE, SAME_WIDTHS)


def read(work: pathlib.Path, name: str) -> dict:
  """The losses of a run, in bits per byte, by the number of steps that its parameters have had, in the plain run too.
  Training losses are those of single batches."""
  run = report.read(work / name)
  before = UPCYCLED_AT + 1 if name == "fresh" else 1
  train, held_out = (
    {step + before: round(loss, 6) for step, loss in run.bits_per_byte(tag).items()}
    for tag in (report.TRAIN_LOSS, report.EVAL_LOSS)
  )
  return {"run": name, "held_out": held_out, "train": train, "tokens_per_second": round(run.tokens_per_second())}


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Draws held-out losses, from 100 steps on, and the difference of each run to the plain one."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
  plain = rows[0]["held_out"]
  for row in rows:
    label, color = RUNS[row["run"]]
    losses = {step: loss for step, loss in row["held_out"].items() if step >= 100}
    if row["run"] in ("kept", "fresh"):  # they start where the plain run is
      losses = {UPCYCLED_AT: plain[UPCYCLED_AT]} | losses
    left.plot(losses.keys(), losses.values(), color=color, marker="o", markersize=4, label=label)
    right.plot(losses.keys(), [x - plain[step] for step, x in losses.items()], color=color, marker="o", markersize=4)
  left.set(title="held-out loss", xlabel="steps", ylabel="bits per byte")
  right.set(title="difference to the plain model", xlabel="steps", ylabel="bits per byte")
  for axes in (left, right):
    axes.axvline(UPCYCLED_AT, color="black", linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.3)
  left.legend(fontsize=8)
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def text(rows: list[dict]) -> str:
  """The table of held-out losses, and how the first steps after upcycling compare."""
  by_name = {row["run"]: row for row in rows}
  steps = sorted(by_name["plain"]["held_out"])
  lines = [
    [RUNS[row["run"]][0], *(f"{row['held_out'][step]:.4f}" if step in row["held_out"] else "" for step in steps)]
    for row in rows
  ]
  first = UPCYCLED_AT + 1
  losses = ", ".join(f"{by_name[name]['train'][first]:.6f} ({name})" for name in ("plain", "kept"))
  return (
    "Held-out loss in bits per byte by the number of steps, one run each.\n\n"
    + record.table(["run", *map(str, steps)], lines)
    + f"\nTraining loss of step {first}, on the same batch with the same parameters: {losses}.\n"
  )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--work", type=pathlib.Path, default=record.ROOT / "runs" / "upcycle", help="folder of the runs")
  parser.add_argument("--output", default=f"{datetime.date.today().isoformat()}-upcycle", help="name of the results")
  parser.add_argument("--figure", type=pathlib.Path, default=record.ROOT / "docs" / "upcycle.png")
  options = parser.parse_args()
  machine = study.machine()
  about = record.facts(f"{machine['cpu']}, {machine['cores']} cores", "machine", ("jax", "maxtext"))
  try:
    run_all(options.work.absolute())
  except MeasurementError as error:
    print(error, file=sys.stderr)
    return 2
  rows = [read(options.work, name) for name in RUNS]
  draw(rows, options.figure)
  print(record.write(options.output, about, text(rows), rows).with_suffix(".md"))
  return 0


if __name__ == "__main__":
  sys.exit(main())
