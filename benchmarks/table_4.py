"""Draws the speed of MUDD models, relative to their plain models, beside the paper's Table 4.

    .venv/bin/python benchmarks/table_4.py benchmarks/results/2026-11-22-throughput-mudd-tiny-cpu.json PICTURE.png

Several results of throughput.py can be named. They are drawn in one picture.
"""

import json
import pathlib
import sys

# Training speed of MUDDFormer over Transformer++, in percent. The last one is of the first's sparse 2×2 variant.
PAPER = {"1.3B": 89.8, "2.8B": 84.0, "6.9B": 95.6, "2×2": 97.8}
PAPER_LABEL = "paper, Table 4 and sparse 2×2: TPU v5p-128, no custom kernel"


def draw(results: list[dict], path: pathlib.Path) -> None:
  """Draws a picture of results of throughput.py, as read from its JSON files."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  measured = [(result, row) for result in results for row in result["rows"] if not row["refused"]]
  devices = list(dict.fromkeys(result["device"] for result in results))
  names = [f"MUDDFormer\n{name}" for name in PAPER] + [row["model"].replace(" ", "\n") for _, row in measured]
  figure, axes = pyplot.subplots(figsize=(max(8, 1.1 * len(names)), 5), layout="constrained")
  axes.plot(range(len(PAPER)), PAPER.values(), "D", color="dimgray", markerfacecolor="none", label=PAPER_LABEL)
  for device, color in zip(devices, ("tab:orange", "tab:blue", "tab:green", "tab:red")):
    points = [(x, row["ratio"]) for x, (result, row) in enumerate(measured, len(PAPER)) if result["device"] == device]
    xs, ratios = [x for x, _ in points], [ratio for _, ratio in points]
    axes.vlines(xs, *percent(ratios, "min", "max"), color=color, linewidth=1)
    axes.vlines(xs, *percent(ratios, "lower_quartile", "upper_quartile"), color=color, linewidth=5, alpha=0.4)
    label = f"measured: {device}; median, quartiles, extremes"
    axes.plot(xs, *percent(ratios, "median"), "o", color=color, label=label)
  for x, value in enumerate([*PAPER.values(), *(100 * row["ratio"]["median"] for _, row in measured)]):
    axes.annotate(f"{value:.1f}", (x, value), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
  axes.axhline(100, color="black", linewidth=0.8)
  axes.axvline(len(PAPER) - 0.5, color="black", linewidth=0.8, linestyle=":")
  axes.set_xticks(range(len(names)), names, fontsize=8)
  axes.set_xlim(-0.5, len(names))
  axes.set_ylabel("tokens/s, % of the plain model's")
  axes.set_title("Training throughput, MUDD over plain" + warning(devices), fontsize=10)
  axes.grid(alpha=0.3)
  figure.legend(fontsize=8, loc="outside lower center")
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def percent(ratios: list[dict], *keys: str) -> list[list[float]]:
  """The values of each key, in percent."""
  return [[100 * ratio[key] for ratio in ratios] for key in keys]


def warning(devices: list[str]) -> str:
  """A second line of the title if one of the devices is a CPU."""
  if any(device.startswith("CPU") for device in devices):
    return "\nmeasured on a CPU, not on an accelerator: not comparable with the paper's figures"
  return ""


def main(arguments: list[str]) -> int:
  *files, picture = arguments or [""]
  if not files or not picture.endswith(".png"):
    print("table_4: name results of throughput.py (.json), and a .png to write.", file=sys.stderr)
    return 2
  missing = [name for name in files if not pathlib.Path(name).is_file()]
  if missing:
    print(f"table_4: {missing[0]}: there is no such file; name a result of throughput.py.", file=sys.stderr)
    return 2
  draw([json.loads(pathlib.Path(name).read_text()) for name in files], pathlib.Path(picture))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
