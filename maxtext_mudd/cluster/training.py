"""Checks on this machine the training run that a request would start: its keys, its mesh, and where its data are."""

import contextlib
import io
import logging
import os

from maxtext_mudd import plugin
from maxtext_mudd.cluster.request import CONFIG_FOLDER, ROOT, Request
from maxtext_mudd.config import files as config_files
from maxtext_mudd.config import slices
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import data_settings

WORKDIR = "/app"  # the working folder of the container
_SUBSTITUTE_TPU_TYPE = "v5p-8"  # for reading a configuration if MaxText does not know the TPU type


def check(request: Request) -> list[str]:
  """Reads the configuration as the container will read it, for the slices of the request.

  Returns:
    "key=path" for each path that the run reads and the image does not have, and that must therefore be mounted.

  Raises:
    ConfigError: the run cannot work on the cluster.
  """
  files = [request.config, *(word for word in request.overrides if "=" not in word)]
  for name in files:
    _check_base_files(name)
  with contextlib.redirect_stdout(io.StringIO()):  # MaxText prints which optional modules are missing
    config, has_mesh = _read(request, files)
  _check_hardware(config, request)
  if has_mesh:
    from maxtext_mudd.config import devices

    devices.check_mesh(config)
    devices.check_batch(config)
  return [path for key, value in data_settings.file_keys(config) for path in _paths_to_mount(key, value, config)]


def _check_base_files(name: str) -> None:
  """Raises ConfigError if a configuration file builds on a file that the image does not have."""
  for file in config_files.chain(str(ROOT / name)):
    if not file.is_relative_to(ROOT / CONFIG_FOLDER):
      raise ConfigError(
        f"{name} builds on {file}, which is not in {CONFIG_FOLDER}/ and so not in the image; put it there."
      )


def _read(request: Request, files: list[str]):
  """Reads the configuration, for a substitute if MaxText does not know the TPU type.

  Returns:
    The configuration, and whether it is for the TPU type of the request, so that its mesh can be checked.
  """
  plugin.install()
  from maxtext.configs import pyconfig
  from maxtext.utils.accelerator_to_spec_map import UserFacingNameToSystemCharacteristics

  tpu_type = slices.of_maxtext(request.tpu_type)
  is_known = tpu_type in UserFacingNameToSystemCharacteristics
  argv = [
    "",
    *(str(ROOT / name) for name in files),
    f"run_name={request.workload}",
    f"base_output_directory={request.output}",
    f"compile_topology={tpu_type if is_known else _SUBSTITUTE_TPU_TYPE}",
    f"compile_topology_num_slices={request.num_slices}",
    *(word for word in request.overrides if "=" in word),
  ]
  logging.disable(logging.ERROR)  # MaxText also logs the error that it raises
  try:
    return pyconfig.initialize_pydantic(argv), is_known
  finally:
    logging.disable(logging.NOTSET)


def _check_hardware(config, request: Request) -> None:
  if config.hardware != "tpu":
    raise ConfigError(f"hardware={config.hardware} does not train on {request.tpu_type}; add hardware=tpu to ARGS.")
  if config.skip_jax_distributed_system:
    raise ConfigError(
      "skip_jax_distributed_system=True would let every host train by itself; add skip_jax_distributed_system=false "
      "to ARGS."
    )


def _paths_to_mount(key: str, value: str, config) -> list[str]:
  """The local paths that a key names, as "key=path". Raises ConfigError if it names none that can be read."""
  if key.startswith("hf") and not value:
    raise ConfigError(f"{key}='' names no data; set it to files, or to a pattern that matches files.")
  patterns = [pattern for pattern, _ in data_settings.patterns(key, value)]
  remote = [pattern for pattern in patterns if data_settings.is_remote(pattern)]
  if remote and key.startswith("grain") and config.grain_file_type == "mmap":
    raise ConfigError(
      f"{key}={remote[0]}: Megatron files are read from a file system; mount the bucket, as docs/cluster.md says, and "
      "name the path in the container."
    )
  return [f"{key}={os.path.join(WORKDIR, pattern)}" for pattern in patterns if pattern and pattern not in remote]
