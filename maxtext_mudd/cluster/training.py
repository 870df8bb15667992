"""The training run of a request, looked at on this machine: its keys, its mesh, and where its data is."""

import contextlib
import io
import logging
import os

from maxtext_mudd import plugin
from maxtext_mudd.cluster.request import IN_IMAGE, ROOT, Request
from maxtext_mudd.config import files as config_files
from maxtext_mudd.config import slices
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import data_settings

WORKDIR = "/app"  # of the image
_LIKE = "v5p-8"  # stands for the TPU types that MaxText does not know by XPK's name


def check(request: Request) -> list[str]:
  """Reads the configuration as the container will, for the slices that it will find there.

  Returns:
    The paths that the run reads and the image does not hold: they must be mounted.

  Raises:
    ConfigError: the run cannot work there.
  """
  files = [request.config, *(word for word in request.overrides if "=" not in word)]
  for name in files:
    _check_chain(name)
  with contextlib.redirect_stdout(io.StringIO()):  # what MaxText says of modules that it does without
    config, known = _read(request, files)
  _check_hardware(config, request)
  if known:
    from maxtext_mudd.config import devices

    devices.check_mesh(config)
    devices.check_batch(config)
  return [path for key, value in data_settings.file_keys(config) for path in _local(key, value, config)]


def _check_chain(name: str) -> None:
  for file in config_files.chain(str(ROOT / name)):
    if not file.is_relative_to(ROOT / IN_IMAGE):
      raise ConfigError(f"{name} builds on {file}, which is not in {IN_IMAGE}/ and so not in the image; put it there.")


def _read(request: Request, files: list[str]):
  """The configuration, and whether MaxText knows the TPU type; if not, a configuration for another."""
  plugin.install()
  from maxtext.configs import pyconfig
  from maxtext.utils.accelerator_to_spec_map import UserFacingNameToSystemCharacteristics

  tpu_type = slices.of_maxtext(request.tpu_type)
  known = tpu_type in UserFacingNameToSystemCharacteristics
  argv = [
    "",
    *(str(ROOT / name) for name in files),
    f"run_name={request.workload}",
    f"base_output_directory={request.output}",
    f"compile_topology={tpu_type if known else _LIKE}",
    f"compile_topology_num_slices={request.num_slices}",
    *(word for word in request.overrides if "=" in word),
  ]
  logging.disable(logging.ERROR)  # MaxText logs the error that is raised, too
  try:
    return pyconfig.initialize_pydantic(argv), known
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


def _local(key: str, value: str, config) -> list[str]:
  if key.startswith("hf") and not value:
    raise ConfigError(f"{key}='' names no data; set it to files, or to a pattern that matches files.")
  patterns = [pattern for pattern, _ in data_settings.patterns(key, value)]
  remote = [pattern for pattern in patterns if data_settings.REMOTE in pattern]
  if remote and key.startswith("grain") and config.grain_file_type == "mmap":
    raise ConfigError(
      f"{key}={remote[0]}: Megatron maps are read from a file system; mount the bucket, as docs/cluster.md says, and "
      "name the path in the container."
    )
  return [f"{key}={os.path.join(WORKDIR, pattern)}" for pattern in patterns if pattern and pattern not in remote]
