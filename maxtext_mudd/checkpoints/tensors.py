"""Reads and writes tensors of `.safetensors` files one at a time. A `Tensor` reads its values when `read` is called."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import json
import math
import pathlib
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors import safe_open
from safetensors.numpy import save_file

from maxtext_mudd.config.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 10**9
# float64 is not supported: the authors publish no such tensors, and MaxText would round them.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPES = tuple(map(np.dtype, _DTYPES.values()))


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a checkpoint. Its values are read when `read` is called.

  Attributes:
    file: the file or the Orbax folder that holds it, for messages.
    shape: shape, from the header.
    dtype: dtype, from the header.
    read: reads the values into a new array, and closes the file again.
  """

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    """Size in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def of_file(file: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of one `.safetensors` file, by name; only the header is read.

  Raises:
    ConfigError: the file is damaged, or a tensor has another dtype than `DTYPES`.
  """

  def tensor(name, header):
    dtype = _DTYPES.get(header.get_dtype())
    if dtype is None:
      raise ConfigError(f"{file}: {name} is of {header.get_dtype()}; tensors of {', '.join(_DTYPES)} can be read.")

    def read():
      with _damage_reported(file), safe_open(file, framework="numpy") as opened:
        return opened.get_tensor(name)

    return Tensor(file, tuple(header.get_shape()), np.dtype(dtype), read)

  with _damage_reported(file), safe_open(file, framework="numpy") as opened:
    return {name: tensor(name, opened.get_slice(name)) for name in list(opened.keys())}


@contextlib.contextmanager
def _damage_reported(file: pathlib.Path):
  """Turns the errors of a damaged file into a ConfigError that names it."""
  try:
    yield
  except (safetensors.SafetensorError, OSError) as error:
    raise ConfigError(f"{file} cannot be read; it is cut off or damaged ({error}); copy it again.") from error


class LazyArrays(Mapping):
  """A mapping from paths to arrays. It reads an array when it is looked up, and does not keep it."""

  def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]], progress: Callable[[int], None]):
    """
    Args:
      readers: the function that reads the array of each path.
      progress: is called with the bytes of each array that is read.
    """
    self._readers, self._progress = readers, progress

  def __iter__(self):
    return iter(self._readers)

  def __len__(self):
    return len(self._readers)

  def __getitem__(self, path: str) -> np.ndarray:
    value = self._readers[path]()
    self._progress(value.nbytes)
    return value


class Output(NamedTuple):
  """A tensor to write.

  Attributes:
    shape: shape of the tensor.
    dtype: dtype that the values are cast to.
    values: returns the values.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  values: Callable[[], np.ndarray]


def write(folder: pathlib.Path, outputs: Mapping[str, Output]) -> None:
  """Writes tensors to `model.safetensors`, or to shards of `SHARD_BYTES` and an index, one shard in memory at a time.

  Args:
    outputs: the tensors by name.

  Raises:
    ConfigError: values are not finite, or do not fit the dtype.
    OSError: a file cannot be written.
  """
  sizes = {name: math.prod(x.shape) * np.dtype(x.dtype).itemsize for name, x in outputs.items()}
  shards, space_left = [[]], SHARD_BYTES
  for name, size in sizes.items():
    if size > space_left and shards[-1]:
      shards.append([])
      space_left = SHARD_BYTES
    shards[-1].append(name)
    space_left -= size
  files = [f"model-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
  if len(shards) == 1:
    files = [SINGLE]
  else:
    weight_map = {name: file for file, names in zip(files, shards) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
  for file, names in zip(files, shards):
    shard = {name: cast(outputs[name].values(), outputs[name].dtype, name) for name in names}
    path = folder / file
    path.touch()
    mode = path.stat().st_mode  # what umask gives all files; safetensors makes its files readable by the owner only
    try:
      save_file(shard, path, metadata={"format": "pt"})
      path.chmod(mode)
    except safetensors.SafetensorError as error:
      raise OSError(str(error)) from error
    del shard  # before the next one is read


def cast(value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """Casts an array.

  Args:
    name: name of the array, for messages.

  Raises:
    ConfigError: an entry is not finite, or becomes infinite in this dtype.
  """
  if not np.isfinite(value).all():
    raise ConfigError(f"{name} has entries that are NaN or infinite; the model is broken.")
  with np.errstate(over="ignore"):
    converted = np.ascontiguousarray(value, dtype)
  if converted.dtype != value.dtype and not np.isfinite(converted).all():
    raise ConfigError(f"{name} has entries too large for {converted.dtype}; convert to float32.")
  return converted
