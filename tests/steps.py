"""Train steps of MaxText, in this process."""

from collections.abc import Callable

from flax import nnx
from flax.core.spmd import logical_axis_rules
import jax
from maxtext.common import train_state_nnx
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train
from maxtext.utils import maxtext_utils, sharding
import numpy as np

from maxtext_mudd.config.stock_checks import REMAT_POLICIES
from tests import models

POLICIES = [policy for policy in REMAT_POLICIES if policy != "full"]


def prepare(cfg, **jit_options) -> tuple[Callable, nnx.State]:
  """A jitted train step, (state, batch) -> (state, metrics), and the state of a random model to start from."""
  mesh = maxtext_utils.get_mesh_from_config(cfg)
  model = models.build(cfg) if cfg.opt_type == "muon" else None
  tx = optimizers.get_optimizer(cfg, maxtext_utils.create_learning_rate_schedule(cfg), model)

  def make_state():
    model = models.construct(cfg, mesh)
    return train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))

  with logical_axis_rules(cfg.logical_axis_rules):  # without the mesh, for the sake of Muon's state, as MaxText does
    shardings = maxtext_utils.get_abstract_state_nnx(cfg, mesh, make_state, True)[2]
  with jax.set_mesh(mesh), logical_axis_rules(cfg.logical_axis_rules):
    params_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(cfg, shardings)
    state = make_state()
    models.randomise(state.model)
    graph, state = nnx.split(state)
  state = jax.device_put(state, shardings)  # as it comes back from a step, which is compiled once then

  def step(state, data):
    return train.train_step(graph, cfg, shardings, params_shardings, state, data)

  return jax.jit(step, **jit_options), state


def set_zero(state: nnx.State, *ends: str) -> None:
  """Sets the parameters to zero whose paths end so."""
  for path, variable in nnx.to_flat_state(state["model"].filter(nnx.Param)):
    if "/".join(map(str, path)).endswith(ends):
      variable.set_value(0 * variable.get_value())


def value_and_gradients(cfg, data=None):
  """(loss, aux, gradients by path) of a random model on a batch, random if not given, through MaxText's own loss."""
  model = models.build(cfg)
  models.randomise(model)
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  data = data or models.batch(cfg)

  @jax.jit
  def run(params):
    def loss(params):
      return train.loss_fn(nnx.merge(graph, params, rest, copy=True), cfg, dict(data), None, None)

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, aux), gradients = run(params)
  return float(loss), aux, {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(gradients)}
