"""Draws the figures."""

from collections.abc import Mapping
import pathlib
import warnings

import numpy as np

from maxtext_mudd.analyze.measurement import Named

COLORS = {"q": "tab:blue", "k": "tab:orange", "v": "tab:green", "r": "tab:red", "x": "black"}
COLORS |= {"attention": "tab:blue", "value": "tab:green", "ffn": "tab:red"}
STYLES = ("-", "--", ":", "-.")
MOST_LABELS = 64  # tokens that fit an axis
# Of the largest weight: a colour is linear below it and logarithmic above, since norms grow in depth.
LINEAR_SHARE = 0.01

Results = Mapping[str, Mapping[str, Named]]  # by model, then by name of the array


def write(figure: str, results: Results, path: pathlib.Path) -> None:
  """Writes a picture of the results of all models."""
  import matplotlib

  matplotlib.use("Agg")
  # Names and tokens may have dollar signs, and letters that the font lacks.
  with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing")
    DRAWN[figure](results).savefig(path, dpi=120)


def _axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4.5)):
  from matplotlib import pyplot

  return pyplot.subplots(
    rows, columns, figsize=(columns * size[0], rows * size[1]), layout="constrained", squeeze=False
  )


def _lines(axes, results: Results, name: str, x: str) -> None:
  """A line for each model and stream."""
  for style, (model, arrays) in zip(STYLES * len(results), results.items()):
    array = arrays[name]
    for stream, values in zip(array.labels["stream"], array.values):
      color = COLORS.get(stream, "gray")
      axes.plot(array.labels[x], values, style, color=color, label=f"{model}, {stream}", marker=".")
      if "percentile_5" in arrays:
        low, high = (
          arrays[key].values[array.labels["stream"].index(stream)] for key in ("percentile_5", "percentile_95")
        )
        axes.fill_between(array.labels[x], low, high, color=color, alpha=0.1, linewidth=0)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)


def _similarity(results: Results):
  picture, ((axes,),) = _axes()
  _lines(axes, results, "mean", "block")
  axes.set(
    xlabel="block i", ylabel="cosine of the inputs of blocks i and i+1", title="mean, and 5th to 95th percentile"
  )
  return picture


def _lens(results: Results):
  picture, ((axes,),) = _axes()
  _lines(axes, results, "loss", "blocks_before")
  axes.set(xlabel="blocks before", ylabel="loss of the output head, nats per token")
  return picture


def _heads(results: Results):
  picture, ((axes,),) = _axes()
  for style, (model, arrays) in zip(STYLES * len(results), results.items()):
    active = arrays["active"]
    axes.plot(active.labels["block"], active.values, style, marker=".", label=model)
  axes.set(xlabel="block", ylabel="share of active heads", ylim=(0, None))
  axes.grid(alpha=0.3)
  axes.legend()
  return picture


