"""Stock `maxtext.trainers.pre_train.train_compile` with MUDD connections."""

from maxtext_mudd import versions
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs.launch import launch


def check_compiling(config) -> None:
  """Raises ConfigError where nothing is named to compile for, or no compiler is installed, and for batches that the
  mesh cannot divide."""
  from maxtext.utils import accelerator_to_spec_map  # once MaxText is known to be the right one

  from maxtext_mudd.config import devices

  name = config.compile_topology
  if not name:
    raise ConfigError(
      "compile_topology='' names nothing to compile for; add compile_topology=v5p-8 compile_topology_num_slices=1, say."
    )
  known = accelerator_to_spec_map.UserFacingNameToSystemCharacteristics
  if (config.internal_compile or known[name].platform == "tpu") and (missing := versions.missing_libtpu()):
    raise ConfigError(missing)
  devices.check_batch(config)


def run() -> None:
  """Compiles the train step ahead of time for the topology that the configuration names."""
  launch("maxtext.trainers.pre_train.train_compile", check=check_compiling)


if __name__ == "__main__":
  run()
