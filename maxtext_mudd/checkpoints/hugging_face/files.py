"""Which files of a Hugging Face folder hold its tensors."""

import json
import pathlib

from maxtext_mudd.checkpoints import tensors
from maxtext_mudd.checkpoints.hugging_face import pickled
from maxtext_mudd.checkpoints.tensors import Tensor
from maxtext_mudd.config.errors import ConfigError

# (file, index of many files, what reads one), the first that are there.
KINDS = (
  (tensors.SINGLE, tensors.INDEX, tensors.of_file),
  ("pytorch_model.bin", "pytorch_model.bin.index.json", pickled.of_file),
)
FILES = tuple(name for single, index, _ in KINDS for name in (single, index))


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of `model.safetensors` or `pytorch_model.bin`, or of the shards that their index names, by name; values
  are not read yet.

  Raises:
    ConfigError: there are none, files and index are not of each other, or a file is damaged or of integers.
  """
  for single, index, of_file in KINDS:
    if (folder / single).exists():  # before what shards and an index were left beside it, as transformers reads it
      return of_file(folder / single)
    if (folder / index).exists():
      return _of_shards(folder, index, of_file)
  raise ConfigError(f"{folder} has none of {', '.join(FILES)}; name a folder that holds a model.")


def _of_shards(folder: pathlib.Path, index: str, of_file) -> dict[str, Tensor]:
  where = _weight_map(folder / index)
  files = {name: folder / name for name in sorted(set(where.values()))}
  missing = [file for file in files.values() if not file.exists()]
  if missing:
    raise ConfigError(f"{missing[0]} is missing, and {index} names it; copy it beside the others.")
  found = {name: of_file(file) for name, file in files.items()}
  for name, file in where.items():
    if name not in found[file]:
      raise ConfigError(f"{folder / file} has no {name}, which {index} says it has; copy both again.")
  for file, tensors_of_file in found.items():
    for name in tensors_of_file:
      if where.get(name) != file:
        raise ConfigError(f"{folder / file} has {name}, which {index} does not name there; copy both again.")
  return {name: found[file][name] for name, file in where.items()}


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  try:
    where = json.loads(index.read_text())["weight_map"]
    if where and all(isinstance(file, str) for file in where.values()):
      return where
    reason = "its weight_map names no files"
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    reason = error
  raise ConfigError(f"{index} is not the index of a model ({reason}); copy it again.")
