"""Compiles MaxText's train step of a configuration ahead of time, and runs it."""

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
  """Sets what MaxText's trainer sets for a whole process."""
  train_utils.validate_train_config(config)
  jax.config.update("jax_default_prng_impl", "unsafe_rbg")
  jax.config.update("jax_use_shardy_partitioner", config.shardy)
  jax.config.update("jax_remove_size_one_mesh_axis_from_type", config.remove_size_one_mesh_axis_from_type)


def make_batch(config):
  """The batch that MaxText's synthetic data set repeats, on the devices."""
  iterator, _ = create_data_iterator(config, maxtext_utils.get_mesh_from_config(config))
  return jax.block_until_ready(next(iterator))


class TrainStep:
  """One model of a comparison.

  Attributes:
    name: name of the model.
    config: configuration of the model.
    state: train state, after `load`.
    compile_seconds: time to trace and compile the step, without a cache.
    argument_bytes: bytes of state and batch on one device, which are held between steps.
    temporary_bytes: the most bytes that a step holds on one device beside its arguments, as the compiler states them,
      with the outputs that do not replace arguments.
  """

  def __init__(self, name: str, config):
    """Compiles the step; creates no arrays.

    Raises:
      ConfigError: the compiler reports that the step does not fit the device.
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
    self._compiled = _checked(self, self._compile)
    self.compile_seconds = time.monotonic() - start
    memory = self._compiled.memory_analysis()
    self.argument_bytes = memory.argument_size_in_bytes
    self.temporary_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

  def _compile(self):
    """Compiles as MaxText's train loop does."""
    config, mesh = self.config, self._mesh
    state, _, shardings = maxtext_utils.get_abstract_state(config, mesh, self._make_state, True)
    with logical_axis_rules(config.logical_axis_rules):
      graph = nnx.graphdef(nnx.eval_shape(self._make_state))
    param_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    data_sharding = sharding.get_input_data_sharding(config, mesh)
    step = train_utils.jit_train_step(
      config, graph, state, shardings, data_sharding, train.train_step, param_shardings, mesh=mesh
    )
    batch = maxtext_utils.get_shaped_batch(config, batch_sharding=data_sharding)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
      lowered = step.lower(state, batch)
    self._shardings = shardings
    return lowered.compile(compiler_options=max_utils.parse_libtpu_flags_to_dict(config.compile_xla_flags))

  def load(self) -> None:
    """Creates the state of step 0 on the devices.

    Raises:
      ConfigError: it does not fit.
    """

    def create():
      state, *_ = maxtext_utils.setup_training_state(None, self.config, self._mesh, None, self._make_state)
      return jax.block_until_ready(jax.device_put(state, self._shardings))

    self.state = _checked(self, create)

  def run(self, batch, steps: int) -> float:
    """Runs some steps, which advance the state; returns the seconds of one step.

    Raises:
      ConfigError: the device runs out of memory.
    """

    def advance():
      metrics = None
      for _ in range(steps):
        self.state, metrics = self._compiled(self.state, batch)
      return jax.block_until_ready((self.state, metrics))

    start = time.monotonic()
    _, self.metrics = _checked(self, advance)
    return (time.monotonic() - start) / steps

  def loss(self) -> float:
    """The loss of the last step."""
    return float(self.metrics["scalar"]["learning/loss"])

  def free(self) -> None:
    """Frees the memory of the step. It cannot run after this call."""
    for array in jax.tree.leaves(self.state):
      if not array.is_deleted():
        array.delete()
    self.state = self._compiled = None


def _checked(step: TrainStep, function):
  """Calls a function; turns a device's lack of memory into a ConfigError."""
  try:
    return function()
  except jax.errors.JaxRuntimeError as error:
    sentence = devices.out_of_memory(error, step.config)
    if sentence is None:
      raise
    raise ConfigError(f"{step.name}: {sentence}") from None


def check_fit(step: TrainStep, held_bytes: int, limit: int | None) -> None:
  """Checks that a step fits the device.

  Args:
    held_bytes: bytes that another model holds on the device.
    limit: bytes of the device; None if they are not known.

  Raises:
    ConfigError: it does not fit.
  """
  needed = step.argument_bytes + step.temporary_bytes + held_bytes
  if limit is not None and needed > limit:
    beside = f", and {held_bytes / 1e9:.1f} GB of the baseline beside it" if held_bytes else ""
    raise ConfigError(
      f"per_device_batch_size={step.config.per_device_batch_size:g} does not fit ({step.name}): "
      f"{step.argument_bytes / 1e9:.1f} GB of arguments and {step.temporary_bytes / 1e9:.1f} GB of temporaries{beside} "
      f"exceed the device's {limit / 1e9:.1f} GB by {(needed - limit) / 1e9:.1f} GB; lower it, or max_target_length."
    )
