"""What a training run saved, as a folder with a model of its own."""

from collections.abc import Mapping
import pathlib
from typing import Any

from maxtext.configs import pyconfig, types
import tqdm

from maxtext_mudd.checkpoints import folder, parameters, saved, tensors, tokenizers
from maxtext_mudd.config import MuddConfig
from maxtext_mudd.errors import ConfigError

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
  if not path.is_dir():
    raise ConfigError(f"{path}: there is no such folder; name a checkpoint, as OUTPUT/RUN/checkpoints/STEP.")
  found = saved.parameters(path)
  parameters.check({name: x.shape for name, x in found.items()}, folder.parameter_shapes(config), str(path))
  keys, tokenizer = _keys(config) | {"enable_dropout": False}, pathlib.Path(config.tokenizer_path or "")
  if tokenizers.keys(tokenizer):
    keys |= {"tokenizer_path": str(target.absolute() / folder.TOKENIZER), "tokenizer_type": "huggingface"}
  size = sum(x.size for x in found.values())
  with folder.staged(target) as stage, tqdm.tqdm(total=size, unit="B", unit_scale=True, desc=str(checkpoint)) as bar:
    values = tensors.Lazy({name: x.read for name, x in found.items()}, bar.update)
    folder.save(stage, config, folder.tree(config, values.items(), path), keys)
    tokenizers.copy(tokenizer, stage / folder.TOKENIZER)


def _keys(config) -> dict[str, Any]:
  """Those that make the model, where they are not MaxText's defaults."""
  found, defaults = (x.get_keys() for x in (config, folder.configuration(folder.here())))
  own = {key: _plain(found[key]) for key in sorted(_KEYS & found.keys()) if found[key] != defaults.get(key)}
  return own | {"scan_layers": config.scan_layers}  # the layout of the parameters, default or not


def _plain(value):
  value = getattr(value, "value", value)  # of an enumeration
  return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value
