"""Tensors in `.safetensors` files, read and written one by one."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import json
import math
import pathlib

import ml_dtypes
import numpy as np
import safetensors
from safetensors import safe_open
from safetensors.numpy import save_file

from maxtext_mudd.config.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 10**9
# The authors publish none of 64 bits, and MaxText would round them.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPES = tuple(map(np.dtype, _DTYPES.values()))


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a file.

  Attributes:
    file: where it is.
    shape, dtype: by the file's header.
    read: the values, in a new array; the file is closed again.
  """

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    """In bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def of_file(file: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of one `.safetensors` file, by name; only the header is read. Raises ConfigError for a damaged one."""

  def reading(name):
    def read():
      with _readable(file), safe_open(file, framework="numpy") as opened:
        return opened.get_tensor(name)

    return read

  def tensor(name, header):
    dtype = _DTYPES.get(header.get_dtype())
    if dtype is None:
      raise ConfigError(f"{file}: {name} is of {header.get_dtype()}; tensors of {', '.join(_DTYPES)} can be read.")
    return Tensor(file, tuple(header.get_shape()), np.dtype(dtype), reading(name))

  with _readable(file), safe_open(file, framework="numpy") as opened:
    return {name: tensor(name, opened.get_slice(name)) for name in list(opened.keys())}


@contextlib.contextmanager
def _readable(file: pathlib.Path):
  try:
    yield
  except (safetensors.SafetensorError, OSError) as error:
    raise ConfigError(f"{file} cannot be read; it is cut off or damaged ({error}); copy it again.") from error


class Lazy(Mapping):
  """Arrays by path, each made when it is looked up and not kept."""

  def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]], progress: Callable[[int], None]):
    """`progress`: called with the bytes of each array made."""
    self._makers, self._progress = makers, progress

  def __iter__(self):
    return iter(self._makers)

  def __len__(self):
    return len(self._makers)

  def __getitem__(self, path: str) -> np.ndarray:
    value = self._makers[path]()
    self._progress(value.nbytes)
    return value


def write(folder: pathlib.Path, made: Mapping[str, tuple[tuple[int, ...], np.dtype, Callable]]) -> None:
  """Writes tensors to `model.safetensors`, or to shards of `SHARD_BYTES` and an index, one shard in memory at a time.

  Args:
    made: shape, dtype, and what makes the values, by name.

  Raises:
    ConfigError: the values do not fit the dtype.
    OSError: no room.
  """
  sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype, _) in made.items()}
  shards, room = [[]], SHARD_BYTES
  for name, size in sizes.items():
    if size > room and shards[-1]:
      shards.append([])
      room = SHARD_BYTES
    shards[-1].append(name)
    room -= size
  files = [f"model-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
  if len(shards) == 1:
    files = [SINGLE]
  else:
    where = {name: file for file, names in zip(files, shards) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
  for file, names in zip(files, shards):
    shard = {name: cast(made[name][2](), made[name][1], name) for name in names}
    path = folder / file
    path.touch()
    mode = path.stat().st_mode  # that of all files here; theirs is the owner's alone
    try:
      save_file(shard, path, metadata={"format": "pt"})
      path.chmod(mode)
    except safetensors.SafetensorError as error:
      raise OSError(str(error)) from error


def cast(value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """Raises ConfigError for values that are not finite, or not any more in this dtype."""
  if not np.isfinite(value).all():
    raise ConfigError(f"{name} has entries that are NaN or infinite; the model is broken.")
  with np.errstate(over="ignore"):
    made = np.ascontiguousarray(value, dtype)
  if made.dtype != value.dtype and not np.isfinite(made).all():
    raise ConfigError(f"{name} has entries too large for {made.dtype}; convert to float32.")
  return made
