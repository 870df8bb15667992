"""Families of connections defined in this file alone: they train single, scanned and sharded, convert and count."""

import json
import os
import re
import subprocess
import sys
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_mudd import connections, plugin
from maxtext_mudd.blocks import num_blocks
from maxtext_mudd.checkpoints import layout
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.connections.base import Cost, HistoryFamily, Plan, Site, check_plan
from maxtext_mudd.connections.family_keys import HistoryKeys, WeightKeys
from maxtext_mudd.connections.keys import key
from maxtext_mudd.connections.norms import rms_norm
from maxtext_mudd.model import counts
from tests import models, runs, steps, train_on_mesh

NAME = "last_two"
KEYS = {"mudd": True, "depth_connection": NAME, "base_num_decoder_layers": 4}
# Of the largest entry. Single and scanned layers differ by float32 rounding; the errors seen are below 2e-6.
TOLERANCE = 4e-6


class LastTwo(HistoryFamily, nnx.Module):
  """Static weights of the last two block outputs, from (0, 1) on."""

  depth_axes: ClassVar = {"a": (None, "sources")}
  keeps_newest = True

  @classmethod
  def plan(cls, config) -> Plan:
    blocks = range(1, num_blocks(config) + 1)
    return Plan(len(blocks), {block: Site(block, (block - 1, block), "x") for block in blocks})

  @classmethod
  def cost(cls, config) -> Cost:
    blocks = num_blocks(config)
    return Cost(parameters=2 * blocks, flops=2 * 2 * config.emb_dim * blocks, activations=blocks)

  def __init__(self, config, site, mesh, rngs):
    a = jnp.zeros((1, len(site.sources)), config.weight_dtype).at[:, -1].set(1)
    self.a = nnx.Param(a, out_sharding=(None, None))

  def weights(self, output, column, visible):
    return self.a[...]

  def streams(self, sums, output):
    return list(sums)


class PerToken(LastTwo):
  """X_i plus the last two block outputs, with a softmax for every token, made from the newest one."""

  depth_axes: ClassVar = {"w": (None, None, "sources")}
  keeps_newest = False

  def __init__(self, config, site, mesh, rngs):
    count = len(site.sources)
    self.w = nnx.Param(jnp.full((config.emb_dim, 1, count), 1 / count), out_sharding=(None, None, None))

  def weights(self, output, column, visible):
    logits = jnp.einsum("btd,dcn->btcn", output, self.w[...]) / output.shape[-1]
    return jax.nn.softmax(logits, where=visible)

  def streams(self, sums, output):
    return [x + output for x in sums]


class PerTokenNormed(PerToken):
  """The same with normed sources."""

  @classmethod
  def source_norm(cls, config, rngs):
    return rms_norm(config, rngs)


FAMILIES = {NAME: LastTwo, "per_token": PerToken, "per_token_normed": PerTokenNormed}
for name, family in FAMILIES.items():
  connections.register(name, family)


def loss_and_gradients(cfg, values):
  model = models.build(cfg)
  models.set_parameters(model, values)
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  data = models.batch(cfg)
  weight = np.random.default_rng(1).standard_normal(cfg.vocab_size)

  @jax.jit
  def run(params):
    def loss(params):
      logits = models.logits(nnx.merge(graph, params, rest, copy=True), data)
      return (logits * weight).mean(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)

  (_, logits), gradients = run(params)
  by_path = {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(gradients)}
  return np.asarray(logits), by_path


def train_one_by_one(name):
  cfg = models.config(**KEYS | {"depth_connection": name})
  values = models.randomise(models.build(cfg))
  return cfg, values, *loss_and_gradients(cfg, values)


@pytest.fixture(scope="module")
def single():
  return train_one_by_one(NAME)


def close(found, expected, what="", tolerance=TOLERANCE):
  np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0, err_msg=what)


def test_single_layers_compute_the_sums(single):
  """MaxText's own layers, one by one, each on a·[X_{i-1}, X_i]."""
  cfg, values, logits, _ = single
  stock = models.build(models.config(base_num_decoder_layers=4))
  models.set_parameters(stock, {path: x for path, x in values.items() if "connection" not in path})
  data = models.batch(cfg)
  x = stock.token_embedder(data["inputs"], model_mode="train")
  outputs, decoder = [x], stock.decoder
  for i in range(4):
    x, _ = getattr(decoder, f"layers_{i}")(x, data["inputs_segmentation"], data["inputs_position"], True, "train")
    name = "depth_aggregate" if i < 3 else "final_depth_aggregate"
    a = values[f"decoder/layers_{min(i + 1, 3)}/connection/{name}/a"][0]
    outputs.append(x)
    x = a[0] * outputs[-2] + a[1] * outputs[-1]
  found = decoder.apply_output_head(stock.token_embedder, x, True, "train")
  close(logits, np.asarray(found))


# Weights that are computed from X_i magnify its rounding: the errors seen are below 7e-6.
@pytest.mark.parametrize(("name", "tolerance"), [(NAME, TOLERANCE), ("per_token", 2e-5), ("per_token_normed", 2e-5)])
def test_scanned_layers_are_the_same(name, tolerance, request):
  _, values, logits, gradients = request.getfixturevalue("single") if name == NAME else train_one_by_one(name)
  scanned = models.config(**KEYS | {"depth_connection": name}, scan_layers=True)
  stacked = layout.stack(values, scanned)
  back = layout.unstack(stacked, scanned)
  assert back.keys() == values.keys()
  assert all(np.array_equal(back[path], x) for path, x in values.items())
  found_logits, found = loss_and_gradients(scanned, stacked)
  close(found_logits, logits, tolerance=tolerance)
  found = layout.unstack(found, scanned)
  for path, x in gradients.items():
    assert np.abs(x).max() > 0, path
    close(found[path], x, path, tolerance)


