"""Checks the configuration of a command line before JAX and MaxText are imported, which takes ten seconds or more.

Refuses a part of what MuddConfig refuses, in the same sentences and by the same functions, and nothing that it accepts.
"""

import ast
from collections.abc import Callable, Iterable, Sequence
import contextlib
import functools
import os
import pathlib
import types

import omegaconf

from maxtext_mudd import versions
from maxtext_mudd.config import errors
from maxtext_mudd.config import files as config_files
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.config.keys import MuddKeys

# Its value is a text, whatever YAML would read in it; MaxText's commands read it as YAML later.
_PROMPT = "prompt="


@errors.reachable()
def check(argv: Sequence[str], check_settings: Callable[[types.SimpleNamespace], None] | None = None) -> None:
  """Checks the version of MaxText, and the files, the names of keys and the `mudd_*` values of a command line.

  Args:
    argv: as in `sys.argv`, the name of the program first. Nothing but the version is checked where flags of Abseil are
      among the arguments: these may have values that look like arguments.
    check_settings: a further check, given all keys with the values that MaxText's configuration class will be given.

  Raises:
    ConfigError: the configuration cannot work.
    versions.UnknownMaxText: MaxText is missing, or another version is installed.
  """
  versions.check()
  flags = [argument for argument in argv[1:] if argument.startswith("-")]
  for flag in flags:
    key = flag.lstrip("-")
    if key.partition("=")[0] in stock_keys()[0] | MuddKeys.model_fields.keys():
      raise ConfigError(f"{flag}: keys have no dashes before them; write {key if '=' in key else f'{key}=value'}.")
  if flags:
    return
  with errors.one_sentence(MuddKeys):
    values = config_files.values([argument for argument in argv if not argument.startswith(_PROMPT)])
    check_keys(values)
    if not is_changed_later(values):
      MuddKeys(**{key: value for key, value in plain(values).items() if key in MuddKeys.model_fields})
      if check_settings and values.get("base_config") in (None, str(config_files.stock_file())):
        stock = omegaconf.OmegaConf.load(config_files.stock_file())
        with contextlib.suppress(TypeError, AttributeError):  # a value of another type, which is refused later
          check_settings(types.SimpleNamespace(**plain(omegaconf.OmegaConf.merge(stock, values))))


def may_hold_back(argv: Sequence[str]) -> bool:
  """Whether a command line shows that the console will be brief: `log_console` is, and one process writes to a local
  folder. False, too, where only the configuration can tell. Raises nothing.

  Args:
    argv: as in `sys.argv`.
  """
  if any(argument.startswith("-") for argument in argv[1:]):
    return False
  try:
    versions.check()
    values = config_files.values([argument for argument in argv if not argument.startswith(_PROMPT)])
    if is_changed_later(values):
      return False
    is_brief = values.get("log_console", MuddKeys.model_fields["log_console"].default) == "brief"
    is_local = "://" not in str(values.get("base_output_directory", ""))
    return is_brief and is_local and values.get("skip_jax_distributed_system") is True
  except Exception:  # mistakes, which are refused later
    return False


def check_keys(keys: Iterable[str]) -> None:
  """Checks names of keys.

  Raises:
    ConfigError: the configuration has no key of this name.
    versions.UnknownMaxText: as `check`.
  """
  versions.check()
  fields, nested = stock_keys()
  fields |= MuddKeys.model_fields.keys()
  for key in map(str, keys):
    if key not in fields and key not in nested:
      raise ConfigError(errors.unknown_key(key, fields))


def is_changed_later(values: omegaconf.DictConfig) -> bool:
  """Whether MaxText may change these values: by variables of the environment (M_STEPS=3), by the keys of `model_name`,
  or because they refer to others (`${steps}`)."""
  if any(name.startswith("M_") for name in os.environ) or values.get("model_name", "default") != "default":
    return True
  return any(omegaconf.OmegaConf.is_interpolation(values, key) for key in values)


def plain(values: omegaconf.DictConfig) -> dict:
  """The values as MaxText passes them to its configuration class, which has None for the text none."""
  texts = omegaconf.OmegaConf.to_container(values)
  return {key: None if str(value).lower() == "none" else value for key, value in texts.items()}


@functools.cache
def stock_keys() -> tuple[frozenset[str], frozenset[str]]:
  """Names of MaxText's keys, and those of the groups that are keys themselves, such as `lora`.

  Read from the source of its configuration class, which imports JAX.
  """
  import maxtext  # its modules are imported when they are asked for

  source = (pathlib.Path(maxtext.__file__).parent / "configs" / "types.py").read_text()
  classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}

  def annotations(name: str) -> dict[str, str]:
    """Fields of a class and its bases, with their types."""
    types = {}
    for base in classes[name].bases:
      types |= annotations(base.id) if isinstance(base, ast.Name) and base.id in classes else {}
    for node in classes[name].body:
      if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        types[node.target.id] = ast.unparse(node.annotation)
    return types

  fields = annotations("MaxTextConfig")
  nested = [annotations(kind) for kind in fields.values() if kind in classes]
  return frozenset(fields), frozenset(key for group in nested for key in group)
