"""Parameters in an Orbax folder, read one by one, whatever devices they were saved from."""

import pathlib

from etils import epath
import numpy as np
from orbax.checkpoint import PyTreeCheckpointer, RestoreArgs, args

from maxtext_mudd.checkpoints import folder, tensors
from maxtext_mudd.config.errors import ConfigError, brief


def parameters(path: pathlib.Path) -> dict[str, tensors.Tensor]:
  """Those of a saved model or train state by path; only their headers are read.

  Raises:
    ConfigError: the folder is damaged, or holds no parameters of floating point.
  """
  checkpointer = PyTreeCheckpointer()
  try:
    tree, root = checkpointer.metadata(epath.Path(path)).item_metadata.tree, ()
  except Exception as error:  # Orbax raises all kinds
    raise _damaged(path, error) from error
  while isinstance(tree, dict) and isinstance(tree.get("params"), dict):
    tree, root = tree["params"], (*root, "params")
  if not isinstance(tree, dict) or not tree:
    raise ConfigError(f"{path} holds no parameters; name a folder that a model was saved to.")

  def tensor(name, like):
    if like.dtype not in tensors.DTYPES:
      known = ", ".join(map(str, tensors.DTYPES))
      raise ConfigError(f"{path}: {name} is of {like.dtype}; arrays of {known} can be read.")

    def read():
      keys = (*root, *name.split("/"))
      how = args.PyTreeRestore(
        item=_nested(keys, like), restore_args=_nested(keys, RestoreArgs(restore_type=np.ndarray)), partial_restore=True
      )
      try:
        found = checkpointer.restore(epath.Path(path), args=how)
      except Exception as error:  # Orbax raises all kinds
        raise _damaged(path, error) from error
      for key in keys:
        found = found[key]
      return found

    return tensors.Tensor(path, tuple(like.shape), np.dtype(like.dtype), read)

  return {name: tensor(name, like) for name, like in folder.by_path(tree).items()}


def _nested(keys: tuple[str, ...], leaf):
  for key in reversed(keys):
    leaf = {key: leaf}
  return leaf


def _damaged(path: pathlib.Path, error: Exception) -> ConfigError:
  return ConfigError(f"{path} cannot be read; it is damaged, or not a checkpoint of MaxText ({brief(error)}).")
