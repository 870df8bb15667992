"""Reads Orbax checkpoints, saved on any devices, into NumPy arrays: one parameter at a time, or the whole tree."""

from collections.abc import Mapping
import pathlib
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import numpy as np
from orbax.checkpoint import PyTreeCheckpointer, RestoreArgs, args

from maxtext_mudd.checkpoints import tensors
from maxtext_mudd.config.errors import ConfigError, brief


def parameters(path: pathlib.Path) -> dict[str, tensors.Tensor]:
  """The parameters of a saved model or train state, by path. Only metadata are read, not the values.

  Raises:
    ConfigError: the folder is damaged, holds no parameters, or holds one that is not floating point.
  """
  checkpointer = PyTreeCheckpointer()
  try:
    tree, root = checkpointer.metadata(epath.Path(path)).item_metadata.tree, ()
  except Exception as error:  # Orbax has no base class for its errors
    raise _damaged(path, error) from error
  while isinstance(tree, dict) and isinstance(tree.get("params"), dict):
    tree, root = tree["params"], (*root, "params")
  if not isinstance(tree, dict) or not tree:
    raise ConfigError(f"{path} holds no parameters; name a folder that a model was saved to.")

  def tensor(name, metadata):
    if metadata.dtype not in tensors.DTYPES:
      dtypes = ", ".join(map(str, tensors.DTYPES))
      raise ConfigError(f"{path}: {name} is of {metadata.dtype}; arrays of {dtypes} can be read.")

    def read():
      keys = (*root, *name.split("/"))
      restore_args = _nested(keys, RestoreArgs(restore_type=np.ndarray))
      only_this = args.PyTreeRestore(item=_nested(keys, metadata), restore_args=restore_args, partial_restore=True)
      try:
        value = checkpointer.restore(epath.Path(path), args=only_this)
      except Exception as error:  # Orbax has no base class for its errors
        raise _damaged(path, error) from error
      for key in keys:
        value = value[key]
      return value

    return tensors.Tensor(path, tuple(metadata.shape), np.dtype(metadata.dtype), read)

  return {name: tensor(name, metadata) for name, metadata in _by_path(tree).items()}


def read_tree(path: pathlib.Path, item: str = ""):
  """The whole tree of a checkpoint, or of one item in it, as NumPy arrays.

  Raises:
    ConfigError: the checkpoint cannot be read.
  """
  folder, checkpointer = epath.Path(path / item), PyTreeCheckpointer()
  try:
    tree = checkpointer.metadata(folder).item_metadata.tree
    to_numpy = jax.tree.map(lambda _: RestoreArgs(restore_type=np.ndarray), tree, is_leaf=lambda x: hasattr(x, "dtype"))
    return checkpointer.restore(folder, restore_args=to_numpy)
  except Exception as error:  # Orbax has no base class for its errors
    raise _damaged(path, error) from error


def _by_path(tree: Mapping[str, Any]) -> dict[str, Any]:
  return {"/".join(path): value for path, value in traverse_util.flatten_dict(tree).items()}


def _nested(keys: tuple[str, ...], leaf):
  for key in reversed(keys):
    leaf = {key: leaf}
  return leaf


def _damaged(path: pathlib.Path, error: Exception) -> ConfigError:
  return ConfigError(f"{path} cannot be read; it is damaged, or is not a MaxText checkpoint ({brief(error)}).")
