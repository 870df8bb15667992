"""Reads tensors from PyTorch's `.bin` files; PyTorch has to be installed."""

import pathlib
import zipfile

import ml_dtypes
import numpy as np

from maxtext_mudd.checkpoints.tensors import Tensor
from maxtext_mudd.config.errors import ConfigError, brief


def of_file(file: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of one file, by name; their values stay on disk until they are read.

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
    # PyTorch cannot map files of its older format, which is not a zip file; it reads them at once.
    values = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
  except Exception as error:  # PyTorch has no base class for its errors
    raise ConfigError(f"{file} cannot be read; it is cut off or damaged ({brief(error)}); copy it again.") from error
  if not isinstance(values, dict) or not all(isinstance(x, torch.Tensor) for x in values.values()):
    raise ConfigError(f"{file} holds other objects than named tensors; name the folder of a published model.")

  def tensor(name, value):
    if value.dtype not in dtypes:
      raise ConfigError(f"{file}: {name} is of {value.dtype}; tensors of {', '.join(map(str, dtypes))} can be read.")
    dtype = np.dtype(dtypes[value.dtype])

    def read():
      bits = value.contiguous().view({2: torch.int16, 4: torch.int32}[dtype.itemsize])  # NumPy has no bfloat16
      return bits.numpy().view(dtype).copy()

    return Tensor(file, tuple(value.shape), dtype, read)

  return {name: tensor(name, value) for name, value in values.items()}
