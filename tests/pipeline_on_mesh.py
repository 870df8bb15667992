"""Run as a program on virtual CPU devices: a model on a pipeline, and the same model without one.

Prints JSON: both losses, the error of all gradients over their norm, the largest error of a gradient over its largest
entry, and the collective-permutes of the compiled program.
"""

import json
import re
import sys

from flax import nnx
from flax.core.spmd import logical_axis_rules
import jax
from maxtext.trainers.pre_train import train
from maxtext.utils import maxtext_utils
import numpy as np

from maxtext_mudd.checkpoints import layout
from tests import models, scanning


def permutes(text: str) -> list[dict]:
  """By collective-permute of compiled HLO: its shape, pairs of devices, and whether it is of a backward pass."""
  found = []
  for line in text.splitlines():
    made = re.search(r"= \(?\w+\[([\d,]*)\]\S* .*?collective-permute(?:-start)?\(", line)
    if made:
      pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)[1]
      shape = [int(x) for x in made[1].split(",")]
      found.append({"shape": shape, "pairs": pairs.count("{"), "backward": "transpose" in line})
  return found


def loss_and_gradients(cfg, values):
  """(loss, gradients by path, compiled text) with these parameters."""
  mesh = maxtext_utils.get_mesh_from_config(cfg)
  with jax.set_mesh(mesh), logical_axis_rules(cfg.logical_axis_rules):
    model = models.construct(cfg, mesh)
    models.set_parameters(model, values)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.device_put(params, nnx.get_named_sharding(params, mesh))
    data = models.batch(cfg)

    def run(params, data):
      def loss(params):
        return train.loss_fn(nnx.merge(graph, params, rest, copy=True), cfg, dict(data), None, None)

      return jax.value_and_grad(loss, has_aux=True)(params)

    compiled = jax.jit(run).lower(params, data).compile()
    (loss, _), gradients = compiled(params, data)
  return float(loss), scanning.by_path(gradients), compiled.as_text()


def main(keys: dict, pipeline: dict) -> None:
  plain = models.config(**keys)
  pipelined = models.config(**keys | pipeline)
  values = scanning.random_values(plain)
  expected_loss, expected, _ = loss_and_gradients(plain, values)
  loss, found, text = loss_and_gradients(pipelined, layout.stack(values, pipelined))
  found = layout.unstack(found, pipelined)
  assert set(found) == set(expected), sorted(set(found) ^ set(expected))
  errors = {path: found[path] - x for path, x in expected.items()}
  norm = scanning.norm_of(expected)
  # Beyond what rounding leaves of a gradient that is zero, or nearly, as of what a norm removes.
  beyond = {path: max(np.abs(x).max() - scanning.ZERO * norm, 0) for path, x in errors.items()}
  of_tensor = {path: float(x / np.abs(expected[path]).max()) for path, x in beyond.items() if x > 0}
  worst = max(of_tensor, key=of_tensor.get, default="")
  result = {
    "expected": expected_loss,
    "loss": loss,
    "error": float(scanning.norm_of(errors) / norm),
    "worst": [worst, of_tensor.get(worst, 0)],
    "permutes": permutes(text),
  }
  print(json.dumps(result))


if __name__ == "__main__":
  from maxtext_mudd import plugin

  plugin.install()

  main(*map(json.loads, sys.argv[1:]))
