"""A folder with a converted model: a checkpoint of parameters as MaxText reads it, and the YAML that describes it.

M/model.yml    all keys of the model
M/items        load_parameters_path
M/tokenizer    tokenizer_path, where the source has one
M/remote_code  what a Hugging Face folder has of code and generation_config.json
"""

import atexit
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import os
import pathlib
import re
import threading
from typing import Any, Protocol

from etils import epath
from flax import nnx, traverse_util
import jax
from maxtext.common import checkpoint_context
from maxtext.configs import pyconfig
from maxtext.configs.types import MaxTextConfig
from maxtext.utils import maxtext_utils, model_creation_utils
import numpy as np
from orbax.checkpoint import PyTreeCheckpointer, RestoreArgs
from orbax.checkpoint import v1 as ocp
import tqdm
import yaml

from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.checkpoints import locks, model_keys, tensors, tokenizers
from maxtext_mudd.checkpoints.hugging_face import remote_code
from maxtext_mudd.checkpoints.model_keys import FREE
from maxtext_mudd.config.errors import ConfigError, brief
from maxtext_mudd.config.mudd_config import MuddConfig
from maxtext_mudd.interrupts import Interrupts

CONFIG, ITEMS, TOKENIZER = "model.yml", "items", "tokenizer"
BASE = "base.yml"  # MaxText's own
# Keys that one may give a folder: of the model, and some of what uses it.
CHOSEN = model_keys.KEYS - {"tokenizer_path", "tokenizer_type"}
CHOSEN |= {"attention", "dtype", "matmul_precision", "per_device_batch_size", "remat_policy"}
BYTES_AT_A_TIME = 64 * 2**20  # in flight to and from files, beside the largest array
SECONDS_TO_STOP = 60  # after an interrupt


def here() -> dict[str, Any]:
  """Keys for conversions, on the devices of this host, whatever mesh the model is for."""
  axes = [key for key in MaxTextConfig.model_fields if re.fullmatch(r"(ici|dcn)_\w+_parallelism", key)]
  keys = {"run_name": "", "log_config": False, "enable_checkpointing": False}
  keys |= {"skip_jax_distributed_system": True, "num_slices": 1}
  keys |= {"base_output_directory": "maxtext_output"}  # as MaxText takes it, with a warning; nothing goes there
  return keys | dict.fromkeys(axes, 1) | {"ici_fsdp_parallelism": -1}


def host() -> jax.Device:
  """Where parameters are put together. Raises ConfigError where JAX was not to have it."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError as error:
    found = jax.config.jax_platforms
    raise ConfigError(
      f"JAX_PLATFORMS={found} leaves out cpu, where parameters are put together; set JAX_PLATFORMS={found},cpu."
    ) from error


class Source(Protocol):
  """A model in another project's files, of which only headers have been read.

  Attributes:
    path: its folder.
    keys: MaxText's keys for it, single layers.
    ffn_widths: of its blocks.
    size: of all its parameters, in bytes.
  """

  path: pathlib.Path
  keys: dict[str, Any]
  ffn_widths: tuple[int, ...]
  size: int

  def parameters(self, config, progress: Callable[[int], None]) -> Iterator[tuple[str, np.ndarray]]:
    """By MaxText's paths, in the layout of the configuration, one read at a time; `progress` is told its bytes."""


def is_folder(folder: pathlib.Path) -> bool:
  return (folder / CONFIG).exists()


def keys(folder: pathlib.Path) -> dict[str, Any]:
  """Of the model in it. Raises ConfigError where the file is damaged."""
  try:
    found = yaml.safe_load((folder / CONFIG).read_text())
  except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
    raise ConfigError(f"{folder / CONFIG} cannot be read ({' '.join(str(error).split())}).") from error
  if not isinstance(found, dict):
    raise ConfigError(f"{folder / CONFIG} does not hold the keys of a model; convert it again.")
  return found | tokenizers.moved(found, folder / TOKENIZER)  # the folder may have been moved


def configuration(keys: Mapping[str, Any]):
  """MaxText's configuration of a model from its keys. Raises ConfigError."""
  base = pathlib.Path(pyconfig.__file__).parent / BASE
  return pyconfig.initialize(["", str(base)], **{key: x for key, x in keys.items() if key != "base_config"})


