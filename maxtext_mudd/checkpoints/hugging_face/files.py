"""Finds the tensors of a Hugging Face folder: in one file, or in shards that an index names."""

from collections.abc import Callable
import json
import pathlib

from maxtext_mudd.checkpoints import tensors
from maxtext_mudd.checkpoints.hugging_face import pickled
from maxtext_mudd.checkpoints.tensors import Tensor
from maxtext_mudd.config.errors import ConfigError

# (the single file, the index of shards, the function that reads one file). The first format that exists is read.
FORMATS = (
  (tensors.SINGLE, tensors.INDEX, tensors.of_file),
  ("pytorch_model.bin", "pytorch_model.bin.index.json", pickled.of_file),
)
FILES = tuple(name for single, index, _ in FORMATS for name in (single, index))


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of the folder, by name; their values are not read yet.

  Raises:
    ConfigError: there are no tensors, the shards and their index do not agree, or a file is damaged or holds a tensor
      of a dtype that is not supported.
  """
  for single, index, read_file in FORMATS:
    if (folder / single).exists():  # transformers, too, ignores shards and an index beside this file
      return read_file(folder / single)
    if (folder / index).exists():
      return _open_shards(folder, index, read_file)
  raise ConfigError(f"{folder} has none of {', '.join(FILES)}; name a folder that holds a model.")


def _open_shards(
  folder: pathlib.Path, index: str, read_file: Callable[[pathlib.Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
  file_of_tensor = _weight_map(folder / index)
  files = sorted(set(file_of_tensor.values()))
  missing = [file for file in files if not (folder / file).exists()]
  if missing:
    raise ConfigError(f"{folder / missing[0]} is missing, and {index} names it; copy it beside the others.")
  shards = {file: read_file(folder / file) for file in files}
  for name, file in file_of_tensor.items():
    if name not in shards[file]:
      raise ConfigError(f"{folder / file} has no {name}, which {index} says it has; copy both again.")
  for file, shard in shards.items():
    for name in shard:
      if file_of_tensor.get(name) != file:
        raise ConfigError(f"{folder / file} has {name}, which {index} does not name there; copy both again.")
  return {name: shards[file][name] for name, file in file_of_tensor.items()}


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  """The file of each tensor, by the name of the tensor."""
  try:
    weight_map = json.loads(index.read_text())["weight_map"]
    if weight_map and all(isinstance(file, str) for file in weight_map.values()):
      return weight_map
    reason = "its weight_map names no files"
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    reason = error
  raise ConfigError(f"{index} is not the index of a model ({reason}); copy it again.")
