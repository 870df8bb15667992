"""Converts models from Hugging Face folders to model folders, and back.

A folder has the format of the authors' PyTorch code, or that of this project's (`native.py`), which to-hf writes.

Tensors are read one at a time. A conversion to a model folder holds the whole model in host memory once, in the dtype
of the model folder. A conversion to a Hugging Face folder holds one shard in memory, and the array of experts that
parts of it come from.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
import json
import pathlib
import re
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm

from maxtext_mudd.checkpoints import (
  layout,
  model_config,
  model_folder,
  orbax_folder,
  released_ffn,
  tensors,
  tokenizers,
)
from maxtext_mudd.checkpoints.hugging_face import config_json, native, remote_code
from maxtext_mudd.checkpoints.hugging_face import files as hf_files
from maxtext_mudd.checkpoints.hugging_face import names as hf_names
from maxtext_mudd.checkpoints.hugging_face.names import Name
from maxtext_mudd.checkpoints.staging import staged
from maxtext_mudd.checkpoints.tensors import Tensor
from maxtext_mudd.config.errors import ConfigError

CONFIG = "config.json"
ORIGINAL = "hf_config.json"  # file of a model folder with config.json and the dtypes of the Hugging Face folder


def is_folder(path: pathlib.Path) -> bool:
  return any((path / name).exists() for name in (CONFIG, *hf_files.FILES))


class Model:
  """A `model_folder.Source` that reads a Hugging Face folder of either format.

  Attributes:
    fields: the fields of config.json.
    is_native: whether the folder has this project's format.
    dtypes: the dtype of each tensor, by name.
  """

  def __init__(self, path: pathlib.Path):
    """Reads config.json and the headers of the tensors.

    Raises:
      ConfigError: a file is missing or damaged, or the model is none of those that the formats have.
    """
    self.path = path
    self.fields = read_fields(path / CONFIG)
    self._tensors = hf_files.open_folder(path)
    self.is_native = self.fields.get("model_type") == native.MODEL_TYPE
    if self.is_native:
      self.keys, self.ffn_widths = native.read(self.fields, str(path / CONFIG))
    else:
      self.keys = config_json.keys(self.fields, _ffn_widths(self._tensors), str(path / CONFIG))
      self.ffn_widths = released_ffn.from_keys(self.keys)
    self.size = sum(tensor.size for tensor in self._tensors.values())
    self.dtypes = {name: tensor.dtype.name for name, tensor in self._tensors.items()}

  def parameters(self, config, progress: Callable[[int], None] = lambda size: None) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the parameters, as `model_folder.Source.parameters` says.

    Raises:
      ConfigError: a tensor is missing, is not one of this model, or has another shape. Then no values were read.
    """
    names = tuple((native if self.is_native else hf_names).names(config))
    _check_tensors(self._tensors, names, self.path)
    by_path: dict[str, list[Name]] = {}
    for name in names:
      by_path.setdefault(name.path, []).append(name)
    readers = {path: functools.partial(self._read, parts) for path, parts in by_path.items()}
    values = tensors.LazyArrays(readers, progress)
    return layout.stacking(values, config) if config.scan_layers else iter(values.items())

  def _read(self, names: Sequence[Name]) -> np.ndarray:
    """A parameter, from its tensor or from those of its experts."""
    values = []
    for name in names:
      tensor = self._tensors[name.tensor]
      values.append(name.to_maxtext(tensors.cast(tensor.read(), tensor.dtype, f"{tensor.file}: {name.tensor}")))
    return values[0] if names[0].expert is None else np.stack(values)


def from_hf(source: pathlib.Path, target: pathlib.Path, overrides: Mapping[str, Any]) -> None:
  """Converts a Hugging Face folder to a model folder, as `model_folder.convert` says."""
  model = Model(source)
  original = json.dumps({"fields": model.fields, "dtypes": model.dtypes}, indent=2)
  model_folder.convert(model, target, overrides, {} if model.is_native else {ORIGINAL: original})


def to_hf(source: pathlib.Path, target: pathlib.Path, released: bool = False) -> None:
  """Writes the Hugging Face folder `target` with the model of the model folder `source`.

  Args:
    released: whether it gets the format of the authors' code in place of this project's.

  Raises:
    ConfigError: the source is no model folder or is damaged, the code of the format has no such model, or the target
      exists or cannot be written. Then nothing is left behind.
  """
  if not model_folder.is_model_folder(source):
    raise ConfigError(f"{source} has no {model_folder.CONFIG}; name a folder that from-hf or from-run made.")
  model_keys = model_folder.read_keys(source)
  config = model_config.build(model_keys | model_config.local_keys())
  original = read_fields(source / ORIGINAL) if (source / ORIGINAL).exists() else {}
  if released:
    fields, dtypes = config_json.fields(config, original.get("fields", {})), original.get("dtypes", {})
  else:
    of_tokenizer = original.get("fields", {}) | tokenizers.config_fields(source / model_folder.TOKENIZER)
    fields, dtypes = native.fields(config, model_keys, of_tokenizer), {}
  with staged(target) as stage:
    saved = orbax_folder.parameters(source / model_folder.ITEMS)
    try:
      saved = _single_layers(saved, config) if config.scan_layers else saved
    except ValueError as error:
      raise ConfigError(f"{source} is not of the model that its {model_folder.CONFIG} describes: {error}.") from None
    names = sorted((hf_names if released else native).names(config), key=_without_layer)
    _check_saved(saved, names, source)
    size = sum(tensor.size for tensor in saved.values())
    with tqdm.tqdm(total=size, unit="B", unit_scale=True, desc=source.name) as bar:
      outputs, read = {}, _reader(saved)
      for name in names:
        dtype = jnp.dtype(dtypes.get(name.tensor, config.weight_dtype))
        values = functools.partial(_read_saved, read, name, bar.update)
        outputs[name.tensor] = tensors.Output(name.tensor_shape, dtype, values)
      tensors.write(stage, outputs)
    (stage / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True))
    if released:
      tokenizers.copy(source / model_folder.TOKENIZER, stage)
      remote_code.copy(source / remote_code.FOLDER, stage)
    else:
      tokenizers.export(source / model_folder.TOKENIZER, stage)
      native.copy_code(stage)


