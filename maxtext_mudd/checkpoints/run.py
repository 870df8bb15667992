"""What a training run saved, as a folder with a model of its own."""

from collections.abc import Mapping
import pathlib
from typing import Any

from maxtext.configs import pyconfig
import tqdm

from maxtext_mudd.checkpoints import folder, model_keys, parameters, tensors, tokenizers
from maxtext_mudd.checkpoints import orbax_folder as saved
from maxtext_mudd.config.errors import ConfigError

# Models whose layers read the name itself, which a folder does not hold: its keys would be checked against those of
# MaxText's file of that name.
_READ_BY_NAME = ("deepseek3", "deepseek4", "kimi-k2", "olmo3", "llama4", "qwen3-omni")


def from_run(checkpoint: pathlib.Path, target: pathlib.Path, config_file: str, overrides: Mapping[str, Any]) -> None:
  """Writes the folder `target` with the parameters of a checkpoint and the keys of its model.

  Args:
    checkpoint: OUTPUT/RUN/checkpoints/STEP, or the tree in it.
    config_file, overrides: what the run was started with.

  Raises:
    ConfigError: the checkpoint is damaged, or not of this configuration; the target exists or cannot be written.
      Nothing is left behind then.
  """
  path = checkpoint / folder.ITEMS if (checkpoint / folder.ITEMS).is_dir() else checkpoint
  if not path.is_dir():
    raise ConfigError(f"{path}: there is no such folder; name a checkpoint, as OUTPUT/RUN/checkpoints/STEP.")
  found = saved.parameters(path)
  scanned = any(name.startswith("decoder/layers/") for name in found)
  _check_layout(path, scanned, overrides.get("scan_layers", scanned))  # before it makes keys that do not fit
  config = pyconfig.initialize(["", config_file], **{**overrides, **folder.here()})
  _check_layout(path, scanned, config.scan_layers)
  parameters.check({name: x.shape for name, x in found.items()}, folder.parameter_shapes(config), str(path))
  keys = _keys(config) | tokenizers.of_run(config, target.absolute() / folder.TOKENIZER)
  size = sum(x.size for x in found.values())
  with folder.staged(target) as stage, tqdm.tqdm(total=size, unit="B", unit_scale=True, desc=str(checkpoint)) as bar:
    values = tensors.Lazy({name: x.read for name, x in found.items()}, bar.update)
    folder.save(stage, config, folder.tree(config, values.items(), path), keys)
    tokenizers.copy_of_run(config, stage / folder.TOKENIZER)


def _check_layout(path: pathlib.Path, scanned: bool, wanted: bool) -> None:
  if scanned != wanted:
    kind = "scanned" if scanned else "single"
    raise ConfigError(
      f"scan_layers={wanted}: {path} has {kind} layers, which from-run leaves as they are; "
      f"set scan_layers={str(scanned).lower()}, or convert the run first (layout)."
    )


def _keys(config) -> dict[str, Any]:
  """Those that make the model, where they are not MaxText's defaults."""
  name = config.model_name
  if name.startswith(_READ_BY_NAME):
    raise ConfigError(f"model_name={name}: its layers read this name, which a model folder cannot hold.")
  found, defaults = (x.get_keys() for x in (config, folder.configuration(folder.here())))
  own = {key: model_keys.plain(found[key]) for key in sorted(model_keys.KEYS) if found[key] != defaults[key]}
  if name.startswith("llama3.1"):  # which makes its rotary embedding
    own["rope_type"] = "llama3.1"
  if config.moba:  # which no other attention has
    own["attention"] = config.attention
  own |= {"scan_layers": config.scan_layers, "enable_dropout": False}  # the layout, default or not
  again = folder.configuration(own | folder.here()).get_keys()
  for key in sorted(model_keys.FUNCTION - own.keys()):
    if again[key] != found[key]:
      raise ConfigError(f"{key}={found[key]} does not go into a model folder: MaxText would read {again[key]} from it.")
  return own
