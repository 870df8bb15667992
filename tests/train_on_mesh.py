"""Run as a program: five train steps of a random model on one batch, on a mesh of all
devices.

Prints JSON: the losses, and the collectives that gather the outputs of a block, or several, of more tokens or width
than one device has.
"""

import json
import math
import re
import sys

from tests import models, steps

STEPS = 5


def gathered(text: str, cfg) -> list[str]:
  """Lines of all-gathers and all-to-alls in compiled HLO within the aggregates whose result is as large as a source."""
  rows = cfg.global_batch_size_to_train_on * cfg.max_target_length
  found = []
  for line in text.splitlines():
    made = re.search(r"= \(?\w+\[([\d,]+)\]\S* (?:all-gather|all-to-all)(?:-start)?\(", line)
    if made and re.search(r'op_name="jit\([^"]*depth_aggregate', line):  # not parameters, which have it in their names
      size = math.prod(map(int, made[1].split(",")))
      if size >= rows * cfg.emb_dim // cfg.num_target_devices:
        found.append(line.strip())
  return found


def main(overrides: dict) -> None:
  cfg = models.config(**overrides)
  step, state = steps.prepare(cfg)
  text = step.lower(state, models.batch(cfg)).compile().as_text()
  losses = []
  for _ in range(STEPS):
    state, metrics = step(state, models.batch(cfg))
    losses.append(float(metrics["scalar"]["learning/loss"]))
  print(json.dumps({"losses": losses, "gathered": gathered(text, cfg)}))


if __name__ == "__main__":
  from tests import conftest  # noqa: F401  installs the plugin

  main(json.loads(sys.argv[1]))
