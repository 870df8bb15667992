"""Compiles the train step of a model ahead of time, by MaxText's `maxtext.trainers.pre_train.train_compile`.

    python3 -m maxtext_mudd.train_compile FILE.yml compile_topology=v5p-8 compile_topology_num_slices=1 key=value ...

It needs their compiler, libtpu, but no TPUs.
"""

from maxtext_mudd.config import versions
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs.launch import launch


def check_compiling(config) -> None:
  """Raises ConfigError if no topology is named, no compiler is installed, or the mesh cannot divide the batch."""
  from maxtext.utils import accelerator_to_spec_map  # imported here, after `launch` has checked MaxText's version

  from maxtext_mudd.config import devices

  name = config.compile_topology
  if not name:
    raise ConfigError(
      "compile_topology='' names nothing to compile for; add, for example, compile_topology=v5p-8 "
      "compile_topology_num_slices=1."
    )
  topologies = accelerator_to_spec_map.UserFacingNameToSystemCharacteristics
  if (config.internal_compile or topologies[name].platform == "tpu") and (missing := versions.missing_libtpu()):
    raise ConfigError(missing)
  devices.check_batch(config)


def run() -> None:
  """Compiles the train step ahead of time for the topology that the configuration names."""
  launch("maxtext.trainers.pre_train.train_compile", check=check_compiling)


if __name__ == "__main__":
  run()
