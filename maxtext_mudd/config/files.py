"""The configuration files of a command line: one model, and any number of files whose keys override the model's.

A name is a path; if there is no such file, it is looked up among the files of this package (`assets.CONFIGURATIONS`),
with or without `yaml/` before it. Nothing here imports JAX.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import os
import pathlib
import tempfile
from typing import Any

import omegaconf

from maxtext_mudd import assets
from maxtext_mudd.config import errors
from maxtext_mudd.config.errors import ConfigError

_BASE = "base_config"
_ROOTS = ("base.yml", "mudd_base.yml")  # files that set defaults of keys and nothing else
_FOLDER = "yaml/"  # the folder of these files in a checkout


def packaged() -> list[str]:
  """Names of the configuration files of this package, as a command line and `base_config:` take them. Files in
  subfolders come last. Plans of studies are left out: they name models and are not configurations. So are image
  classifiers, which MaxText does not train."""
  files = (path for path in assets.CONFIGURATIONS.rglob("*.yml") if f"\n{_BASE}:" in f"\n{path.read_text()}")
  names = (path.relative_to(assets.CONFIGURATIONS).as_posix() for path in files)
  names = (name for name in names if not name.startswith("vit/"))
  return sorted(names, key=lambda name: ("/" in name, name))


def split(argv: Sequence[str] | None) -> tuple[list[str] | None, dict[str, Any]]:
  """Separates the files after the first from the other arguments: `model.yml data/pile.yml steps=10`.

  Returns:
    The other arguments, and the values that the files set. A later file overrides an earlier one, and `key=value`
    overrides all files.

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
      values |= _further(argument, after=argv[1])
    else:
      raise ConfigError(f"{argument} is not key=value, nor a configuration file, which ends in .yml.")
  given = {argument.split("=", 1)[0] for argument in kept[2:]}
  of_files = omegaconf.OmegaConf.create({key: value for key, value in values.items() if key not in given})
  # MaxText gives a group of keys that a file sets, such as `lora`, precedence over `lora.lora_rank=4`.
  of_groups = [argument for argument in kept[2:] if argument.split(".", 1)[0] in of_files]
  merged = omegaconf.OmegaConf.merge(of_files, omegaconf.OmegaConf.from_dotlist(of_groups))
  return kept, omegaconf.OmegaConf.to_container(merged)


def _further(name: str, after: str) -> dict[str, Any]:
  """The values that a file after the model's file sets. Its `base_config` is not read, so it cannot be a model."""
  values = load(name)
  base = values.pop(_BASE, None)
  if "=" in after:
    raise ConfigError(f"{name} comes after {after}; name the model's file before all else.")
  if base and pathlib.Path(base).name not in _ROOTS:
    raise ConfigError(
      f"{name} builds on {base}, so it is a model, and cannot override {after}; name one model, before all else."
    )
  return values


def load(name: str) -> dict[str, Any]:
  """The values that one file sets, without those of its `base_config`.

  Raises:
    ConfigError: there is no such file, or it does not map keys to values.
  """
  return omegaconf.OmegaConf.to_container(_read(name))


def _read(name: str) -> omegaconf.DictConfig:
  values = omegaconf.OmegaConf.load(find(name))
  if not isinstance(values, omegaconf.DictConfig):
    raise ConfigError(f"{name}: a configuration file maps keys to values, as in `mudd: true`.")
  return values


def find(name: str) -> pathlib.Path:
  """The file that a command line means by `name`: a path, MaxText's `src/maxtext/configs/...`, or a file of this
  package.

  Raises:
    ConfigError: there is no such file.
  """
  stock = name.removeprefix("src/maxtext/configs/")
  of_maxtext = [_maxtext_configs() / stock] if stock != name else []
  for path in (pathlib.Path(name), *of_maxtext, pathlib.Path("src", name), *_in_package(name)):
    if os.path.isfile(path):  # also False for names that the system does not allow
      return path
  relative = os.path.basename(name) if os.path.isabs(name) else name.removeprefix(_FOLDER)
  nearest = errors.nearest(relative, packaged())
  raise ConfigError(
    f"{name}: no such configuration file; the nearest of this package is {nearest} (python3 -m maxtext_mudd.train "
    "--list names them all)."
  )


def _in_package(name: str) -> Iterator[pathlib.Path]:
  """Yields the path of a name in this package's folder. Yields nothing for absolute names and names that leave it."""
  path = pathlib.PurePath(name.removeprefix(_FOLDER))
  if not path.is_absolute() and ".." not in path.parts:
    yield assets.CONFIGURATIONS / path


def _maxtext_configs() -> pathlib.Path:
  from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR  # after the version of MaxText has been checked

  return pathlib.Path(MAXTEXT_CONFIGS_DIR)


def stock_file() -> pathlib.Path:
  """MaxText's file with a value for every key."""
  return _maxtext_configs() / "base.yml"


