"""Configuration mistakes in one sentence each."""

from collections.abc import Iterator, Sequence
import contextlib
import difflib
import pathlib
import re

import omegaconf
import pydantic

import yaml


class ConfigError(ValueError):
  """A configuration that cannot work; one sentence that names the key or file, the value, and what would work."""


def check_config_file(argv: Sequence[str] | None, overrides: dict) -> None:
  """MaxText takes a first argument without `.yml` for an override and trains its default model; refuse that."""
  if overrides.get("base_config"):
    return
  name = argv[1] if argv and len(argv) > 1 else ""
  if not name or "=" in name:
    return
  if not name.endswith(".yml"):
    raise ConfigError(f"{name}: a configuration file must end in .yml; rename it or put the file first.")
  if not pathlib.Path(name).is_file():
    raise ConfigError(f"{name}: no such configuration file; see yaml/ for those that come with this project.")


@contextlib.contextmanager
def one_sentence(config_class: type[pydantic.BaseModel]) -> Iterator[None]:
  """Turns what MaxText's configuration raises into `ConfigError`s of one sentence."""
  try:
    yield
  except pydantic.ValidationError as error:
    raise ConfigError(_first_sentence(error)) from None
  except omegaconf.errors.OmegaConfBaseException as error:
    raise ConfigError(f"The configuration cannot be read: {_one_line(error)}.") from None
  except yaml.YAMLError as error:
    raise ConfigError(f"A configuration file is not valid YAML: {_one_line(error)}.") from None
  except FileNotFoundError as error:
    raise ConfigError(f"{error.filename}: no such configuration file.") from None
  except ValueError as error:
    unknown = re.match(r"'([^']*)' not in '", str(error))
    if not unknown:
      raise
    raise ConfigError(_unknown_key(unknown.group(1), config_class)) from None


def _unknown_key(key: str, config_class: type[pydantic.BaseModel]) -> str:
  nearest = difflib.get_close_matches(key, config_class.model_fields, n=1, cutoff=0.0)
  return f"{key} is not a configuration key; the nearest is {nearest[0]}."


def _first_sentence(error: pydantic.ValidationError) -> str:
  first = error.errors()[0]
  message = first["msg"].removeprefix("Value error, ")
  key = ".".join(map(str, first["loc"]))
  if not key:
    return message
  return f"{key}={first['input']!r} is not valid: {message[0].lower()}{message[1:]}."


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())
