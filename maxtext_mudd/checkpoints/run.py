"""Converts a checkpoint of a training run to a model folder."""

from collections.abc import Callable, Iterable, Mapping
import functools
import pathlib
from typing import Any

from maxtext.configs import pyconfig
import numpy as np
import tqdm

from maxtext_mudd.blocks import stacks
from maxtext_mudd.checkpoints import (
  adapters,
  layout,
  model_config,
  model_folder,
  model_keys,
  orbax_folder,
  parameters,
  tensors,
  tokenizers,
)
from maxtext_mudd.checkpoints.staging import staged
from maxtext_mudd.config.errors import ConfigError

# Beginnings of `model_name` whose layers read this key. A model folder cannot keep the key: MaxText would check the
# folder's keys against its own configuration file of that name.
_READ_BY_NAME = ("deepseek3", "deepseek4", "gemma3", "gemma4", "kimi-k2", "olmo3", "llama4", "qwen3-omni")


def from_run(checkpoint: pathlib.Path, target: pathlib.Path, config_file: str, overrides: Mapping[str, Any]) -> None:
  """Writes the model folder `target` with the parameters of a checkpoint and the keys of its model.

  A checkpoint of an adapter (LoRA) is merged into the model of `load_parameters_path`.

  Args:
    checkpoint: OUTPUT/RUN/checkpoints/STEP, or the folder of parameters in it.
    config_file: the configuration file that the run was started with.
    overrides: the keys that the run was started with.

  Raises:
    ConfigError: the checkpoint is damaged or does not fit this configuration, or the target exists or cannot be
      written. Then nothing is left behind.
  """
  path = items_of(checkpoint)
  saved = orbax_folder.parameters(path)
  adapter = adapters.of(saved)
  scanned = is_scanned(adapter or saved)
  of_stages = any(stacks.is_of_stages(name.split("/")) for name in saved)
  if not of_stages:
    _check_layout(path, scanned, overrides.get("scan_layers", scanned))  # before MaxText checks other keys against it
  config = pyconfig.initialize(["", config_file], **{**overrides, **model_config.local_keys()})
  if not of_stages:
    _check_layout(path, scanned, config.scan_layers)
  if adapter:
    saved = adapters.merged(adapter, config, path)
  shapes = {name: x.shape for name, x in saved.items()}
  trained = layout.of_shapes(config, shapes) if of_stages else config
  parameters.check(shapes, model_config.parameter_shapes(trained), str(path))
  keys = folder_keys(config)
  if reason := why_not_in_folder(config, keys):
    raise ConfigError(f"{reason}; use load_parameters_path={path} with the keys of the run instead.")
  arrange = functools.partial(_from_stages, trained=trained, config=config) if of_stages else Mapping.items
  write(path, saved, config, target, keys, arrange)


def _from_stages(values: Mapping[str, np.ndarray], trained, config) -> Iterable[tuple[str, np.ndarray]]:
  """Parameters of the stages of a pipeline as those of single or scanned layers, as `scan_layers` says.

  Args:
    trained: the configuration in the layout of the values.
    config: in that of the result.
  """
  singles = layout.unstack(values, trained)
  return layout.stacking(singles, config) if config.scan_layers else singles.items()


def items_of(checkpoint: pathlib.Path) -> pathlib.Path:
  """The folder with the parameters of a checkpoint. Raises ConfigError if there is no such folder."""
  path = pathlib.Path(str(parameters.items_folder(str(checkpoint))))
  if not path.is_dir():
    raise ConfigError(f"{path}: there is no such folder; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP.")
  return path


def is_scanned(paths: Iterable[str]) -> bool:
  """Whether these paths of parameters, or of a train state, are of scanned layers."""
  return any(stacks.is_stacked(path.split("/")) for path in paths)


def write(
  path: pathlib.Path,
  saved: Mapping[str, tensors.Tensor],
  config,
  target: pathlib.Path,
  keys: Mapping[str, Any] | None,
  arrange: Callable[[Mapping[str, np.ndarray]], Iterable[tuple[str, np.ndarray]]] = Mapping.items,
) -> None:
  """Writes the model folder `target` with saved parameters, the keys of their model and its tokenizer.

  Args:
    path: the folder of the parameters, for messages.
    saved: the parameters by path.
    keys: those of `folder_keys`; None: the folder gets the parameters only.
    arrange: the parameters of the new model as (path, value), from those in `saved`, which are read when looked up;
      default: the same.

  Raises:
    ConfigError: as `from_run`.
  """
  if keys is not None:
    keys = {**keys, **tokenizers.run_keys(config, target.absolute() / model_folder.TOKENIZER)}
  size = sum(tensor.size for tensor in saved.values())
  with staged(target) as stage, tqdm.tqdm(total=size, unit="B", unit_scale=True, desc=str(path)) as bar:
    values = tensors.LazyArrays({name: tensor.read for name, tensor in saved.items()}, bar.update)
    model_folder.save(stage, config, model_folder.check_parameters(config, arrange(values), path), keys)
    if keys is not None:
      tokenizers.copy_run_tokenizer(config, stage / model_folder.TOKENIZER)


def _check_layout(path: pathlib.Path, scanned: bool, configured: bool) -> None:
  if scanned != configured:
    layout = "scanned" if scanned else "single"
    raise ConfigError(
      f"scan_layers={configured}: {path} has {layout} layers, and from-run keeps the layout; "
      f"set scan_layers={str(scanned).lower()}, or convert the run first (layout)."
    )


def folder_keys(config) -> dict[str, Any]:
  """The keys that describe the model and whose values differ from MaxText's defaults."""
  values, defaults = (x.get_keys() for x in (config, model_config.build(model_config.local_keys())))
  keys = {key: model_keys.plain(values[key]) for key in sorted(model_keys.KEYS) if values[key] != defaults[key]}
  if config.model_name.startswith("llama3.1"):  # MaxText chooses Llama 3.1's rotary embedding by this name
    keys["rope_type"] = "llama3.1"
  if config.moba or config.use_indexer:  # other attentions ignore the first, and MaxText refuses them with the second
    keys["attention"] = config.attention
  return keys | {"scan_layers": config.scan_layers, "enable_dropout": False}  # stated even where they are the defaults


def why_not_in_folder(config, keys: Mapping[str, Any]) -> str | None:
  """Why MaxText would not build the model of a configuration from these keys; None: it would."""
  name = config.model_name
  if name.startswith(_READ_BY_NAME):
    return f"model_name={name}: its layers read this name, which a model folder cannot hold"
  values, restored = config.get_keys(), model_config.build({**keys, **model_config.local_keys()}).get_keys()
  for key in sorted(model_keys.FUNCTION - keys.keys()):
    if restored[key] != values[key]:
      return f"{key}={values[key]} cannot be kept in a model folder: MaxText would read {restored[key]} from it"
  return None
