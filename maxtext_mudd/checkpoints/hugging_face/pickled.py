"""Tensors of `.bin` files, as PyTorch saves them; they need PyTorch to be read."""

import pathlib
import zipfile

import ml_dtypes
import numpy as np

from maxtext_mudd.checkpoints.tensors import Tensor
from maxtext_mudd.config.errors import ConfigError, brief


def of_file(file: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of one file by name; the values stay on disk until they are read.

  Raises:
    ConfigError: PyTorch is not installed, or the file is damaged or holds anything but tensors.
  """
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ConfigError(
      f"{file} needs PyTorch to be read; install it (pip install torch), or save the model as safetensors."
    ) from error
  dtypes = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
  }
  try:
    # PyTorch maps no files of its older format, which are read at once.
    found = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
  except Exception as error:  # it raises all kinds
    raise ConfigError(f"{file} cannot be read; it is cut off or damaged ({brief(error)}); copy it again.") from error
  if not isinstance(found, dict) or not all(isinstance(x, torch.Tensor) for x in found.values()):
    raise ConfigError(f"{file} holds more than tensors by name; name the folder of a published model.")

  def tensor(name, value):
    if value.dtype not in dtypes:
      known = ", ".join(str(x) for x in dtypes)
      raise ConfigError(f"{file}: {name} is of {value.dtype}; tensors of {known} can be read.")
    dtype = np.dtype(dtypes[value.dtype])

    def read():
      bits = value.contiguous().view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
      return bits.numpy().view(dtype).copy()

    return Tensor(file, tuple(value.shape), dtype, read)

  return {name: tensor(name, value) for name, value in found.items()}
