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

ITEMS = ("items", "model_params")  # names of the folder of parameters in a checkpoint: MaxText's, and Tunix'


def leaves(tree: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
  """The parameters in the tree of a checkpoint, by the path of the parameter: its path in the tree, and the leaf.

  MaxText's trainer saves {"params": {"params": {...}}}. Tunix' trainers save the state of the model itself, in which a
  leaf is {"value": ...}, random number generators are among the parameters, and DPO puts all into {"base": ...}.
  """
  root: tuple[str, ...] = ()
  while isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
    tree, root = tree["params"], (*root, "params")
  if not root and isinstance(tree, Mapping) and isinstance(tree.get("base"), Mapping):
    tree, root = tree["base"], ("base",)
  if not isinstance(tree, Mapping):
    return {}
  flat = {tuple(map(str, path)): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}
  if not any(path[-1] == "value" for path in flat):
    return {"/".join(path): ((*root, *path), leaf) for path, leaf in flat.items()}
  return {
    "/".join(path[:-1]): ((*root, *path), leaf)
    for path, leaf in flat.items()
    if path[-1] == "value" and not any(name.endswith("rngs") for name in path)
  }


def parameters(path: pathlib.Path) -> dict[str, tensors.Tensor]:
  """The parameters of a saved model or train state, by path. Only metadata are read, not the values.

  Raises:
    ConfigError: the folder is damaged, holds no parameters, or holds one that is not floating point.
  """
  checkpointer = PyTreeCheckpointer()
  try:
    saved = leaves(checkpointer.metadata(epath.Path(path)).item_metadata.tree)
  except Exception as error:  # Orbax has no base class for its errors
    raise _damaged(path, error) from error
  if not saved:
    raise ConfigError(f"{path} holds no parameters; name a folder that a model was saved to.")

  def tensor(name, keys, metadata):
    if metadata.dtype not in tensors.DTYPES:
      dtypes = ", ".join(map(str, tensors.DTYPES))
      raise ConfigError(f"{path}: {name} is of {metadata.dtype}; arrays of {dtypes} can be read.")

    def read():
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

  return {name: tensor(name, keys, metadata) for name, (keys, metadata) in saved.items()}


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


def _nested(keys: tuple[str, ...], leaf):
  for key in reversed(keys):
    leaf = {key: leaf}
  return leaf


def _damaged(path: pathlib.Path, error: Exception) -> ConfigError:
  return ConfigError(f"{path} cannot be read; it is damaged, or is not a MaxText checkpoint ({brief(error)}).")
