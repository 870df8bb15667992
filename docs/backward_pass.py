"""Draws docs/backward_pass.png: which pass of the backward pass reads and writes which arrays, in a model of 12 blocks.

.venv/bin/python docs/backward_pass.py
"""

import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib import patches
from matplotlib import pyplot as plt

from maxtext_mudd.connections import history
from maxtext_mudd.connections.mudd import topology

BLOCKS = 12
READ, ACCUMULATED, PUSHED = "#9ecae1", "#fd8d3c", "#a63603"
NAMES = {
  READ: "source read",
  ACCUMULATED: "source read, its gradient accumulator updated",
  PUSHED: "gradient accumulator updated, source not read",
}


def steps(model: topology.Topology) -> list[tuple[str, str, dict[int, str]]]:
  """(pass, what it takes and returns besides, color by source), in the order of the backward pass."""
  listed = []
  for block in range(BLOCKS, 0, -1):
    place = history.place(model, block)
    own = place.aggregate
    colors = {j: ACCUMULATED if j >= place.floor else READ for j in own.sources}
    recomputed = f"; recomputes the streams of DA_{place.before.block}" if place.before else ""
    starts = "; accumulators start" if place.in_top_group else ""
    listed.append((f"DA_{block}", f"gradients of {own.ways} stream{'s'[: own.ways > 1]}{recomputed}", colors))
    if place.is_lowest:
      group = (own, *place.above)
      far = {j: PUSHED for member in group for j in member.sources if j < place.floor}
      streams = sum(member.ways for member in group)
      label = f"push of DA_{block} to DA_{group[-1].block}" if len(group) > 1 else f"push of DA_{block}"
      listed.append((label, f"gradients of {streams} streams{starts}", far))
  return listed


def main() -> None:
  model = topology.dense(
    BLOCKS,
    (1,) * BLOCKS,
    ways=4,
    dense_streams="qkvr",
    dynamic=True,
    dilation=1,
    period=1,
    window=0,
    depth_start=0.0,
    hidden_expansion=1.0,
    last_hidden_expansion=4.0,
    round_to=64,
  )
  listed = steps(model)
  figure, axes = plt.subplots(figsize=(10, 6.2), dpi=150)
  for row, (name, besides, colors) in enumerate(listed):
    y = len(listed) - row
    axes.text(-0.3, y + 0.4, name, ha="right", va="center", weight="bold" if name.startswith("push") else "normal")
    axes.text(BLOCKS + 1.3, y + 0.4, besides, va="center", fontsize=8, color="#444444")
    for j, color in colors.items():
      axes.add_patch(patches.Rectangle((j, y), 0.92, 0.8, color=color))
  for j in range(BLOCKS + 1):
    axes.text(j + 0.46, len(listed) + 1.3, f"X_{j}", ha="center", fontsize=7)
  handles = [patches.Patch(color=color, label=name) for color, name in NAMES.items()]
  axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False, fontsize=8)
  axes.set_xlim(-5, BLOCKS + 9)
  axes.set_ylim(0.5, len(listed) + 2)
  axes.axis("off")
  figure.tight_layout()
  figure.savefig(pathlib.Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
  main()
