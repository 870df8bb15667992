"""Run as a program on eight virtual CPU devices: one model through the fused kernel and through XLA, on one mesh.

Prints JSON: the losses, the largest difference of a gradient over its largest entry, and the collectives of the fused
form that come from its passes.
"""

import json
import sys

from flax import nnx
from flax.core.spmd import logical_axis_rules
import jax
from maxtext.trainers.pre_train import train
from maxtext.utils import maxtext_utils
import numpy as np

from tests import models


def loss_and_gradients(cfg):
  """(loss, gradients by path, compiled text) of a random model, its parameters where MaxText puts them."""
  mesh = maxtext_utils.get_mesh_from_config(cfg)
  with jax.set_mesh(mesh), logical_axis_rules(cfg.logical_axis_rules):
    model = models.construct(cfg, mesh)
    models.randomise(model)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.device_put(params, nnx.get_named_sharding(params, mesh))
    data = models.batch(cfg)

    def run(params, data):
      def loss(params):
        return train.loss_fn(nnx.merge(graph, params, rest, copy=True), cfg, dict(data), None, None)

      return jax.value_and_grad(loss, has_aux=True)(params)

    compiled = jax.jit(run).lower(params, data).compile()
    (loss, _), gradients = compiled(params, data)
  return float(loss), {str(p): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(gradients)}, compiled.as_text()


def main(overrides: dict) -> None:
  expected_loss, expected, _ = loss_and_gradients(models.config(**overrides, mudd_kernel="xla"))
  loss, found, text = loss_and_gradients(models.config(**overrides, mudd_kernel="pallas_interpret"))
  errors = {path: float(np.abs(found[path] - x).max() / np.abs(x).max()) for path, x in expected.items()}
  collectives = [line for line in text.splitlines() if " all-gather(" in line or " all-to-all(" in line]
  of_passes = [line.strip() for line in collectives if "shard_map" in line]
  print(json.dumps({"loss": loss, "expected": expected_loss, "errors": errors, "collectives": of_passes}))


if __name__ == "__main__":
  from maxtext_mudd import plugin

  plugin.install()

  main(json.loads(sys.argv[1]))
