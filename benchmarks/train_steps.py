"""MaxText's train step of one configuration: compiled ahead of time, then run on a state of its own."""

import time

from flax import nnx
from flax.core.spmd import logical_axis_rules
import jax
from maxtext.common import train_state_nnx
from maxtext.input_pipeline.input_pipeline_interface import create_data_iterator
from maxtext.trainers.pre_train import train
from maxtext.utils import max_utils, maxtext_utils, model_creation_utils, sharding, train_utils

from maxtext_mudd.config import devices
from maxtext_mudd.config.errors import ConfigError


def set_up(config) -> None:
  """What MaxText's trainer sets for a whole process."""
  train_utils.validate_train_config(config)
  jax.config.update("jax_default_prng_impl", "unsafe_rbg")
  jax.config.update("jax_use_shardy_partitioner", config.shardy)
  jax.config.update("jax_remove_size_one_mesh_axis_from_type", config.remove_size_one_mesh_axis_from_type)


def make_batch(config):
  """The batch that MaxText's synthetic data repeats, on the devices."""
  iterator, _ = create_data_iterator(config, maxtext_utils.get_mesh_from_config(config))
  return jax.block_until_ready(next(iterator))


class TrainStep:
  """One model of a comparison.

  Attributes:
    name, config: of the model.
    compile_seconds: tracing and compiling its step, nothing cached.
    argument_bytes: of a device: state and batch; what the model holds between steps.
    temporary_bytes: of a device: what a step holds beside them at most, by the compiler's account, with those outputs
      that do not take the place of arguments.
  """

  def __init__(self, name: str, config):
    """Compiles; makes no arrays.

    Raises:
      ConfigError: the compiler says that it does not fit.
    """
    self.name, self.config, self.state = name, config, None
    self._mesh = maxtext_utils.get_mesh_from_config(config)
    create_model, model = model_creation_utils.create_nnx_abstract_model(config, self._mesh)
    _, optimizer = train_utils.create_training_optimizer(config, model, mesh=self._mesh)

    def make_state():
      model = create_model()
      return train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, optimizer, wrt=nnx.Param))

    self._make_state = make_state
    start = time.monotonic()
    self._compiled = _fitting(self, self._compile)
    self.compile_seconds = time.monotonic() - start
    memory = self._compiled.memory_analysis()
    self.argument_bytes = memory.argument_size_in_bytes
    self.temporary_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

  def _compile(self):
    """As MaxText's train loop does."""
    config, mesh = self.config, self._mesh
    state, _, shardings = maxtext_utils.get_abstract_state(config, mesh, self._make_state, True)
    with logical_axis_rules(config.logical_axis_rules):
      graph = nnx.graphdef(nnx.eval_shape(self._make_state))
    of_params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    data_sharding = sharding.get_input_data_sharding(config, mesh)
    step = train_utils.jit_train_step(
      config, graph, state, shardings, data_sharding, train.train_step, of_params, mesh=mesh
    )
    batch = maxtext_utils.get_shaped_batch(config, batch_sharding=data_sharding)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
      lowered = step.lower(state, batch)
    self._shardings = shardings
    return lowered.compile(compiler_options=max_utils.parse_libtpu_flags_to_dict(config.compile_xla_flags))

  def load(self) -> None:
    """Makes the state of step 0, on the devices.

    Raises:
      ConfigError: it does not fit.
    """

    def make():
      state, *_ = maxtext_utils.setup_training_state(None, self.config, self._mesh, None, self._make_state)
      return jax.block_until_ready(jax.device_put(state, self._shardings))

    self.state = _fitting(self, make)

  def run(self, batch, steps: int) -> float:
    """Seconds per step of some steps in a row; the state goes on.

    Raises:
      ConfigError: the device runs out of memory.
    """

    def advance():
      metrics = None
      for _ in range(steps):
        self.state, metrics = self._compiled(self.state, batch)
      return jax.block_until_ready((self.state, metrics))

    start = time.monotonic()
    _, self.metrics = _fitting(self, advance)
    return (time.monotonic() - start) / steps

  def loss(self) -> float:
    """Of the last step that has run."""
    return float(self.metrics["scalar"]["learning/loss"])

  def free(self) -> None:
    """Gives its memory back; it cannot run again."""
    for array in jax.tree.leaves(self.state):
      if not array.is_deleted():
        array.delete()
    self.state = self._compiled = None


def _fitting(step: TrainStep, function):
  """`function()`, a device out of memory said in one sentence."""
  try:
    return function()
  except jax.errors.JaxRuntimeError as error:
    sentence = devices.out_of_memory(error, step.config)
    if sentence is None:
      raise
    raise ConfigError(f"{step.name}: {sentence}") from None


def check_fit(step: TrainStep, held_bytes: int, limit: int | None) -> None:
  """Raises ConfigError where a step, beside `held_bytes` of another model, needs more than the device has, if known."""
  needed = step.argument_bytes + step.temporary_bytes + held_bytes
  if limit is not None and needed > limit:
    beside = f", and {held_bytes / 1e9:.1f} GB of the baseline beside it" if held_bytes else ""
    raise ConfigError(
      f"per_device_batch_size={step.config.per_device_batch_size:g} does not fit ({step.name}): "
      f"{step.argument_bytes / 1e9:.1f} GB of arguments and {step.temporary_bytes / 1e9:.1f} GB of temporaries{beside} "
      f"exceed the device's {limit / 1e9:.1f} GB by {(needed - limit) / 1e9:.1f} GB; lower it, or max_target_length."
    )
