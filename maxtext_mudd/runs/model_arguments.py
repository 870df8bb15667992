"""Arguments that commands of trained models share: a checkpoint, keys, a text and numbers. Imports no JAX.

Errors name the argument as the command line has it.
"""

import pathlib
from typing import Any

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import early_check, launch


def check_model(
  checkpoint: str, config_file: str, arguments: list[str], overrides: dict[str, Any], flag: str = "--checkpoint"
) -> None:
  """Checks a checkpoint and the keys for it, before JAX or MaxText is imported.

  Args:
    config_file, overrides: what `split` returns for `arguments`.
    flag: the argument that names the checkpoint, for errors.

  Raises:
    ConfigError: there is no such checkpoint or key, or a configuration file is missing or one too many.
    versions.UnknownMaxText: MaxText is missing, or its version is not a known one.
  """
  _check_checkpoint(checkpoint, config_file, flag)
  if config_file:
    early_check.check(["", config_file, *(argument for argument in arguments if "=" in argument)])
  else:
    early_check.check_keys(overrides)


def split(arguments: list[str]) -> tuple[str, dict[str, Any]]:
  """Separates the configuration file, which is empty if there is none, from the keys. Raises ConfigError."""
  files = [argument for argument in arguments if "=" not in argument]
  other = [argument for argument in files if not argument.endswith(".yml")]
  if other:
    raise ConfigError(f"{other[0]} is not key=value, nor a configuration file, which ends in .yml.")
  if len(files) > 1:
    raise ConfigError(f"{files[1]} is a second configuration file; one, {files[0]}, describes the checkpoint.")
  overrides = launch.read_overrides([argument for argument in arguments if "=" in argument])
  return (files or [""])[0], overrides


def number(flag: str, text: str, number_type: type, least: int):
  """Reads a number of at least `least`. Raises ConfigError, which names the flag."""
  try:
    value = number_type(text)
  except ValueError:
    value = -1
  if not least <= value < float("inf"):
    raise ConfigError(f"{flag}={text} is not a {'whole ' if number_type is int else ''}number of {least} or more.")
  return int(value) if value == int(value) else value


def read_text(name: str) -> str:
  try:
    text = pathlib.Path(name).read_bytes().decode()
  except OSError as error:
    raise ConfigError(f"--text={name} cannot be read ({error.strerror}); name a text file.") from error
  except UnicodeDecodeError as error:
    raise ConfigError(f"--text={name} is not UTF-8 at byte {error.start}; convert it.") from error
  if not text:
    raise ConfigError(f"--text={name} is empty; name a file with a text.")
  return text


def _check_checkpoint(checkpoint: str, config_file: str, flag: str) -> None:
  """Raises ConfigError for a checkpoint that does not exist, that lacks a configuration file, or that needs none."""
  if not checkpoint:
    raise ConfigError(f"{flag} is empty; name a folder that holds a model.")
  path = pathlib.Path(checkpoint).expanduser()
  if "://" in checkpoint:
    if not config_file:
      raise ConfigError(f"{checkpoint} is not a local folder; copy it first.")
  elif not path.is_dir():
    raise ConfigError(f"{flag}={checkpoint} is not a folder; name one that holds a model.")
  elif config_file and (path / "model.yml").exists():
    raise ConfigError(
      f"{config_file}: {flag}={checkpoint} has a model.yml, which describes its model; leave {config_file} out."
    )
  elif not config_file and (path / "_CHECKPOINT_METADATA").exists() and not (path / "model.yml").exists():
    raise ConfigError(
      f"{flag}={checkpoint} is a checkpoint of a run; also name the CONFIG.yml that the run was started with."
    )