def re_export(source: pathlib.Path, target: pathlib.Path) -> None:
  """Writes the Hugging Face folder `target` in this project's format with the model of the folder `source`.

  Raises:
    ConfigError: as `from_hf` and `to_hf`. Then nothing is left behind.
  """
  with staged(target) as stage:
    made, exported = stage / "maxtext" / source.name, stage / "exported"  # progress bars show the name of the source
    from_hf(source, made, {})
    try:
      to_hf(made, exported)
    except ConfigError as error:
      raise ConfigError(str(error).replace(str(made), str(source))) from None
    shutil.rmtree(made.parent)
    for file in exported.iterdir():
      file.rename(stage / file.name)
    exported.rmdir()


def _without_layer(name: Name) -> str:
  """A sort key that puts the layers of a parameter together, so that an array of scanned layers is read once."""
  return re.sub(r"layers_\d+", "layers", name.path)


def _single_layers(scanned: Mapping[str, Tensor], config) -> dict[str, Tensor]:
  """The tensors of single layers, from those of scanned layers. Only the array that was read last stays in memory.

  Raises:
    ValueError: as `layout.unstack`.
  """

  last = {}

  def unstacked(path):
    if path not in last:
      last.clear()  # before the next array is read: a cache would hold both meanwhile
      last[path] = layout.unstack({path: scanned[path].read()}, config)
    return last[path]

  def tensor(path, name, like):
    return Tensor(scanned[path].file, like.shape, like.dtype, lambda: unstacked(path)[name].copy())

  single = {}
  for path, x in scanned.items():
    placeholder = np.broadcast_to(np.zeros((), x.dtype), x.shape)  # has the shape, and takes no memory
    single |= {name: tensor(path, name, like) for name, like in layout.unstack({path: placeholder}, config).items()}
  return single


def _check_saved(saved: Mapping[str, Tensor], names: Sequence[Name], path: pathlib.Path) -> None:
  """Raises ConfigError unless the saved parameters are those of the model in model.yml."""
  for name in names:
    if name.path not in saved or saved[name.path].shape != name.shape:
      needed = f"{name.path} of {list(name.shape)}"
      raise ConfigError(f"{path} has no {needed}, which the model that its {model_folder.CONFIG} describes needs.")
  if extra := saved.keys() - {name.path for name in names}:
    raise ConfigError(
      f"{path} has {min(extra)}, which the model that its {model_folder.CONFIG} describes does not have."
    )


def _reader(saved: Mapping[str, Tensor]) -> Callable[[Name], np.ndarray]:
  """A function that reads the parameter of a tensor. It keeps the last one of experts, which as many tensors need."""
  last: dict[str, np.ndarray] = {}

  def read(name):
    if name.path in last:
      return last[name.path]
    last.clear()
    value = saved[name.path].read()
    if name.expert is not None:
      last[name.path] = value
    return value

  return read


def _read_saved(read: Callable[[Name], np.ndarray], name: Name, progress: Callable[[int], None]) -> np.ndarray:
  value = name.to_hf(read(name))
  progress(value.nbytes)
  return value


def read_fields(file: pathlib.Path) -> dict[str, Any]:
  """The fields of a JSON file.

  Raises:
    ConfigError: the file cannot be read.
  """
  try:
    fields = json.loads(file.read_text())
  except OSError as error:
    raise ConfigError(f"{file} cannot be read ({error.strerror}); name a Hugging Face folder of a model.") from error
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{file} is not JSON ({error}); copy it again.") from error
  if not isinstance(fields, dict):
    raise ConfigError(f"{file} does not hold the fields of a model; copy it again.")
  return fields


def _ffn_widths(tensors_by_name: Mapping[str, Tensor]) -> tuple[int | None, ...]:
  """The FFN width of each layer that has any tensor; None where the first FFN kernel is missing or is not a matrix."""
  layers = {match[1] for name in tensors_by_name if (match := re.match(r"layers\.(\d+)\.", name))}
  kernels = [tensors_by_name.get(f"layers.{i}.feed_forward.w1.weight") for i in range(len(layers))]
  return tuple(x.shape[0] if x and len(x.shape) == 2 else None for x in kernels)


def _check_tensors(tensors_by_name: Mapping[str, Tensor], names: Iterable[Name], path: pathlib.Path) -> None:
  """Raises ConfigError unless the tensors are those of the model in config.json."""
  expected = {name.tensor: name for name in names}
  if missing := [name for name in expected if name not in tensors_by_name]:
    raise ConfigError(f"{path} has no tensor {missing[0]}, which the model that {CONFIG} describes needs.")
  if extra := [name for name in tensors_by_name if name not in expected]:
    file = tensors_by_name[extra[0]].file
    raise ConfigError(f"{file} has {extra[0]}, which the model that {CONFIG} describes does not have.")
  for name, shape in ((name, x.tensor_shape) for name, x in expected.items()):
    tensor = tensors_by_name[name]
    if tensor.shape != shape:
      raise ConfigError(
        f"{tensor.file}: {name} is {list(tensor.shape)}, and the model that {CONFIG} describes needs {list(shape)}."
      )
