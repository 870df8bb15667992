"""Checks the configuration of a command line before JAX and MaxText are imported, which takes ten seconds or more.

It uses the functions and sentences of `MuddConfig`, which checks the whole configuration later. Whatever this module
refuses, `MuddConfig` refuses, too. This module does not find every mistake. If only MaxText can tell the value of a
key, it checks the name of the key alone.
"""

import ast
from collections.abc import Callable, Iterable, Sequence
import contextlib
import functools
import os
import pathlib
import types

import omegaconf

from maxtext_mudd.config import errors, versions
from maxtext_mudd.config import files as config_files
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.config.keys import MuddKeys

# The value of this key is text here, even if YAML would read a number. MaxText's commands read it as YAML later.
_PROMPT = "prompt="


@errors.reachable()
def check(argv: Sequence[str], check_settings: Callable[[types.SimpleNamespace], None] | None = None) -> None:
  """Checks the version of MaxText, and the files, the names of keys and the `mudd_*` values of a command line.

  Args:
    argv: arguments as in `sys.argv`, the name of the program first. If flags of Abseil are among them, only the
      version and the spelling of keys are checked, because a flag's value can look like an argument.
    check_settings: a further check. It is called with all keys and the values that MaxText's configuration class will
      get, unless MaxText changes them later.

  Raises:
    ConfigError: the configuration cannot work.
    versions.UnknownMaxText: MaxText is missing, or its version is not a known one.
  """
  versions.check()
  flags = [argument for argument in argv[1:] if argument.startswith("-")]
  for flag in flags:
    key = flag.lstrip("-")
    if key.partition("=")[0] in maxtext_keys()[0] | MuddKeys.model_fields.keys():
      raise ConfigError(f"{flag}: keys have no dashes before them; write {key if '=' in key else f'{key}=value'}.")
  if flags:
    return
  with errors.one_sentence(MuddKeys):
    values = config_files.values([argument for argument in argv if not argument.startswith(_PROMPT)])
    check_keys(values)
    if not is_changed_by_maxtext(values):
      MuddKeys(**{key: value for key, value in constructor_values(values).items() if key in MuddKeys.model_fields})
      if check_settings and values.get("base_config") in (None, str(config_files.stock_file())):
        stock_values = omegaconf.OmegaConf.load(config_files.stock_file())
        # A value of a wrong type makes `check_settings` fail; MaxText's configuration class refuses it later.
        with contextlib.suppress(TypeError, AttributeError):
          check_settings(types.SimpleNamespace(**constructor_values(omegaconf.OmegaConf.merge(stock_values, values))))


def shows_brief_console(argv: Sequence[str]) -> bool:
  """Whether the command line alone shows that the console will be brief.

  The console will be brief if `log_console` is "brief", the output folder is local, and the run is one process. The
  answer is False if only MaxText can tell, or if the command line has a mistake. Raises nothing.

  Args:
    argv: arguments as in `sys.argv`.
  """
  if any(argument.startswith("-") for argument in argv[1:]):
    return False
  try:
    versions.check()
    values = config_files.values([argument for argument in argv if not argument.startswith(_PROMPT)])
    if is_changed_by_maxtext(values):
      return False
    is_brief = values.get("log_console", MuddKeys.model_fields["log_console"].default) == "brief"
    is_local = "://" not in str(values.get("base_output_directory", ""))
    return is_brief and is_local and values.get("skip_jax_distributed_system") is True
  except Exception:  # a mistake of the user, which is refused later
    return False


def check_keys(keys: Iterable[str]) -> None:
  """Checks that the configuration has keys of these names.

  Raises:
    ConfigError: there is no key of this name.
    versions.UnknownMaxText: as for `check`.
  """
  versions.check()
  fields, group_fields = maxtext_keys()
  fields |= MuddKeys.model_fields.keys()
  for key in map(str, keys):
    if key not in fields and key not in group_fields:
      raise ConfigError(errors.unknown_key(key, fields))


def is_changed_by_maxtext(values: omegaconf.DictConfig) -> bool:
  """Whether MaxText may change these values. It does so for environment variables (M_STEPS=3), for the keys that
  `model_name` stands for, and for values that refer to another key (`${steps}`)."""
  if any(name.startswith("M_") for name in os.environ) or values.get("model_name", "default") != "default":
    return True
  return any(omegaconf.OmegaConf.is_interpolation(values, key) for key in values)


def constructor_values(values: omegaconf.DictConfig) -> dict:
  """The values as MaxText passes them to its configuration class: None where the text is "none" in any case."""
  container = omegaconf.OmegaConf.to_container(values)
  return {key: None if str(value).lower() == "none" else value for key, value in container.items()}


@functools.cache
def maxtext_keys() -> tuple[frozenset[str], frozenset[str]]:
  """The names of MaxText's keys, and the names of the keys inside groups that are keys themselves, such as `lora`.

  They are read from the source code of MaxText's configuration class, because importing that class imports JAX.
  """
  import maxtext  # this package imports its modules only on access

  source = (pathlib.Path(maxtext.__file__).parent / "configs" / "types.py").read_text()
  classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}

  def annotations(name: str) -> dict[str, str]:
    """The fields of a class and its bases, with the source text of their types."""
    types_by_field = {}
    for base in classes[name].bases:
      types_by_field |= annotations(base.id) if isinstance(base, ast.Name) and base.id in classes else {}
    for node in classes[name].body:
      if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        types_by_field[node.target.id] = ast.unparse(node.annotation)
    return types_by_field

  fields = annotations("MaxTextConfig")
  groups = [annotations(type_name) for type_name in fields.values() if type_name in classes]
  return frozenset(fields), frozenset(key for group in groups for key in group)