def test_new_scanned_layers_start_as_single_ones():
  """Also where the initial values depend on the number of sources, which padding changes."""
  keys = KEYS | {"depth_connection": "per_token"}
  scanned = models.config(**keys, scan_layers=True)
  expected, found = models.parameters(models.build(models.config(**keys))), models.parameters(models.build(scanned))
  found = layout.unstack(found, scanned)
  of_connections = [path for path in expected if "depth_aggregate" in path]
  assert len(of_connections) == 4
  for path in of_connections:
    np.testing.assert_array_equal(found[path], expected[path], path)


@pytest.mark.parametrize("scan", [False, True])
def test_a_new_model_is_the_plain_transformer(scan):
  cfg = models.config(**KEYS, scan_layers=scan)
  stock = models.config(base_num_decoder_layers=4, scan_layers=scan)
  logits = (models.jitted_logits(models.build(x), models.batch(cfg)) for x in (cfg, stock))
  np.testing.assert_allclose(*logits, atol=2e-6)


def test_its_cost_is_counted(single):
  cfg, values, *_ = single
  assert counts.parameters(cfg) == sum(x.size for x in values.values())


def test_a_scanned_model_trains():
  cfg = models.config(**KEYS, scan_layers=True, learning_rate=0.01, warmup_steps_fraction=0.0)
  step, state = steps.prepare(cfg)
  losses = []
  for _ in range(4):
    state, metrics = step(state, models.batch(cfg))
    losses.append(float(metrics["scalar"]["learning/loss"]))
  assert losses[-1] < losses[0]


@pytest.mark.slow
def test_eight_devices_train_as_one():
  # Not Adam, which makes full steps of gradients that are nothing but rounding.
  keys = KEYS | {"opt_type": "sgd", "learning_rate": 0.01, "warmup_steps_fraction": 0.0, "max_target_length": 32}
  losses = []
  for devices, mesh in (
    (1, {"per_device_batch_size": 8}),
    (8, {"per_device_batch_size": 1, "ici_fsdp_parallelism": 8}),
  ):
    finished = subprocess.run(
      [sys.executable, "-m", "tests.test_family", json.dumps(keys | mesh)],
      cwd=runs.ROOT,
      env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
      capture_output=True,
      text=True,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    losses.append(json.loads(finished.stdout.splitlines()[-1])["losses"])
  np.testing.assert_allclose(*losses, rtol=5e-5)  # rounding grows with the steps, to 1.2e-5 at the fifth
  assert len(set(losses[0])) == len(losses[0])


def test_a_name_is_registered_once():
  connections.register(NAME, LastTwo)
  with pytest.raises(ValueError, match="depth_connection=dense is a family already"):
    connections.register("dense", LastTwo)


class Redeclared(HistoryKeys):
  mudd_window: int = key(2, "A key of another family.")


class OtherOrder(HistoryKeys, WeightKeys):
  pass


@pytest.mark.parametrize(
  ("keys", "sentence"),
  [
    (Redeclared, "other declares mudd_window, a key of DenseKeys; inherit that group, or rename the key."),
    (OtherOrder, "OtherOrder of other inherits the groups of DenseKeys in another order; keep it."),
  ],
)
def test_keys_that_do_not_go_with_those_of_other_families(keys, sentence, monkeypatch):
  monkeypatch.delitem(sys.modules, "maxtext_mudd.config.keys")  # as in a script that registers its family first
  with pytest.raises(ValueError) as error:
    connections.register("other", type("Other", (LastTwo,), {"Keys": keys}))
  assert str(error.value) == sentence
  assert "other" not in connections.FAMILIES


def test_keys_that_come_too_late():
  with pytest.raises(RuntimeError, match="register other before"):
    connections.register("other", type("Other", (LastTwo,), {"Keys": Redeclared}))


@pytest.mark.parametrize(
  ("sites", "what"),
  [
    ({1: Site(2, (0, 1), "x")}, "the site after block 1"),
    ({2: Site(2, (0, 1), "x")}, "with 2 as the last"),
    ({2: Site(2, (1, 0, 2), "x")}, "in order"),
    ({3: Site(3, (0, 3), "qv")}, "the site after the last block makes the streams 'qv'; it must make one."),
  ],
)
def test_sites_that_no_history_can_serve(sites, what):
  with pytest.raises(ValueError, match=re.escape(what)):
    check_plan(Plan(3, sites))


def test_no_trained_value_is_lost_in_a_conversion():
  """The shapes of scanned layers are the same whichever sources their blocks see."""
  keys = {"mudd": True, "base_num_decoder_layers": 4}
  single = models.build(models.config(**keys))
  ones = {path: np.ones(x.shape) for path, x in models.parameters(single).items()}
  values = layout.stack(ones, models.config(**keys, scan_layers=True))
  other = models.config(**keys, scan_layers=True, mudd_depth_start=0.5)
  with pytest.raises(ValueError, match="has values for block 2 that this model does not have"):
    layout.unstack(values, other)


if __name__ == "__main__":
  plugin.install()
  train_on_mesh.main(json.loads(sys.argv[1]))


def test_a_family_that_leaves_sharding_to_the_compiler_refuses_explicit_axes(monkeypatch):
  monkeypatch.setattr(LastTwo, "takes_explicit_axes", False)
  with pytest.raises(ConfigError, match="shard_mode=explicit does not work with depth_connection=last_two: its sums"):
    models.config(**KEYS, shard_mode="explicit")
