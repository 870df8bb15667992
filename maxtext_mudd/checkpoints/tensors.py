"""Tensors of a Hugging Face folder, read from their files one by one."""

from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
import re

import ml_dtypes
import numpy as np
import safetensors
from safetensors import safe_open
from safetensors.numpy import save_file

from maxtext_mudd.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 10**9


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a file.

  Attributes:
    file: where it is.
    shape, size: by the file's header; the size in bytes.
    read: the values, in a new array; the file is closed again.
  """

  file: pathlib.Path
  shape: tuple[int, ...]
  size: int
  read: Callable[[], np.ndarray]


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names, by name; only
  headers are read.

  Raises:
    ConfigError: there are none, a file that the index names is missing, or one is damaged, or a name is there twice.
  """
  found = {}
  for file in _files(folder):
    for name, tensor in of_file(file).items():
      if name in found:
        raise ConfigError(f"{name} is in {found[name].file} and in {file}; leave one of them.")
      found[name] = tensor
  return found


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  index, single = folder / INDEX, folder / SINGLE
  if not index.exists():
    if not single.exists():
      raise ConfigError(f"{folder} has neither {SINGLE} nor {INDEX}; name a folder that holds a model.")
    return [single]
  try:
    files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise ConfigError(f"{index} is not the index of a model ({error}); copy it again.") from error
  missing = [file for file in files if not file.exists()]
  if missing:
    raise ConfigError(f"{missing[0]} is missing, and {INDEX} names it; copy it beside the others.")
  return files


def of_file(file: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of one `.safetensors` file, by name; only the header is read. Raises ConfigError for a damaged one."""

  def reading(name):
    def read():
      with safe_open(file, framework="numpy") as opened:
        return opened.get_tensor(name)

    return read

  def tensor(name, header):
    shape = tuple(header.get_shape())
    bits = int(re.search(r"\d+", header.get_dtype())[0])
    return Tensor(file, shape, int(np.prod(shape)) * bits // 8, reading(name))

  try:
    with safe_open(file, framework="numpy") as opened:
      return {name: tensor(name, opened.get_slice(name)) for name in list(opened.keys())}
  except (safetensors.SafetensorError, OSError) as error:
    raise ConfigError(f"{file} cannot be read; it is cut off or damaged ({error}); copy it again.") from error


def write(folder: pathlib.Path, made: Mapping[str, tuple[tuple[int, ...], Callable]], dtype: str) -> None:
  """Writes tensors to `model.safetensors`, or to shards of `SHARD_BYTES` and an index, one shard in memory at a time.

  Args:
    made: shape, and what makes the values, by name.
    dtype: of all of them.
  """
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  shards, room = [[]], SHARD_BYTES
  for name, (shape, _) in made.items():
    size = int(np.prod(shape)) * dtype.itemsize
    if size > room and shards[-1]:
      shards.append([])
      room = SHARD_BYTES
    shards[-1].append(name)
    room -= size
  if len(shards) == 1:
    files = [SINGLE]
  else:
    files = [f"model-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
    where = {name: file for file, names in zip(files, shards) for name in names}
    total = sum(int(np.prod(shape)) for shape, _ in made.values()) * dtype.itemsize
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
  for file, names in zip(files, shards):
    shard = {name: np.ascontiguousarray(made[name][1](), dtype) for name in names}
    save_file(shard, folder / file, metadata={"format": "pt"})
