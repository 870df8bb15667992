"""Compiles MaxText's train step ahead of time for a TPU topology. No TPU is needed, only libtpu."""

import time

from record import MeasurementError

FIXED_KEYS = {
  "enable_checkpointing": False,
  "log_config": False,
  "run_name": "compiled_step",
  "skip_jax_distributed_system": True,
  "compile_topology_num_slices": 1,
}
INIT_ARGS = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"  # MaxText's train_compile sets this flag


class DoesNotFit(Exception):
  """The step needs more memory than the chip has; one sentence."""


def compile_step(yaml: str, topology: str, keys: dict):
  """Compiles the train step as MaxText's train_compile does, which does not return what it compiled.

  Args:
    yaml: configuration file.
    topology: TPU topology by MaxText's name, such as v5p-8.
    keys: keys on top of the file.

  Returns:
    (configuration, compiled step, seconds that compiling took).

  Raises:
    DoesNotFit: the step needs more memory than the chip has.
    MeasurementError: there is no such topology.
  """
  import jax

  from maxtext_mudd import plugin

  plugin.install()
  from flax.core.spmd import logical_axis_rules
  from maxtext.configs import pyconfig
  from maxtext.trainers.pre_train import train, train_compile
  from maxtext.utils import accelerator_to_spec_map, maxtext_utils, sharding

  chips = accelerator_to_spec_map.UserFacingNameToSystemCharacteristics.get(topology)
  if chips is None or chips.platform != "tpu":
    raise MeasurementError(
      f"the topology {topology!r} does not exist; use one of MaxText's for TPUs, such as v5p-8 or v6e-8."
    )
  jax.config.update("jax_default_prng_impl", "unsafe_rbg")
  config = pyconfig.initialize(["", yaml], compile_topology=topology, **FIXED_KEYS, **keys)
  mesh = train_compile.get_topology_mesh(config)
  args, kwargs, state, _, model = train_compile.get_shaped_inputs(mesh, config)
  params, state = sharding.maybe_update_params_sharding_with_opt(config, state)
  signature = maxtext_utils.get_functional_train_with_signature(
    train.train_step,
    sharding.get_input_data_sharding(config, mesh),
    sharding.build_zero1_input_state_mesh_shardings(config, state, params),
    model,
    config,
    params,
  )
  step, *shardings_and_argnums = signature
  rules = logical_axis_rules(config.logical_axis_rules)
  start = time.monotonic()
  try:
    compiled = train_compile.jit_and_compile(step, args, kwargs, mesh, *shardings_and_argnums, config, rules)
  except jax.errors.JaxRuntimeError as error:
    from maxtext_mudd.config import devices

    if sentence := devices.out_of_memory(error, config):
      raise DoesNotFit(sentence) from None
    raise
  return config, compiled, time.monotonic() - start
