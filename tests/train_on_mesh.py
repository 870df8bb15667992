"""Run as a program: five train steps of a random model on one batch, on a mesh of all devices.

Prints JSON: the losses, and the collectives whose results are as wide as a source and as large as one device's part of
it, or larger: of the aggregates, and of the rest of the step.
"""

import json
import math
import re
import sys

from flax.core.spmd import logical_axis_rules
import jax
from maxtext.utils import maxtext_utils, sharding

from tests import models, steps

STEPS = 5
COLLECTIVES = "all-gather|all-to-all|all-reduce|collective-permute|collective-broadcast"


def gathered(text: str, width: int, least: int) -> dict[str, list[str]]:
  """Lines of compiled HLO with such collectives.

  Args:
    width: D.
    least: number of entries.
  """
  found = {"in_aggregates": [], "elsewhere": []}
  for line in text.splitlines():
    made = re.search(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", line)
    shapes = [tuple(map(int, x.split(","))) for x in re.findall(r"\w+\[([\d,]+)\]", made[1])] if made else []
    if any(shape[-1] == width and math.prod(shape) >= least for shape in shapes):
      of_aggregate = re.search(
        r'op_name="jit\([^"]*depth_aggregate', line
      )  # not of parameters, which have it in theirs
      found["in_aggregates" if of_aggregate else "elsewhere"].append(line.strip())
  return found


def main(overrides: dict) -> None:
  cfg = models.config(**overrides)
  step, state = steps.prepare(cfg)
  mesh = maxtext_utils.get_mesh_from_config(cfg)
  data = jax.device_put(models.batch(cfg), sharding.get_input_data_sharding(cfg, mesh))
  losses = []
  with jax.set_mesh(mesh), logical_axis_rules(cfg.logical_axis_rules):  # as MaxText's train loop
    text = step.lower(state, data).compile().as_text()
    for _ in range(STEPS):
      state, metrics = step(state, data)
      losses.append(float(metrics["scalar"]["learning/loss"]))
  of_device = cfg.global_batch_size_to_train_on * cfg.max_target_length * cfg.emb_dim // cfg.num_target_devices
  print(json.dumps({"losses": losses, **gathered(text, cfg.emb_dim, of_device)}))


if __name__ == "__main__":
  from tests import conftest  # noqa: F401  installs the plugin

  main(json.loads(sys.argv[1]))
