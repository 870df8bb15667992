"""Tiny image classifiers for the tests."""

from flax import nnx
import jax
import numpy as np

from maxtext_mudd.vit import config as vit_config
from maxtext_mudd.vit.model import ViT
from tests import models

SMALL = {
  "dataset": "digits",
  "image_size": 8,
  "channels": 1,
  "patch": 4,
  "width": 16,
  "depth": 3,
  "heads": 2,
  "mlp_dim": 32,
  "classes": 10,
  "dropout": 0.0,
  "crop": "none",
  "flip": False,
  "randaugment_level": 0,
  "mixup": 0.0,
  "batch_size": 16,
  "steps": 6,
  "warmup_steps": 1,
}
MUDD = {"mudd": True, "mudd_activation": "gelu_tanh", "mudd_hidden_round_to": 0}
NORMS = {**MUDD, "mudd_pre_norm": True, "mudd_post_norm": True}
COEFFICIENT = {**MUDD, "mudd_static": False, "aggregate_coefficient": True}
FAMILIES = {
  "residual": {"mudd": True, "depth_connection": "residual"},
  "MUDD": MUDD,
  "MUDD with norms": NORMS,
  "MUDD with a coefficient": COEFFICIENT,
  "DenseFormer": {"mudd": True, "mudd_ways": 1, "mudd_dynamic": False},
  "MUDD, placements": {
    "mudd": True,
    "mudd_placements": [
      {"block": "1..2", "sources": "all", "streams": "qv"},
      {"block": "L", "sources": [0, "L"], "streams": "r"},
    ],
  },
  "DHC×4": {"mudd": True, "depth_connection": "hyper_connections"},
  "mHC": {"mudd": True, "depth_connection": "mhc"},
  "AttnRes": {"mudd": True, "depth_connection": "attnres"},
  "AttnRes, route for values": {"mudd": True, "depth_connection": "attnres", "mudd_attnres_value_route": True},
  "DCA": {"mudd": True, "depth_connection": "dca"},
}


def config(**keys):
  return vit_config.build(SMALL | keys)


def mesh():
  automatic = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1], axis_types=automatic)


def build(cfg, seed=0) -> ViT:
  return ViT(cfg, mesh(), nnx.Rngs(seed))


def count(cfg) -> int:
  """Parameters of the model itself, built without memory."""
  state = nnx.state(nnx.eval_shape(lambda: build(cfg)), nnx.Param)
  return sum(x.size for x in jax.tree.leaves(state))


def randomise(model, seed=0) -> dict[str, np.ndarray]:
  """Sets every parameter to random values and returns them, by path."""
  shapes = {path: value.get_value().shape for path, value in models.parameters(model).items()}
  values = models.random_parameters(shapes, seed)
  models.set_parameters(model, values)
  return values


def images(cfg, number=2, seed=0) -> np.ndarray:
  """Random images in [-1, 1]."""
  shape = (number, cfg.image_size, cfg.image_size, cfg.channels)
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
