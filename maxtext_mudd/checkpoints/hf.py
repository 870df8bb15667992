"""Released models from Hugging Face folders.

One tensor is read at a time, so that the host holds the model once, in the dtype that it is converted to.
"""

from collections.abc import Callable, Iterator, Mapping
import json
import pathlib
import re
from typing import Any

import numpy as np
import tqdm

from maxtext_mudd.checkpoints import folder, hf_config, hf_names, layout, tensors
from maxtext_mudd.checkpoints.hf_names import Name
from maxtext_mudd.checkpoints.tensors import Tensor
from maxtext_mudd.errors import ConfigError

CONFIG = "config.json"
ORIGINAL = "hf_config.json"  # in a converted folder


def is_folder(path: pathlib.Path) -> bool:
  return (path / CONFIG).exists() and any((path / name).exists() for name in (tensors.SINGLE, tensors.INDEX))


class Model:
  """A Hugging Face folder of which only headers have been read.

  Attributes:
    path: the folder.
    fields: its config.json.
    keys: MaxText's keys for the model, single layers.
  """

  def __init__(self, path: pathlib.Path):
    """Raises ConfigError for what is missing, damaged or not of a known kind."""
    self.path = path
    self.fields = _fields(path / CONFIG)
    self._tensors = tensors.open_folder(path)
    self.keys = hf_config.keys(self.fields, _ffn_widths(self._tensors), str(path / CONFIG))

  @property
  def size(self) -> int:
    """Of all tensors, in bytes."""
    return sum(tensor.size for tensor in self._tensors.values())

  def parameters(self, config, progress: Callable[[int], None] = lambda size: None) -> Iterator[tuple[str, np.ndarray]]:
    """By MaxText's paths, in the layout of the configuration, in the dtype of the file.

    Args:
      progress: called with the bytes of each tensor read.

    Raises:
      ConfigError: a tensor is missing, not of this model, or of another shape, which is known before one is read; one
        is not finite.
    """
    known = {name.path: name for name in hf_names.names(config)}
    _check(self._tensors, known.values(), self.path)
    values = _Values(self._tensors, known, progress)
    return layout.stacking(values, config) if config.scan_layers else iter(values.items())


def from_hf(source: pathlib.Path, target: pathlib.Path, overrides: Mapping[str, Any]) -> None:
  """Writes the folder `target` (see `folder`) with the model of a Hugging Face folder.

  Args:
    overrides: MaxText's keys, as `scan_layers` or `weight_dtype`; they go into the YAML.

  Raises:
    ConfigError: as `Model`; the target exists or cannot be written. Nothing is left behind then.
  """
  model = Model(source)
  keys = folder.layout_keys({**model.keys, "scan_layers": False, "weight_dtype": "float32", **overrides})
  config = folder.configuration(keys, folder.HERE)
  with folder.staged(target) as stage, tqdm.tqdm(total=model.size, unit="B", unit_scale=True, desc=source.name) as bar:
    parameters = folder.tree(config, model.parameters(config, bar.update), str(source))
    folder.save(stage, config, parameters, keys)
    (stage / ORIGINAL).write_text(json.dumps(model.fields, indent=2))


def to_hf(source: pathlib.Path, target: pathlib.Path) -> None:
  """Writes a Hugging Face folder with the model of a folder that `from_hf` made.

  Raises:
    ConfigError: the source is not such a folder, or damaged; the authors' code has no such model; the target exists or
      cannot be written. Nothing is left behind then.
  """
  if not folder.is_folder(source):
    raise ConfigError(f"{source} has no {folder.CONFIG}; name a folder that from-hf made.")
  config = folder.configuration(folder.keys(source), folder.HERE)
  fields = hf_config.fields(config)
  if (source / ORIGINAL).exists():
    fields |= _fields(source / ORIGINAL)
  values = folder.restore(source, config)
  try:
    values = layout.unstack(values, config) if config.scan_layers else values
  except ValueError as error:
    raise ConfigError(f"{source} is not of the model that its {folder.CONFIG} describes: {error}.") from None
  known = list(hf_names.names(config))
  missing = [name.path for name in known if name.path not in values]
  if missing:
    raise ConfigError(f"{source} has no {missing[0]}, which its {folder.CONFIG} makes one expect.")
  with folder.staged(target) as stage:
    tensors.write(
      stage, {name.tensor: (name.tensor_shape, _tensor(name, values)) for name in known}, fields["torch_dtype"]
    )
    (stage / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True))


def _tensor(name: Name, values: Mapping[str, np.ndarray]) -> Callable[[], np.ndarray]:
  return lambda: name.to_hf(values[name.path])


class _Values(Mapping):
  """Parameters of single layers by path, each read when it is looked up."""

  def __init__(self, found: Mapping[str, Tensor], known: Mapping[str, Name], progress: Callable[[int], None]):
    self._tensors, self._names, self._progress = found, known, progress

  def __iter__(self):
    return iter(self._names)

  def __len__(self):
    return len(self._names)

  def __getitem__(self, path: str) -> np.ndarray:
    name = self._names[path]
    tensor = self._tensors[name.tensor]
    value = tensor.read()
    if not np.isfinite(value).all():
      raise ConfigError(f"{tensor.file}: {name.tensor} has entries that are NaN or infinite; the model is broken.")
    self._progress(value.nbytes)
    return name.to_maxtext(value)


def _fields(file: pathlib.Path) -> dict[str, Any]:
  try:
    fields = json.loads(file.read_text())
  except OSError as error:
    raise ConfigError(f"{file} cannot be read ({error.strerror}); name a Hugging Face folder of a model.") from error
  except ValueError as error:
    raise ConfigError(f"{file} is not JSON ({error}); copy it again.") from error
  if not isinstance(fields, dict):
    raise ConfigError(f"{file} does not hold the fields of a model; copy it again.")
  return fields


def _ffn_widths(found: Mapping[str, Tensor]) -> list[int]:
  widths = {}
  for name, tensor in found.items():
    if layer := re.fullmatch(r"layers\.(\d+)\.feed_forward\.w1\.weight", name):
      widths[int(layer[1])] = tensor.shape[0]
  return [widths[i] for i in sorted(widths)]


def _check(found: Mapping[str, Tensor], known, path: pathlib.Path) -> None:
  wanted = {name.tensor: name for name in known}
  if missing := [tensor for tensor in wanted if tensor not in found]:
    raise ConfigError(f"{path} has no tensor {missing[0]}, which {CONFIG} makes one expect.")
  if extra := [tensor for tensor in found if tensor not in wanted]:
    raise ConfigError(
      f"{found[extra[0]].file} has {extra[0]}, which is no tensor of the model that {CONFIG} describes."
    )
  for tensor, name in wanted.items():
    if found[tensor].shape != name.tensor_shape:
      shapes = f"{list(found[tensor].shape)}, and {CONFIG} makes one expect {list(name.tensor_shape)}"
      raise ConfigError(f"{found[tensor].file}: {tensor} is {shapes}.")
