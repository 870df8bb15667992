"""What a training run saved, as a folder with a model of its own."""

from collections.abc import Mapping
import pathlib
from typing import Any

import jax
from maxtext.configs import pyconfig, types
import numpy as np
from orbax.checkpoint import PyTreeCheckpointer, RestoreArgs
from orbax.checkpoint import args as ocp_args

from maxtext_mudd.checkpoints import folder, parameters, tokenizers
from maxtext_mudd.config import MuddConfig
from maxtext_mudd.errors import ConfigError, brief

# MaxText's groups of keys that make a model, of which the kernel of its attention is a matter of the device.
_GROUPS = (
  types.ModelArchitecture,
  types.MTP,
  types.LogitsAndLoss,
  types.Attention,
  types.Llama4Attention,
  types.MoEGeneral,
  types.PositionalEmbedding,
  types.Rope,
  types.YarnRope,
)
_KEYS = {key for group in _GROUPS for key in group.__annotations__} - {"attention"}
_KEYS |= {"scan_layers", "param_scan_axis", "vocab_size", "max_target_length", "add_bos", "weight_dtype"}
_KEYS |= {"tokenizer_path", "tokenizer_type"} | (
  MuddConfig.model_fields.keys() - types.MaxTextConfig.model_fields.keys()
)


def from_run(checkpoint: pathlib.Path, target: pathlib.Path, config_file: str, overrides: Mapping[str, Any]) -> None:
  """Writes the folder `target` with the parameters of a checkpoint and the keys of its model.

  Args:
    checkpoint: OUTPUT/RUN/checkpoints/STEP, or the tree in it.
    config_file, overrides: what the run was started with.

  Raises:
    ConfigError: the checkpoint is damaged, or not of this configuration; the target exists or cannot be written.
      Nothing is left behind then.
  """
  config = pyconfig.initialize(["", config_file], **{**overrides, **folder.here()})
  path = checkpoint / folder.ITEMS if (checkpoint / folder.ITEMS).is_dir() else checkpoint
  found = parameters.shapes(str(path))
  if not found:
    raise ConfigError(f"{path} is no checkpoint with parameters; name one, as OUTPUT/RUN/checkpoints/STEP.")
  parameters.check(found, folder.parameter_shapes(config), str(path))
  keys, tokenizer = _keys(config) | {"enable_dropout": False}, pathlib.Path(config.tokenizer_path or "")
  if tokenizers.keys(tokenizer):
    keys |= {"tokenizer_path": str(target.absolute() / folder.TOKENIZER), "tokenizer_type": "huggingface"}
  with folder.staged(target) as stage:
    folder.save(stage, config, folder.tree(config, _restored(path).items(), path), keys)
    tokenizers.copy(tokenizer, stage / folder.TOKENIZER)


def _keys(config) -> dict[str, Any]:
  """Those that make the model, where they are not MaxText's defaults."""
  found, defaults = (x.get_keys() for x in (config, folder.configuration(folder.here())))
  return {key: _plain(found[key]) for key in sorted(_KEYS & found.keys()) if found[key] != defaults.get(key)}


def _plain(value):
  value = getattr(value, "value", value)  # of an enumeration
  return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def _restored(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The parameters, and nothing else, on this host."""
  checkpointer = PyTreeCheckpointer()
  try:
    saved = {"params": checkpointer.metadata(path).item_metadata.tree["params"]}
    numpy = jax.tree.map(lambda _: RestoreArgs(restore_type=np.ndarray), saved, is_leaf=lambda x: hasattr(x, "dtype"))
    request = ocp_args.PyTreeRestore(item=saved, restore_args=numpy, partial_restore=True)
    return folder.by_path(checkpointer.restore(path, args=request)["params"]["params"])
  except Exception as error:  # Orbax raises all kinds
    raise ConfigError(f"{path} cannot be read; it is damaged ({brief(error)}).") from error
