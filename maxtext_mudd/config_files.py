"""Which configuration files a command line names: one model, and any number of files whose keys are laid over it."""

from collections.abc import Sequence
import pathlib
from typing import Any

from maxtext.configs import pyconfig
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR
import omegaconf

from maxtext_mudd.errors import ConfigError

_BASE = "base_config"
_ROOTS = ("base.yml", "mudd_base.yml")  # what gives keys their defaults and nothing else


def split(argv: Sequence[str] | None) -> tuple[list[str] | None, dict[str, Any]]:
  """Takes the files after the first out of the arguments, as `MaxText/train.py model.yml data/pile.yml steps=10`.

  Returns:
    The other arguments, and the values that the files set; a later file goes before an earlier one, and `key=value`
    before all.

  Raises:
    ConfigError: an argument after the first is neither key=value nor a YAML file; a file does not exist, builds on a
      model, or comes after no model.
  """
  if not argv:
    return argv, {}
  kept, values = list(argv[:2]), {}
  for argument in argv[2:]:
    if argument.startswith(f"{_BASE}="):
      raise ConfigError(f"{argument}: {_BASE} is a key of files alone; name the file itself, before all else.")
    if "=" in argument:
      kept.append(argument)
    elif argument.endswith(".yml"):
      values |= _laid_over(argument, after=argv[1])
    else:
      raise ConfigError(f"{argument} is not key=value, nor a configuration file, which ends in .yml.")
  given = {argument.split("=", 1)[0] for argument in kept[2:]}
  return kept, {key: value for key, value in values.items() if key not in given}


def _laid_over(name: str, after: str) -> dict[str, Any]:
  """What a further file sets. Its chain is not followed, so it must hold nothing but the keys of this project."""
  values = load(name)
  base = values.pop(_BASE, None)
  if "=" in after:
    raise ConfigError(f"{name} comes after {after}; name the model's file before all else.")
  if base and pathlib.Path(base).name not in _ROOTS:
    raise ConfigError(
      f"{name} builds on {base}, so it is a model, and cannot be laid over {after}; name one model, before all else."
    )
  return values


def load(name: str) -> dict[str, Any]:
  """What one file says itself.

  Raises:
    ConfigError: there is no such file, or it does not map keys to values.
  """
  values = omegaconf.OmegaConf.load(_file(name))
  if not isinstance(values, omegaconf.DictConfig):
    raise ConfigError(f"{name}: a configuration file maps keys to values, as in `mudd: true`.")
  return omegaconf.OmegaConf.to_container(values)


def _file(name: str) -> pathlib.Path:
  path = pathlib.Path(pyconfig.resolve_config_path(name))
  if not path.is_file():
    raise ConfigError(f"{name}: no such configuration file; see yaml/ for those that come with this project.")
  return path


def check(argv: Sequence[str] | None, overrides: dict) -> None:
  """Refuses a first argument that MaxText would misread: it takes one that does not end in `.yml` for an override, and
  trains its default model."""
  name = argv[1] if argv and len(argv) > 1 else ""
  if overrides.get(_BASE) or not name or "=" in name:
    return
  if not name.endswith(".yml"):
    raise ConfigError(f"{name}: a configuration file must end in .yml; rename it or put the file first.")
  chain(name)


def chain(name: str) -> list[pathlib.Path]:
  """The files that a configuration is made of, less MaxText's own.

  Raises:
    ConfigError: there is no such file, or the chain of `base_config` does not end in one of MaxText's own, which give
      every key a value.
  """
  path, seen = _file(name), []
  configs = pathlib.Path(MAXTEXT_CONFIGS_DIR)
  while not path.resolve().is_relative_to(configs.resolve()):
    if path.resolve() in seen:
      raise ConfigError(f"{path}: its base_config leads back to itself; end the chain in base.yml.")
    seen.append(path.resolve())
    base = load(str(path)).get(_BASE)
    if not base:
      raise ConfigError(f"{path} has no base_config; write base_config: mudd_base.yml (or base.yml, MaxText's own).")
    beside = path.parent / base
    path = beside if beside.is_file() else configs / base
    if not path.is_file():
      raise ConfigError(f"{seen[-1]}: base_config={base}: no such configuration file beside it, nor in MaxText.")
  return seen