def with_overrides(
  keys: Mapping[str, Any], overrides: Mapping[str, Any], path: pathlib.Path, free=FREE
) -> dict[str, Any]:
  """Keys of a model with a user's beside them. Raises ConfigError where they would make it another model."""
  given = {key: value for key, value in overrides.items() if key not in free and key not in model_keys.HOW}
  unset = {key for key in given.keys() - keys.keys() if key in model_keys.FUNCTION}
  defaults = configuration({"scan_layers": False, **keys, **here()}) if unset else None
  own = {"base_config": BASE} | keys | {key: getattr(defaults, key) for key in unset if hasattr(defaults, key)}
  for key, value in given.items():
    has = model_keys.plain(own.get(key, value))
    if has != value:
      raise ConfigError(f"{key}={value}: the model in {path} has {key}={has}; leave it out.")
  return {**keys, **overrides}


def source_keys(source: Source, overrides: Mapping[str, Any]) -> dict[str, Any]:
  """All keys for a model of another project. Where re-allocated FFNs are to be scanned, each width gets its own group,
  so that none is averaged.

  Raises:
    ConfigError: the overrides would make it another model.
  """
  # The released models saw texts without BOS, whatever MaxText's default.
  keys = with_overrides({"add_bos": False, **source.keys}, overrides, source.path)
  scanned = keys.get("scan_layers")
  if scanned and keys["mudd_ffn_reallocation"]:
    keys.setdefault("mudd_ffn_groups", keys["base_num_decoder_layers"])
  if keys.get("mudd_ffn_groups"):
    config = configuration(keys | here())
    if ffn_widths.of_config(config) != source.ffn_widths:
      raise ConfigError(
        f"mudd_ffn_groups={keys['mudd_ffn_groups']}: the model in {source.path} has FFNs of other widths; leave it "
        f"out{', and each gets a group of its own' if scanned else ''}."
      )
  return keys


def parameter_shapes(config) -> dict[str, jax.ShapeDtypeStruct]:
  """Of the model, by path; nothing is allocated."""
  mesh = maxtext_utils.get_mesh_from_config(config)
  _, abstract = model_creation_utils.create_nnx_abstract_model(config, mesh)
  flat = nnx.to_flat_state(nnx.state(abstract, nnx.Param))
  return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def tree(
  config, parameters: Iterable[tuple[str, np.ndarray]], source: pathlib.Path, place: Callable | None = None
) -> dict:
  """The parameters by path, in MaxText's `weight_dtype`.

  Args:
    source: what they are from, for messages.
    place: (path, value) -> where it is wanted; on this host if not told.

  Raises:
    ConfigError: one is missing, not of this model, of another shape, or has entries that are not finite.
  """
  here, wanted = host(), parameter_shapes(config)
  made = {}
  for path, value in parameters:
    like = wanted.pop(path, None)
    if like is None:
      raise ConfigError(f"{source} has {path}, for which this configuration has no place.")
    if value.shape != like.shape:
      raise ConfigError(f"{source}: {path} is {list(value.shape)}, and this configuration needs {list(like.shape)}.")
    value = tensors.cast(value, like.dtype, f"{source}: {path}")
    # Orbax bounds its copies of JAX's arrays, not those of NumPy's.
    made[path] = place(path, value) if place else jax.device_put(value, here)
  if wanted:
    raise ConfigError(f"{source} has no {min(wanted)}, which this configuration needs.")
  return made


def convert(source: Source, target: pathlib.Path, overrides: Mapping[str, Any], beside: Mapping[str, str]) -> None:
  """Writes the folder `target` with a model of another project.

  Args:
    overrides: MaxText's keys, as `scan_layers` or `weight_dtype`; they go into the YAML.
    beside: texts to put beside it, by file name.

  Raises:
    ConfigError: as `source_keys` and `tree`; the target exists or cannot be written. Nothing is left behind then.
  """
  _check_chosen({key: value for key, value in overrides.items() if key not in source.keys})
  keys = source_keys(source, {"scan_layers": False, "weight_dtype": "float32", **overrides})
  config, words = configuration(keys | here()), tokenizers.keys(source.path)
  words |= {"tokenizer_path": str(target.absolute() / TOKENIZER)} if words else {}
  with staged(target) as stage, tqdm.tqdm(total=source.size, unit="B", unit_scale=True, desc=source.path.name) as bar:
    parameters = tree(config, source.parameters(config, bar.update), source.path)
    save(stage, config, parameters, keys | words)
    tokenizers.copy(source.path, stage / TOKENIZER)
    remote_code.copy(source.path, stage / remote_code.FOLDER)
    for name, text in beside.items():
      (stage / name).write_text(text)


