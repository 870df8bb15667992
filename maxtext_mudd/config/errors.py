"""`ConfigError`, and functions that turn errors of MaxText, YAML and the file system into one sentence."""

from collections.abc import Iterable, Iterator
import contextlib
import difflib
import errno
import re
import traceback

import omegaconf
import pydantic
import yaml

# What Orbax and TensorStore append to their errors.
_NOISE = re.compile(r"See full TensorStore details|<bound method|\[source locations=|\[tensorstore_spec=")


class ConfigError(ValueError):
  """The configuration cannot work. The message is one sentence: the key or file, its value, and what would work."""


@contextlib.contextmanager
def one_sentence(config_class: type[pydantic.BaseModel]) -> Iterator[None]:
  """A context that turns exceptions of MaxText's configuration into `ConfigError`s of one sentence."""
  try:
    yield
  except pydantic.ValidationError as error:
    raise ConfigError(_first_sentence(error)) from None
  except omegaconf.errors.OmegaConfBaseException as error:
    raise ConfigError(f"The configuration cannot be read: {_one_line(error)}.") from None
  except yaml.YAMLError as error:
    raise ConfigError(f"An argument or a configuration file is not valid YAML: {_one_line(error)}.") from None
  except FileNotFoundError as error:
    raise ConfigError(f"{error.filename}: no such configuration file.") from None
  except ConfigError:
    raise
  except (ValueError, AssertionError) as error:
    if str(error).startswith("coordinator_address should be defined"):
      advice = "on one host set skip_jax_distributed_system=true, and on a CPU hardware=cpu, too."
      raise ConfigError(f"JAX finds no cluster to join; {advice}") from error
    unknown = re.match(r"'([^']*)' not in '", str(error))
    sentence = unknown_key(unknown.group(1), config_class.model_fields) if unknown else _one_line(error)
    raise ConfigError(sentence) from error
  except (TypeError, KeyError, AttributeError, ImportError, OverflowError, RecursionError) as error:
    if failed_in(error, "initialize_jax_for_cpu"):
      sentence = "hardware=cpu: MaxText finds no other hosts to join; on one, set skip_jax_distributed_system=true."
      raise ConfigError(sentence) from error
    raise ConfigError(f"The configuration cannot be read ({type(error).__name__}: {_one_line(error)}).") from error


@contextlib.contextmanager
def reachable() -> Iterator[None]:
  """A context that turns OSErrors for a path that cannot be looked up, such as one in another user's folder, into
  `ConfigError`s."""
  try:
    yield
  except OSError as error:
    if error.filename is None or error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP):
      raise
    reason = error.strerror[0].lower() + error.strerror[1:]
    raise ConfigError(f"{error.filename} cannot be reached: {reason}; name one that can.") from error


def failed_in(error: BaseException, function: str) -> bool:
  """Whether the error passed through this function of MaxText. MaxText has no exception types to tell its errors by."""
  return any(frame.f_code.co_name == function for frame, _ in traceback.walk_tb(error.__traceback__))


def brief(error: Exception) -> str:
  """Type and message of an error in one short line, for the end of a sentence."""
  message = _NOISE.split(_one_line(error), maxsplit=1)[0].rstrip(" .:([")
  return f"{type(error).__name__}: {message[:200]}" if message else type(error).__name__


def unknown_key(key: str, known: Iterable[str]) -> str:
  """The sentence for a key that does not exist."""
  return f"{key} is not a configuration key; the nearest is {nearest(key.lower(), known)}."


def nearest(name: str, known: Iterable[str]) -> str:
  """The known name that is most similar to `name`."""
  return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _first_sentence(error: pydantic.ValidationError) -> str:
  first = error.errors()[0]
  message = first["msg"].removeprefix("Value error, ")
  key = ".".join(map(str, first["loc"]))
  if not key:
    return message
  return f"{key}={first['input']!r} is not valid: {message[0].lower()}{message[1:]}."


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())
