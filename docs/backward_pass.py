"""Draws docs/backward_pass.png: the arrays that each step of a model's backward pass reads and writes, for 12 blocks.

Run it as `.venv/bin/python docs/backward_pass.py`.
"""

import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib import patches
from matplotlib import pyplot as plt

from maxtext_mudd.connections import history
from maxtext_mudd.connections.base import Plan, Site

BLOCKS = 12
READ, ACCUMULATED, PUSHED = "#9ecae1", "#fd8d3c", "#a63603"
MEANINGS = {
  READ: "source read",
  ACCUMULATED: "source read, its gradient accumulator updated",
  PUSHED: "gradient accumulator updated, source not read",
}


def mudd_plan() -> Plan:
  """A DA after every block, which sees all sources and makes four streams; the last makes the residual stream only."""
  blocks = range(1, BLOCKS + 1)
  return Plan(BLOCKS, {i: Site(i, tuple(range(i + 1)), "r" if i == BLOCKS else "qkvr") for i in blocks})


def steps(plan: Plan) -> list[tuple[str, str, dict[int, str]]]:
  """The steps of the backward pass in their order, as (name, other inputs and outputs, color of each source)."""
  rows = []
  for block in range(BLOCKS, 0, -1):
    place = history.place(plan, block)
    site = place.aggregate
    colors = {j: ACCUMULATED if j >= place.oldest_near else READ for j in site.sources}
    recomputed = f"; recomputes the streams of DA_{place.previous.block}" if place.previous else ""
    rows.append((f"DA_{block}", f"gradients of {site.ways} stream{'s'[: site.ways > 1]}{recomputed}", colors))
    if place.is_first_of_group:
      group = (site, *place.later_in_group)
      pushed = {j: PUSHED for member in group for j in member.sources if j < place.oldest_near}
      streams = sum(member.ways for member in group)
      name = f"push of DA_{block} to DA_{group[-1].block}" if len(group) > 1 else f"push of DA_{block}"
      started = "; accumulators start at zero" if place.in_last_group else ""
      rows.append((name, f"gradients of {streams} streams{started}", pushed))
  return rows


def main() -> None:
  rows = steps(mudd_plan())
  figure, axes = plt.subplots(figsize=(10, 6.2), dpi=150)
  for row, (name, inputs_and_outputs, colors) in enumerate(rows):
    y = len(rows) - row
    axes.text(-0.3, y + 0.4, name, ha="right", va="center", weight="bold" if name.startswith("push") else "normal")
    axes.text(BLOCKS + 1.3, y + 0.4, inputs_and_outputs, va="center", fontsize=8, color="#444444")
    for j, color in colors.items():
      axes.add_patch(patches.Rectangle((j, y), 0.92, 0.8, color=color))
  for j in range(BLOCKS + 1):
    axes.text(j + 0.46, len(rows) + 1.3, f"X_{j}", ha="center", fontsize=7)
  handles = [patches.Patch(color=color, label=meaning) for color, meaning in MEANINGS.items()]
  axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False, fontsize=8)
  axes.set_xlim(-5, BLOCKS + 9)
  axes.set_ylim(0.5, len(rows) + 2)
  axes.axis("off")
  figure.tight_layout()
  figure.savefig(pathlib.Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
  main()