def check(argv: Sequence[str] | None, overrides: dict) -> None:
  """Refuses a first argument that does not end in `.yml`: MaxText would read it as an override, and train its default
  model."""
  if name := model(argv, overrides):
    chain(name)


def model(argv: Sequence[str] | None, overrides: dict) -> str:
  """The model's file as the first argument names it; empty if there is none, so that MaxText takes its default.

  Raises:
    ConfigError: the first argument does not end in `.yml`.
  """
  name = argv[1] if argv and len(argv) > 1 else ""
  if overrides.get(_BASE) or not name or "=" in name:
    return ""
  if not name.endswith(".yml"):
    raise ConfigError(f"{name}: a configuration file must end in .yml; rename it or put the file first.")
  return name


def chain(name: str) -> list[pathlib.Path]:
  """The files that set a configuration, without those of MaxText. The named file comes first.

  Raises:
    ConfigError: there is no such file, or the chain of `base_config` does not end in one of MaxText's files, which give
      every key a value.
  """
  return [file.resolve() for file in _chain(name).files]


@dataclasses.dataclass(frozen=True)
class _Chain:
  """A configuration file and those that it builds on by `base_config`.

  Attributes:
    files: the named file, then its `base_config` and so on, up to `root`.
    root: MaxText's file at the end of the chain.
    values: the values that `files` set together.
    is_stock: whether MaxText finds each file by itself.
  """

  files: list[pathlib.Path]
  root: pathlib.Path
  values: omegaconf.DictConfig
  is_stock: bool


def _chain(name: str) -> _Chain:
  path, files, values = find(name), [], []
  configs, is_stock = _maxtext_configs(), True
  while not path.resolve().is_relative_to(configs.resolve()):
    if path.resolve() in [file.resolve() for file in files]:
      raise ConfigError(f"{path}: its base_config leads back to itself; end the chain in base.yml.")
    files.append(path)
    values.append(_read(str(path)))
    base = values[-1].get(_BASE)
    if not base:
      raise ConfigError(f"{path} has no base_config; write base_config: mudd_base.yml (or base.yml, MaxText's own).")
    places = (path.parent / base, configs / base, *_in_package(base))
    path = next((place for place in places if os.path.isfile(place)), None)
    if path is None:
      raise ConfigError(
        f"{files[-1]}: base_config={base}: no such configuration file beside it, in MaxText or in this package."
      )
    is_stock = is_stock and path in places[:2]
  merged = omegaconf.OmegaConf.merge({}, *reversed(values), {_BASE: str(path)})
  return _Chain(files, path, merged, is_stock)


def values(argv: Sequence[str]) -> omegaconf.DictConfig:
  """The values that a command line sets, by files and by key=value, without the values of MaxText's files.

  Raises:
    ConfigError: as `check` and `split`.
    Exception: the error of OmegaConf or YAML for a key=value that is not valid YAML.
  """
  name = model(argv, {})
  of_model = _chain(name).values if name else {}
  kept, further = split(argv)
  overrides = omegaconf.OmegaConf.from_cli(kept[2 if name else 1 :])
  return omegaconf.OmegaConf.merge(of_model, overrides, further)


@contextlib.contextmanager
def for_maxtext(argv: Sequence[str] | None, overrides: dict) -> Iterator[list[str] | None]:
  """A context that yields the arguments, with a model's file that MaxText finds and whose `base_config` it finds.

  MaxText does not search this package's folder. If a file or its `base_config` is in this folder, the values of the
  chain of files are written to one temporary file. They are not passed as overrides: overrides take precedence over the
  keys of `model_name`, and MaxText refuses a key that is both an override and a variable of the environment.

  Raises:
    ConfigError: as `check`, or no temporary file can be written.
  """
  name = model(argv, overrides)
  if not name:
    yield argv
    return
  chain_of_model = _chain(name)
  source = chain_of_model.files[0] if chain_of_model.files else chain_of_model.root
  if chain_of_model.is_stock:
    yield [argv[0], str(source), *argv[2:]]
    return
  try:
    temporary = tempfile.TemporaryDirectory(prefix="maxtext-mudd-")
  except OSError as error:
    raise ConfigError(
      f"{name} is copied to a folder for temporary files, and none can be written; set the environment variable TMPDIR "
      "to one that can."
    ) from error
  with temporary as folder:
    file = pathlib.Path(folder, "configs", source.name)
    file.parent.mkdir()
    omegaconf.OmegaConf.save(chain_of_model.values, file)
    # MaxText looks for the file of `model_name` in these folders, too.
    beside = source.absolute().parent
    for here, there in ((file.parent, beside), (file.parents[1], beside.parent)):
      if (there / "models").is_dir():
        os.symlink(there / "models", here / "models")
    yield [argv[0], str(file), *argv[2:]]
