"""Run as a program: trains small image classifiers for a few steps on all devices, from the same random parameters.

Prints JSON: for each set of keys the losses and gradient norms, the sums over an evaluation batch, and of how many
devices' parts the largest parameter consists.
"""

import json
import sys

import jax
import numpy as np

from maxtext_mudd.vit import data, step
from tests import vit_models

STEPS = 3


def run(keys: dict) -> dict:
  config = vit_models.config(**keys)
  program = step.make_program(config, step.make_mesh(config))
  state = program.init()
  params = jax.tree.map(lambda x: np.asarray(x), state.params)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  moved = [(x + 0.3 * rng.standard_normal(x.shape)).astype(x.dtype) for x in leaves]  # connections start at identity
  params = jax.device_put(jax.tree.unflatten(tree, moved), program.shardings.params)
  state = step.TrainState(params, state.optimizer, state.step)
  batches = data.train_iterator(config, data.source(config, "train"))
  metrics = []
  for _ in range(STEPS):
    state, values = program.train(state, *program.place(next(batches)))
    metrics.append([float(values["loss"]), float(values["grad_norm"])])
  batch = next(data.eval_batches(config, data.source(config, "val"), config.batch_size))
  sums = [float(x) for x in program.evaluate(state.params, *program.place(batch))]
  largest = max(jax.tree.leaves(state.params), key=lambda x: x.size)
  parts = len({str(shard.index) for shard in largest.addressable_shards})
  return {"metrics": metrics, "sums": sums, "parts": parts, "devices": jax.device_count()}


if __name__ == "__main__":
  print(json.dumps([run(keys) for keys in json.loads(sys.argv[1])]))