def _attention(results: Results):
  of_models = {
    model: next((name, maps) for name, maps in arrays.items() if name.startswith("block_"))
    for model, arrays in results.items()
  }
  heads = max(len(maps.values) for _, maps in of_models.values())
  columns = min(heads, 8)
  rows = -(-heads // columns)
  scale = 2 if heads <= 4 else 1  # few heads have room for tokens that can be read
  picture, axes = _axes(rows * len(results), columns, (2.6 * scale, 2.8 * scale))
  for axis in axes.flat:
    axis.set_axis_off()
  for k, (model, (name, maps)) in enumerate(of_models.items()):
    for head, values in enumerate(maps.values):
      axis = axes[k * rows + head // columns, head % columns]
      axis.imshow(values, vmin=0, vmax=1, cmap="magma", interpolation="nearest")
      axis.set_title(
        f"{model}, {name.replace('_', ' ')}, head {head + 1}" if head == 0 else f"head {head + 1}", fontsize=8
      )
      if len(values) <= MOST_LABELS:
        axis.set_axis_on()
        texts = [repr(text)[1:-1] for text in maps.labels["query"]]
        axis.set_xticks(range(len(texts)), texts, fontsize=3 * scale, rotation=90)
        axis.set_yticks(range(len(texts)), texts, fontsize=3 * scale)
  return picture


def _weights(results: Results):
  streams = max((arrays["mean"].labels["stream"] for arrays in results.values()), key=len)
  from matplotlib.colors import SymLogNorm

  picture, axes = _axes(2 * len(results), len(streams), (3.2, 3))
  for axis in axes.flat:
    axis.set_axis_off()
  for k, (model, arrays) in enumerate(results.items()):
    for row, name in enumerate(("mean", "deviation")):
      array = arrays[name]
      largest = np.nanmax(np.abs(array.values)) or 1
      for column, (stream, values) in enumerate(zip(array.labels["stream"], array.values)):
        axis = axes[2 * k + row, column]
        axis.set_axis_on()
        norm = SymLogNorm(LINEAR_SHARE * largest, vmin=-largest if name == "mean" else 0, vmax=largest)
        image = axis.imshow(values, norm=norm, cmap="RdBu_r" if name == "mean" else "viridis")
        _ticks(axis, array.labels["source"], array.labels["aggregate"])
        axis.set_title(f"{model}: {name}, stream {stream}" if column == 0 else f"stream {stream}", fontsize=9)
        axis.set_xlabel("source")
        axis.set_ylabel("aggregate")
      bar = picture.colorbar(image, ax=axes[2 * k + row, : len(array.values)], shrink=0.8)
      bar.set_ticks(ticks := _powers(norm), labels=[f"{x:g}" for x in ticks])
  return picture


def _powers(norm) -> list[float]:
  """Zero, and the powers of ten of either sign in the logarithmic part of a scale of colours."""
  first, last = np.ceil(np.log10(norm.linthresh)), np.floor(np.log10(norm.vmax))
  powers = (10.0 ** np.arange(first, last + 1)).tolist()
  return [x for x in [*(-x for x in reversed(powers)), 0.0, *powers] if x >= norm.vmin]


def _ablate(results: Results):
  picture, axes = _axes(len(results), 2, (5, 4))
  for row, (model, arrays) in enumerate(results.items()):
    for axis, name in zip(axes[row], ("source", "stream")):
      array = arrays[name]
      values, columns = array.values, [*array.labels[name]]
      if name == "stream":
        values, columns = np.column_stack([values, arrays["aggregate"].values]), [*columns, "all"]
      largest = np.nanmax(np.abs(values)) or 1
      image = axis.imshow(values, vmin=-largest, vmax=largest, cmap="RdBu_r", aspect="auto")
      _ticks(axis, columns, array.labels["aggregate"])
      axis.set(xlabel=name, ylabel="aggregate")
      axis.set_title(
        f"{model}: change of loss by {name}, nats; all weights {arrays['everything'].values:+.3f}", fontsize=8
      )
      picture.colorbar(image, ax=axis)
  return picture


def _speed(results: Results):
  picture, ((axes,),) = _axes()
  ((_, arrays),) = results.items()
  x, y, errors = (arrays[name].values for name in ("speed_ratio", "loss", "standard_error"))
  axes.errorbar(x, y, yerr=np.nan_to_num(errors), fmt="o")
  for name, at in zip(arrays["loss"].labels["model"], zip(x, y)):
    axes.annotate(name, at, textcoords="offset points", xytext=(6, 4), fontsize=8)
  axes.set(xlabel="speed, relative to the plain model", ylabel="held-out loss")
  axes.margins(0.12)
  axes.grid(alpha=0.3)
  return picture


def _ticks(axis, columns, rows) -> None:
  """At most about twelve labels on each axis."""
  for labels, place in ((columns, axis.set_xticks), (rows, axis.set_yticks)):
    step = -(-len(labels) // 12)
    place(range(0, len(labels), step), [str(x) for x in labels[::step]], fontsize=7)


DRAWN = {
  "similarity": _similarity,
  "heads": _heads,
  "attention": _attention,
  "weights": _weights,
  "lens": _lens,
  "ablate": _ablate,
  "speed": _speed,
}
