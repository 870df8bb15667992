"""Prints a summary of a training run, or compares two, from MaxText's TensorBoard events.

    python3 -m maxtext_mudd.report RUN_FOLDER [RUN_FOLDER]

For one run it prints loss and speed and draws the loss curve. For two runs on the same tokens it draws both curves, and
prints the final loss of the second minus that of the first. Loss is in bits per byte, so the runs need the byte
tokenizer, with which a token is a byte. Steps are counted from 1, as on the console, while MaxText counts from 0.
"""

import dataclasses
import math
import pathlib
import struct
import sys

from absl import app
from tensorboardX.proto import event_pb2

TRAIN_LOSS, EVAL_LOSS, SPEED = "learning/loss", "eval/avg_loss", "perf/per_device_tokens_per_sec"


@dataclasses.dataclass(frozen=True)
class Run:
  """The TensorBoard scalars of one run.

  Attributes:
    folder: the folder of the run.
    scalars: the values by tag, then by step. Steps are MaxText's, counted from 0.
  """

  folder: pathlib.Path
  scalars: dict[str, dict[int, float]]

  @property
  def name(self) -> str:
    return self.folder.name

  def bits_per_byte(self, tag: str) -> dict[int, float]:
    """The losses of a tag by step, converted from nats per token. A token of the byte tokenizer is a byte."""
    return {step: loss / math.log(2) for step, loss in sorted(self.scalars.get(tag, {}).items())}

  def tokens_per_second(self) -> float:
    """Tokens per second on each device: the median over the steps, so that compilation and evaluation do not count."""
    speeds = sorted(self.scalars[SPEED].values())
    return speeds[len(speeds) // 2]


def records(data: bytes):
  """Yields the payloads of a TFRecord file, in which a record is length, checksum, payload and checksum.

  An incomplete last record is left out.
  """
  start = 0
  while start + 12 <= len(data):
    (length,) = struct.unpack_from("<Q", data, start)
    end = start + 12 + length
    if end + 4 > len(data):
      return
    yield data[start + 12 : end]
    start = end + 4


def events(folder: pathlib.Path):
  """Yields the TensorBoard events under a run's folder, file by file in the order in which the files were written."""
  for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime):
    for record in records(file.read_bytes()):
      yield event_pb2.Event.FromString(record)


def read_scalars(folder: pathlib.Path) -> dict[str, dict[int, float]]:
  """The scalars under a run's folder, by tag and step. If a resumed run wrote a step again, the later value counts."""
  scalars: dict[str, dict[int, float]] = {}
  for event in events(folder):
    for value in event.summary.value:
      if value.HasField("simple_value"):
        scalars.setdefault(value.tag, {})[event.step] = value.simple_value
  return scalars


def read_texts(folder: pathlib.Path) -> dict[str, str]:
  """The last text of each tag, such as `num_model_parameters`, under a run's folder."""
  return {
    value.tag.removesuffix("/text_summary"): value.tensor.string_val[0].decode()
    for event in events(folder)
    for value in event.summary.value
    if value.tensor.string_val
  }


def read(folder: pathlib.Path) -> Run:
  """Reads the run in a folder.

  Raises:
    ValueError: the folder has no events of training.
  """
  scalars = read_scalars(folder)
  for tag in (TRAIN_LOSS, SPEED):
    if not scalars.get(tag):
      raise ValueError(f"{folder}: no TensorBoard events with {tag}; pass the folder of a training run.")
  return Run(folder, scalars)


def draw(runs: list[Run], path: pathlib.Path) -> None:
  """Writes the loss curves of one or two runs to a picture file."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
  for color, run in zip(("tab:blue", "tab:orange"), runs):
    train, evaluated = run.bits_per_byte(TRAIN_LOSS), run.bits_per_byte(EVAL_LOSS)
    axes.plot(train.keys(), train.values(), color=color, alpha=0.35, linewidth=1, label=f"{run.name}, train")
    axes.plot(evaluated.keys(), evaluated.values(), color=color, marker="o", label=f"{run.name}, eval")
  axes.set(xlabel="step", ylabel="bits per byte")
  if len(runs) == 2:
    axes.set_title(difference(*runs).replace(": ", ":\n"), fontsize=10)
  losses = [loss for run in runs for loss in run.bits_per_byte(TRAIN_LOSS).values()]
  # The largest 5 % are those of the first steps, and would flatten the rest of the curve.
  percentile_95 = sorted(losses)[int(0.95 * (len(losses) - 1))]
  axes.set_ylim(0.95 * min(losses), 1.05 * percentile_95)
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)


def difference(baseline: Run, run: Run) -> str:
  """The evaluation loss of `run` minus that of `baseline`, at the last step after which both were evaluated.

  Raises:
    ValueError: there is no such step.
  """
  run_losses, baseline_losses = run.bits_per_byte(EVAL_LOSS), baseline.bits_per_byte(EVAL_LOSS)
  common_steps = run_losses.keys() & baseline_losses.keys()
  if not common_steps:
    raise ValueError(
      f"{baseline.name} and {run.name} were not evaluated after a common step; train both with the same eval_interval."
    )
  step = max(common_steps)
  change = run_losses[step] - baseline_losses[step]
  return f"after step {step + 1}: {run.name} {change:+.4f} bits per byte against {baseline.name}"


def summary(run: Run) -> list[str]:
  """The lines with the first and last loss of a run, of evaluation if it has any, and with its speed."""
  tag, loss_name = (EVAL_LOSS, "eval loss") if EVAL_LOSS in run.scalars else (TRAIN_LOSS, "train loss")
  losses = list(run.bits_per_byte(tag).items())
  (first_step, first), (last_step, last) = losses[0], losses[-1]
  return [
    run.name,
    f"  {'first ' + loss_name:<23} {first:.4f} bits per byte (after step {first_step + 1})",
    f"  {'last ' + loss_name:<23} {last:.4f} bits per byte (after step {last_step + 1})",
    f"  speed                   {run.tokens_per_second():,.0f} tokens/s per device (median step)",
  ]


def main(argv: list[str]) -> None:
  if len(argv) not in (2, 3):
    sys.exit("usage: python3 -m maxtext_mudd.report RUN_FOLDER [RUN_FOLDER]")
  try:
    runs = [read(pathlib.Path(folder)) for folder in argv[1:]]
    picture = runs[-1].folder / ("comparison.png" if len(runs) == 2 else "loss.png")
    draw(runs, picture)
    lines = [line for run in runs for line in summary(run)]
    if len(runs) == 2:
      lines.append(difference(*runs))
  except ValueError as error:
    sys.exit(f"maxtext-mudd: {error}")
  lines += [f"  loss curve              {picture}", f"  checkpoints             {runs[-1].folder / 'checkpoints'}"]
  if len(runs) == 1:
    lines.append("next: make compare    # trains this model with and without MUDD connections, on the same tokens")
  print("\n".join(["", "-" * 80, *lines, "-" * 80]))


if __name__ == "__main__":
  app.run(main)
