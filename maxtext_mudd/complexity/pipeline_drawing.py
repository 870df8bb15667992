"""Draws what a pipeline sends and keeps."""

from collections.abc import Sequence
import pathlib

from maxtext_mudd.complexity.pipeline import Request, Row
from maxtext_mudd.config.errors import ConfigError


def split(arguments: Sequence[str]) -> tuple[pathlib.Path | None, list[str]]:
  """Separates `--png FILE` from the other arguments.

  Returns:
    the file, None if none is named; and the other arguments.

  Raises:
    ConfigError: the file cannot be one.
  """
  arguments = [part for x in arguments for part in (x.split("=", 1) if x.startswith("--png=") else [x])]
  if "--png" not in arguments:
    return None, arguments
  at = arguments.index("--png")
  file = pathlib.Path(arguments[at + 1] if at + 1 < len(arguments) else "")
  if file.suffix != ".png" or not file.parent.is_dir():
    raise ConfigError(f"--png {file}: name a file that ends in .png, in a folder that exists.")
  return file, arguments[:at] + arguments[at + 2 :]


def write(costs: Sequence[Row], request: Request, file: pathlib.Path) -> None:
  """Writes the picture: bytes by boundary, time over links and network, and memory, by placement."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  picture, (sent, times, kept) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
  for cost in costs:
    sent.plot(range(1, request.stages), cost.megabytes, marker="o", label=cost.name)
  sent.set(xlabel="boundary behind stage", ylabel="MB of a microbatch on a chip", ylim=(0, None))
  sent.set_xticks(range(1, request.stages))
  sent.legend(fontsize=8)
  places = range(len(costs))
  names = [cost.name for cost in costs]
  times.plot([cost.ici for cost in costs], places, "o", label=f"ICI of {request.chip}")
  times.plot([cost.dcn for cost in costs], places, "s", label="DCN")
  times.axvline(1, color="black", linewidth=1)
  times.set(xscale="log", xlabel="largest transfer / forward pass of a stage")
  times.legend(fontsize=8)
  kept.barh(places, [cost.kept_gigabytes for cost in costs], 0.6, color="tab:green")
  kept.set(xlabel="kept for the backward pass, GB on a chip")
  for axes in (times, kept):
    axes.set_yticks(places, names)
    axes.invert_yaxis()
  for axes in (sent, times, kept):
    axes.grid(alpha=0.3)
  picture.suptitle(f"pipeline of {request.stages} stages, {request.microbatches} microbatches")
  picture.savefig(file, dpi=120)
