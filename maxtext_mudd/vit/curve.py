"""Draws the curves of training runs from their metrics."""

from collections.abc import Mapping, Sequence
import pathlib


def draw(runs: Mapping[str, Sequence[dict[str, float]]], path: pathlib.Path) -> None:
  """Writes a picture with two panels: loss of training and of evaluation, and accuracy.

  Args:
    runs: the records of `metrics.jsonl` by the name of the run.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, (losses, accuracies) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
  for number, (name, records) in enumerate(runs.items()):
    color = f"C{number}"
    for panel, key, style, label in (
      (losses, "loss", {"alpha": 0.35, "linewidth": 1}, "train"),
      (losses, "eval_loss", {"marker": "o"}, "eval"),
      (accuracies, "accuracy", {"marker": "o"}, "eval"),
    ):
      points = [(record["step"], record[key]) for record in records if key in record]
      if points:
        panel.plot(*zip(*points), color=color, label=f"{name}, {label}", **style)
  losses.set(xlabel="step", ylabel="cross entropy")
  accuracies.set(xlabel="step", ylabel="top-1 accuracy", ylim=(0, 1))
  for panel in (losses, accuracies):
    panel.grid(alpha=0.3)
    panel.legend()
  beside = path.with_name(f".partial-{path.name}")
  figure.savefig(beside, dpi=100)
  pyplot.close(figure)
  beside.replace(path)
