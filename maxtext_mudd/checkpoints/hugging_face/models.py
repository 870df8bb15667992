"""Released models from Hugging Face folders.

One tensor is read at a time: the host holds the model once, in the dtype that it is converted to, or, on the way back,
a shard.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import json
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm

from maxtext_mudd.checkpoints import ffn_widths as ffn
from maxtext_mudd.checkpoints import folder, layout, tensors, tokenizers
from maxtext_mudd.checkpoints import orbax_folder as saved
from maxtext_mudd.checkpoints.hugging_face import config_json as hf_config
from maxtext_mudd.checkpoints.hugging_face import files as hf_files
from maxtext_mudd.checkpoints.hugging_face import names as hf_names
from maxtext_mudd.checkpoints.hugging_face import remote_code
from maxtext_mudd.checkpoints.hugging_face.names import Name
from maxtext_mudd.checkpoints.tensors import Tensor
from maxtext_mudd.config.errors import ConfigError

CONFIG = "config.json"
ORIGINAL = "hf_config.json"  # in a converted folder


def is_folder(path: pathlib.Path) -> bool:
  return any((path / name).exists() for name in (CONFIG, *hf_files.FILES))


class Model:
  """A `folder.Source`: MUDDFormer or MUDDPythia as published.

  Attributes:
    fields: of config.json.
    dtypes: of the tensors, by name.
  """

  def __init__(self, path: pathlib.Path):
    """Raises ConfigError for what is missing, damaged or not of a known kind."""
    self.path = path
    self.fields = read_fields(path / CONFIG)
    self._tensors = hf_files.open_folder(path)
    self.keys = hf_config.keys(self.fields, _ffn_widths(self._tensors), str(path / CONFIG))
    self.ffn_widths = ffn.of_keys(self.keys)
    self.size = sum(tensor.size for tensor in self._tensors.values())
    self.dtypes = {name: tensor.dtype.name for name, tensor in self._tensors.items()}

  def parameters(self, config, progress: Callable[[int], None] = lambda size: None) -> Iterator[tuple[str, np.ndarray]]:
    """Raises ConfigError where a tensor is missing, not of this model, or of another shape, before one is read."""
    known = {name.path: name for name in hf_names.names(config)}
    _check(self._tensors, known.values(), self.path)
    values = tensors.Lazy({path: functools.partial(self._read, name) for path, name in known.items()}, progress)
    return layout.stacking(values, config) if config.scan_layers else iter(values.items())

  def _read(self, name: Name) -> np.ndarray:
    tensor = self._tensors[name.tensor]
    return name.to_maxtext(tensors.cast(tensor.read(), tensor.dtype, f"{tensor.file}: {name.tensor}"))


def from_hf(source: pathlib.Path, target: pathlib.Path, overrides: Mapping[str, Any]) -> None:
  """`folder.convert` of a Hugging Face folder."""
  model = Model(source)
  original = json.dumps({"fields": model.fields, "dtypes": model.dtypes}, indent=2)
  folder.convert(model, target, overrides, {ORIGINAL: original})


def to_hf(source: pathlib.Path, target: pathlib.Path) -> None:
  """Writes a Hugging Face folder with the model of a folder that `convert` made.

  Raises:
    ConfigError: the source is not such a folder, or damaged; the authors' code has no such model; the target exists or
      cannot be written. Nothing is left behind then.
  """
  if not folder.is_folder(source):
    raise ConfigError(f"{source} has no {folder.CONFIG}; name a folder that from-hf or from-run made.")
  config = folder.configuration(folder.keys(source) | folder.here())
  original = read_fields(source / ORIGINAL) if (source / ORIGINAL).exists() else {}
  fields = hf_config.fields(config, original.get("fields", {}))
  with folder.staged(target) as stage:
    found = saved.parameters(source / folder.ITEMS)
    try:
      found = _single_layers(found, config) if config.scan_layers else found
    except ValueError as error:
      raise ConfigError(f"{source} is not of the model that its {folder.CONFIG} describes: {error}.") from None
    names, dtypes = sorted(hf_names.names(config), key=_by_kind), original.get("dtypes", {})
    _check_parameters(found, names, source)
    with tqdm.tqdm(total=sum(x.size for x in found.values()), unit="B", unit_scale=True, desc=source.name) as bar:
      made = {}
      for name in names:
        dtype = jnp.dtype(dtypes.get(name.tensor, config.weight_dtype))
        made[name.tensor] = name.tensor_shape, dtype, functools.partial(_read, found[name.path], name, bar.update)
      tensors.write(stage, made)
    (stage / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True))
    tokenizers.copy(source / folder.TOKENIZER, stage)
    remote_code.copy(source / remote_code.FOLDER, stage)


def _by_kind(name: Name) -> str:
  """Layers of one parameter together: where they were scanned, they are one array, which is read once for all."""
  return re.sub(r"layers_\d+", "layers", name.path)


def _single_layers(found: Mapping[str, Tensor], config) -> dict[str, Tensor]:
  """Of scanned ones; the array that was read last is kept. Raises ValueError as `layout.unstack`."""

  @functools.lru_cache(maxsize=1)
  def unstacked(path):
    return layout.unstack({path: found[path].read()}, config)

  def tensor(path, name, like):
    return Tensor(found[path].file, like.shape, like.dtype, lambda: unstacked(path)[name].copy())

  made = {}
  for path, x in found.items():
    likes = layout.unstack({path: np.broadcast_to(np.zeros((), x.dtype), x.shape)}, config)  # no memory is taken
    made |= {name: tensor(path, name, like) for name, like in likes.items()}
  return made


def _check_parameters(values: Mapping[str, Tensor], names: Sequence[Name], path: pathlib.Path) -> None:
  for name in names:
    if name.path not in values or values[name.path].shape != name.shape:
      wanted = f"{name.path} of {list(name.shape)}"
      raise ConfigError(f"{path} has no {wanted}, which its {folder.CONFIG} makes one expect.")
  if extra := values.keys() - {name.path for name in names}:
    raise ConfigError(f"{path} has {min(extra)}, for which the model of its {folder.CONFIG} has no place.")


def _read(tensor: Tensor, name: Name, progress: Callable[[int], None]) -> np.ndarray:
  progress(tensor.size)
  return name.to_hf(tensor.read())


def read_fields(file: pathlib.Path) -> dict[str, Any]:
  """Of a JSON file. Raises ConfigError."""
  try:
    fields = json.loads(file.read_text())
  except OSError as error:
    raise ConfigError(f"{file} cannot be read ({error.strerror}); name a Hugging Face folder of a model.") from error
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{file} is not JSON ({error}); copy it again.") from error
  if not isinstance(fields, dict):
    raise ConfigError(f"{file} does not hold the fields of a model; copy it again.")
  return fields


def _ffn_widths(found: Mapping[str, Tensor]) -> tuple[int | None, ...]:
  """By layer, of those that have any tensor; None where that of the FFN is missing, or no matrix."""
  layers = {layer[1] for name in found if (layer := re.match(r"layers\.(\d+)\.", name))}
  kernels = [found.get(f"layers.{i}.feed_forward.w1.weight") for i in range(len(layers))]
  return tuple(x.shape[0] if x and len(x.shape) == 2 else None for x in kernels)


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