def _check_chosen(overrides: Mapping[str, Any]) -> None:
  """Raises ConfigError for keys that say nothing of a model; a folder would give them to all that read it."""
  for key, value in overrides.items():
    if key in MuddConfig.model_fields and key not in CHOSEN and key != "base_config":  # refused by itself
      raise ConfigError(
        f"{key}={value}: {CONFIG} describes a model, to which {key} does not belong; leave it out, and give it to what "
        "uses the model."
      )


@contextlib.contextmanager
def staged(target: pathlib.Path):
  """A folder to write to, which becomes `target` when all went well, and is gone otherwise.

  Raises:
    ConfigError: the target exists, cannot be written, or is being written by another process.
  """
  if os.path.lexists(target):
    raise ConfigError(f"{target} exists already; name a folder that does not.")
  # What is made lies in it, with Orbax's temporary folders beside that.
  workshop = target.with_name(f".{target.name}.partial")
  others, made = threading.enumerate(), [parent for parent in target.parents if not parent.exists()]

  def remove_parents():
    for parent in made:
      with contextlib.suppress(OSError):  # it is not empty, or not there
        parent.rmdir()

  def clean_later():
    if workshop.exists():
      with contextlib.suppress(ConfigError, OSError), locks.alone(workshop, target):
        pass
    remove_parents()

  try:
    with Interrupts() as interrupts, locks.alone(workshop, target):
      try:
        stage = workshop / "made"
        stage.mkdir()
        yield stage
        interrupts.ignore_further()
        stage.rename(target)
      except KeyboardInterrupt:
        atexit.register(clean_later)  # for what is written after the wait
        for thread in threading.enumerate():  # Orbax's cannot be stopped, and would fail one by one
          if thread not in others and not thread.daemon:
            thread.join(SECONDS_TO_STOP)
        raise
  except OSError as error:
    raise ConfigError(_of_file(error, target, workshop)) from error
  finally:
    remove_parents()


def _of_file(error: OSError, target: pathlib.Path, workshop: pathlib.Path) -> str:
  """Which file it is about: the target, unless it names one that is elsewhere."""
  file, why = pathlib.Path(str(error.filename or target)), error.strerror or error
  if file in (target, workshop, *target.parents) or file.is_relative_to(workshop):
    return f"{target} cannot be written ({why}); name a folder that can be."
  return f"{file} cannot be read ({why}); make it readable, or copy it again."


def save(stage: pathlib.Path, config, parameters: dict, keys: Mapping[str, Any]) -> None:
  """Writes both, the parameters as MaxText's `save_params_to_path` does, with less of them copied at a time.

  Args:
    parameters: by path.

  Raises:
    OSError: Orbax could not.
  """
  nested = traverse_util.unflatten_dict({tuple(path.split("/")): x for path, x in parameters.items()})
  try:
    with _context(config, nested):
      ocp.save(stage, {"params": {"params": nested}}, checkpointable_name=ITEMS, overwrite=True)
  except Exception as error:  # Orbax raises all kinds
    raise OSError(brief(error)) from error
  (stage / CONFIG).write_text(yaml.safe_dump({"base_config": BASE, **keys}, sort_keys=False))


def by_path(tree: Mapping[str, Any]) -> dict[str, Any]:
  return {"/".join(path): value for path, value in traverse_util.flatten_dict(tree).items()}


def _context(config, parameters) -> ocp.Context:
  context = checkpoint_context.build_context(
    use_ocdbt=config.checkpoint_storage_use_ocdbt, use_zarr3=config.checkpoint_storage_use_zarr3
  )
  largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(parameters))
  memory = context.memory
  memory.write_concurrent_bytes = memory.transfer_concurrent_bytes = largest + BYTES_AT_A_TIME
  memory.read_concurrent_bytes = memory.write_concurrent_bytes
  return context


def numpy_tree(checkpoint: pathlib.Path, item: str = ""):
  """A saved tree on this host, whatever devices it was saved from. Raises ConfigError."""
  path, checkpointer = epath.Path(checkpoint / item), PyTreeCheckpointer()
  try:
    saved = checkpointer.metadata(path).item_metadata.tree
    numpy = jax.tree.map(lambda _: RestoreArgs(restore_type=np.ndarray), saved, is_leaf=lambda x: hasattr(x, "dtype"))
    return checkpointer.restore(path, restore_args=numpy)
  except Exception as error:  # Orbax raises all kinds
    raise ConfigError(
      f"{checkpoint} cannot be read; it is damaged, or not a checkpoint of MaxText ({brief(error)})."
    ) from error
