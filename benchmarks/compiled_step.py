"""MaxText's train step, compiled ahead of time for a TPU topology: no TPU is needed, only libtpu."""

import time

from tpu_schedule import NotUnderstood

ALWAYS = {
  "enable_checkpointing": False,
  "log_config": False,
  "run_name": "compiled_step",
  "skip_jax_distributed_system": True,
  "compile_topology_num_slices": 1,
}
INIT_ARGS = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"  # as train_compile sets it


class DoesNotFit(Exception):
  """The compiler's refusal of a step that is larger than the chip's memory, in one sentence."""


def compile_step(yaml: str, topology: str, keys: dict):
  """(the configuration, the compiled step, seconds), as train_compile makes it, which keeps neither.

  Raises:
    DoesNotFit.
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
    raise NotUnderstood(f"the topology {topology!r} does not exist; use a TPU's of MaxText, such as v5p-8 or v6e-8.")
  jax.config.update("jax_default_prng_impl", "unsafe_rbg")
  config = pyconfig.initialize(["", yaml], compile_topology=topology, **ALWAYS, **keys)
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
