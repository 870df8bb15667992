"""Run as a program: five train steps of a random model on one batch, on a mesh of all devices.

Prints JSON: the losses, and the collectives whose results are as large as one device's part of a source, or larger, and
as wide as a source; in the aggregates gathers of any shape, too. Sums over parts of D are not gathers.
"""

import json
import math
import re
import sys

from flax import nnx
from flax.core.spmd import logical_axis_rules
import jax
from maxtext.utils import maxtext_utils, sharding
import numpy as np

from tests import models, steps

STEPS = 5
GATHERS = "all-gather|all-to-all"
COLLECTIVES = f"{GATHERS}|all-reduce|collective-permute|collective-broadcast"


def gathered(text: str, width: int, least: int) -> dict[str, list[str]]:
  """Lines of compiled HLO with such collectives.

  Args:
    width: D.
    least: number of entries.
  """
  found = {"in_aggregates": [], "elsewhere": []}
  for line in text.splitlines():
    made = re.search(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", line)
    shapes = [tuple(map(int, x.split(","))) for x in re.findall(r"\w+\[([\d,]+)\]", made[1])] if made else []
    large = [shape for shape in shapes if math.prod(shape) >= least]
    as_wide = any(shape[-1] == width for shape in large)
    # Parameters have it in their names, too.
    of_aggregate = re.search(r'op_name="jit\([^"]*depth_aggregate', line)
    if of_aggregate and (as_wide or (large and made[2] in GATHERS.split("|"))):
      found["in_aggregates"].append(line.strip())
    elif as_wide:
      found["elsewhere"].append(line.strip())
  return found


def order_heads_for(shards: int, cfg, state) -> None:
  """Orders the heads of fused projections as MaxText reads them where devices share the heads: queries, keys and values
  of one device after another. That of gpt3 has an axis for these three, and needs no order."""
  if cfg.decoder_block.value == "gpt3":
    return
  q, kv = np.arange(cfg.num_query_heads), cfg.num_query_heads + np.arange(2 * cfg.num_kv_heads)
  parts = [np.split(heads, shards) for heads in (q, *np.split(kv, 2))]
  order = np.concatenate([heads for of_device in zip(*parts) for heads in of_device])
  for path, variable in nnx.to_flat_state(state["model"].filter(nnx.Param)):
    if path[-2:] == ("qkv_proj", "kernel"):
      variable.set_value(jax.device_put(variable.get_value()[..., order, :], variable.get_value().sharding))


def main(overrides: dict) -> None:
  sharing = overrides.pop("sharing_heads", 1)
  cfg = models.config(**overrides)
  step, state = steps.prepare(cfg)
  order_heads_for(sharing, cfg, state)
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
  from maxtext_mudd import plugin

  plugin.install()

  main(json.loads(sys.argv[1]))
