"""Trains small models with quantization and without, from the same seeds on the same data, and compares their losses.

    .venv/bin/python benchmarks/quantization.py                                  # all recipes: 6 minutes of CPU time
    .venv/bin/python benchmarks/quantization.py --recipes qwix:int8 --seeds 3 scan_layers=true

A recipe is a value of `quantization`, after the library that computes it: `qwix:` for `use_qwix_quantization: true`,
`aqt:` otherwise. For the plain model and for MUDD, the table has what quantization adds to the loss.
"""

import argparse
from collections.abc import Mapping, Sequence
import statistics
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils
import numpy as np
import omegaconf
import train_steps

from maxtext_mudd import plugin

RECIPES = ("aqt:int8", "aqt:fp8", "aqt:nanoo_fp8", "qwix:int8", "qwix:fp8", "qwix:fp8_full")
MODELS = {"plain": False, "MUDD": True}
STEPS = 80
SUCCESSORS = 4  # of each token in the data
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for a 95% interval, by number of seeds
SIZES = {
  "run_name": "quantization",
  "enable_checkpointing": False,
  "log_config": False,
  "skip_jax_distributed_system": True,
  "decoder_block": "llama2",
  "scan_layers": False,
  "attention": "dot_product",
  "dtype": "float32",
  "weight_dtype": "float32",
  # Qwix takes an array for a weight if their shapes are equal, so no width equals a length.
  "base_emb_dim": 48,
  "base_num_query_heads": 3,
  "base_num_kv_heads": 3,
  "head_dim": 16,
  "base_mlp_dim": 96,
  "base_num_decoder_layers": 3,
  "vocab_size": 320,
  "max_target_length": 32,
  "per_device_batch_size": 8,
  "steps": STEPS,
  "learning_rate": 1e-2,
  "gradient_clipping_threshold": 1.0,
}


def configuration(recipe: str, mudd: bool, overrides: Mapping[str, Any] = {}):
  """The configuration of a small model; an empty recipe is no quantization."""
  library, _, quantization = recipe.partition(":")
  keys = {"mudd": mudd, "quantization": quantization, "use_qwix_quantization": library == "qwix"}
  return pyconfig.initialize(["", "mudd_base.yml"], **(SIZES | keys | overrides))


def batches(config, seed: int, number: int) -> list[dict[str, np.ndarray]]:
  """Batches of a Markov chain: each token has a few successors, of different probabilities."""
  successors = np.random.default_rng(0).integers(0, config.vocab_size, (config.vocab_size, SUCCESSORS))
  probabilities = 0.5 ** np.arange(1, SUCCESSORS + 1)
  rng = np.random.default_rng([seed, 1])
  shape = (int(config.global_batch_size_to_train_on), config.max_target_length)
  position = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  ones = np.ones(shape, np.int32)
  rest = {"inputs_position": position, "targets_position": position}
  rest |= {"inputs_segmentation": ones, "targets_segmentation": ones}
  made = []
  for _ in range(number):
    tokens = [rng.integers(0, config.vocab_size, shape[0])]
    for _ in range(shape[1]):
      choice = rng.choice(SUCCESSORS, shape[0], p=probabilities / probabilities.sum())
      tokens.append(successors[tokens[-1], choice])
    tokens = np.stack(tokens, 1).astype(np.int32)
    made.append({"inputs": tokens[:, :-1], "targets": tokens[:, 1:], **rest})
  return made


def initial_parameters(mudd: bool, seed: int, overrides: Mapping[str, Any]) -> dict:
  """Parameters of a model that is not quantized, so that all recipes start from the same ones."""
  config = configuration("", mudd, overrides)
  mesh = maxtext_utils.get_mesh_from_config(config)
  with jax.set_mesh(mesh):
    model = model_creation_utils.create_model(config, mesh, rngs=nnx.Rngs(params=seed, dropout=seed))
  return jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


class Trained:
  """The train step of one model with one recipe."""

  def __init__(self, recipe: str, mudd: bool, overrides: Mapping[str, Any] = {}):
    self.config = configuration(recipe, mudd, overrides)
    self._step = train_steps.TrainStep(recipe, self.config)
    self._step.load()
    self._start = self._step.state

  def loss(self, parameters: dict, seed: int, steps: int) -> float:
    """Mean training loss of the last quarter of the steps, each on tokens that no step before it has read."""
    state = jax.tree.map(jnp.copy, self._start)  # a step frees the arrays that it is given
    nnx.replace_by_pure_dict(state, {"model": parameters})
    self._step.state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, self._start))
    losses = []
    for batch in batches(self.config, seed, steps):
      self._step.run(batch, 1)
      losses.append(self._step.loss())
    return statistics.mean(losses[-(steps // 4) :])


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
  """Mean, and half the width of its 95% interval."""
  return statistics.mean(values), T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def compare(recipes: Sequence[str], seeds: int, steps: int, overrides: Mapping[str, Any] = {}) -> dict[str, dict]:
  """From the name of a model to {recipe: losses by seed}; the recipe "" is the model without quantization."""
  losses = {}
  for name, mudd in MODELS.items():
    parameters = [initial_parameters(mudd, seed, overrides) for seed in range(seeds)]
    losses[name] = {}
    for recipe in ("", *recipes):
      trained = Trained(recipe, mudd, overrides)
      losses[name][recipe] = [trained.loss(parameters[seed], seed, steps) for seed in range(seeds)]
      print(name, recipe or "float", *(f"{x:.4f}" for x in losses[name][recipe]), flush=True)
  return losses


def increases(losses: dict[str, list[float]], recipe: str) -> list[float]:
  """What a recipe adds to the loss of a model, by seed."""
  return [quantized - plain for quantized, plain in zip(losses[recipe], losses[""])]


def table(losses: dict[str, dict]) -> list[str]:
  """The rows of the table, in Markdown."""
  float_losses = " | ".join(f"{statistics.mean(x['']):.4f}" for x in losses.values())
  rows = ["| recipe | plain | MUDD | MUDD minus plain |", "|---|---|---|---|", f"| none | {float_losses} | |"]
  for recipe in losses["plain"]:
    if recipe:
      of_plain, of_mudd = (increases(losses[name], recipe) for name in MODELS)
      columns = (of_plain, of_mudd, [b - a for a, b in zip(of_plain, of_mudd)])
      cells = ["{:+.4f} ± {:.4f}".format(*mean_and_interval(x)) for x in columns]
      rows.append(f"| `{recipe}` | " + " | ".join(cells) + " |")
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  recipes = ",".join(RECIPES)
  parser.add_argument("--recipes", default=recipes, help="recipes, separated by commas (default: %(default)s)")
  parser.add_argument("--seeds", type=int, default=3, choices=T_95, help="number of seeds (default: 3)")
  parser.add_argument("--steps", type=int, default=STEPS, help="train steps of each run (default: %(default)s)")
  parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="MaxText's keys")
  arguments = parser.parse_args()
  overrides = dict(omegaconf.OmegaConf.from_dotlist(arguments.overrides))
  losses = compare(arguments.recipes.split(","), arguments.seeds, arguments.steps, overrides)
  print("\n".join(table(losses)))


plugin.install()
if __name__ == "__main__":
  main()
