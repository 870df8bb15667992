"""Model folders: a checkpoint of parameters that MaxText can load, with the keys of its model in a YAML file.

`maxtext_mudd.convert` writes a model folder M, and `maxtext_mudd.from_pretrained` reads it.

M/model.yml    the configuration keys of the model
M/items        the parameters, the value of load_parameters_path
M/tokenizer    the tokenizer, the value of tokenizer_path, if the source has one
M/remote_code  the modelling code and generation_config.json, if the source is a Hugging Face folder that has them
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import pathlib
from typing import Any, Protocol

from flax import traverse_util
import jax
from maxtext.common import checkpoint_context
import numpy as np
from orbax.checkpoint import v1 as ocp
import tqdm
import yaml

from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.checkpoints import model_config, model_keys, tensors, tokenizers
from maxtext_mudd.checkpoints.hugging_face import remote_code
from maxtext_mudd.checkpoints.staging import staged
from maxtext_mudd.config.errors import ConfigError, brief
from maxtext_mudd.config.mudd_config import MuddConfig

CONFIG, ITEMS, TOKENIZER = "model.yml", "items", "tokenizer"
# Keys that a user may set in a conversion: the keys of the model, and keys about its use, which become defaults for
# whoever loads the model folder.
ACCEPTED_KEYS = model_keys.KEYS - {"tokenizer_path", "tokenizer_type"}
ACCEPTED_KEYS |= {"attention", "dtype", "matmul_precision", "per_device_batch_size", "remat_policy"}
CONCURRENT_BYTES = 64 * 2**20  # bytes of copies that Orbax may hold at a time, besides the largest array


class Source(Protocol):
  """A model in another project's format. Only the headers of its files have been read.

  Attributes:
    path: folder of the model.
    keys: MaxText's keys of the model, with single layers (`scan_layers: false`).
    ffn_widths: FFN width of each block.
    size: size of all parameters in bytes.
  """

  path: pathlib.Path
  keys: dict[str, Any]
  ffn_widths: tuple[int, ...]
  size: int

  def parameters(self, config, progress: Callable[[int], None]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the parameters one at a time, as (MaxText's path, value), in the layout of the configuration.

    `progress` is called with the bytes of each tensor that is read.
    """


def is_model_folder(path: pathlib.Path) -> bool:
  return (path / CONFIG).exists()


def read_keys(path: pathlib.Path) -> dict[str, Any]:
  """The keys of the model in a model folder. If the folder has been moved, tokenizer_path is corrected.

  Raises:
    ConfigError: model.yml is damaged.
  """
  try:
    keys = yaml.safe_load((path / CONFIG).read_text())
  except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
    raise ConfigError(f"{path / CONFIG} cannot be read ({' '.join(str(error).split())}).") from error
  if not isinstance(keys, dict):
    raise ConfigError(f"{path / CONFIG} does not hold the keys of a model; convert it again.")
  return keys | tokenizers.moved_keys(keys, path / TOKENIZER)


def source_keys(source: Source, overrides: Mapping[str, Any]) -> dict[str, Any]:
  """All keys of a model in another project's format, with a user's overrides.

  Where re-allocated FFNs are scanned, each block gets a group of its own, so that it keeps its width.

  Raises:
    ConfigError: the overrides would describe another model.
  """
  # The released models were trained without a BOS token, whatever MaxText's default.
  keys = model_config.with_overrides({"add_bos": False, **source.keys}, overrides, source.path)
  scanned = keys.get("scan_layers")
  if scanned and keys["mudd_ffn_reallocation"]:
    keys.setdefault("mudd_ffn_groups", keys["base_num_decoder_layers"])
  if keys.get("mudd_ffn_groups"):
    config = model_config.build(keys | model_config.local_keys())
    if ffn_widths.of_config(config) != source.ffn_widths:
      raise ConfigError(
        f"mudd_ffn_groups={keys['mudd_ffn_groups']}: the model in {source.path} has FFNs of other widths; leave it "
        f"out{', and each gets a group of its own' if scanned else ''}."
      )
  return keys


def check_parameters(
  config,
  parameters: Iterable[tuple[str, np.ndarray]],
  source: pathlib.Path,
  place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """Checks the parameters of a model against its configuration and casts them to `weight_dtype`.

  Args:
    parameters: (path, value) of each.
    source: the folder of the parameters, for messages.
    place: copies the value of a path to its devices; default: to the CPU of this host.

  Returns:
    The values by path.

  Raises:
    ConfigError: a parameter is missing, is not one of this model, has another shape, or is not finite.
  """
  cpu, missing = cpu_device(), model_config.parameter_shapes(config)
  values = {}
  for path, value in parameters:
    expected = missing.pop(path, None)
    if expected is None:
      raise ConfigError(f"{source} has {path}, which this configuration does not have.")
    if value.shape != expected.shape:
      raise ConfigError(
        f"{source}: {path} is {list(value.shape)}, and this configuration needs {list(expected.shape)}."
      )
    value = tensors.cast(value, expected.dtype, f"{source}: {path}")
    # JAX arrays even on the CPU: Orbax limits the memory of copies of JAX arrays, but not of NumPy arrays.
    values[path] = place(path, value) if place else jax.device_put(value, cpu)
  if missing:
    raise ConfigError(f"{source} has no {min(missing)}, which this configuration needs.")
  return values


def cpu_device() -> jax.Device:
  """The device that holds parameters during a conversion. Raises ConfigError if JAX_PLATFORMS excludes it."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError as error:
    platforms = jax.config.jax_platforms
    raise ConfigError(
      f"JAX_PLATFORMS={platforms} leaves out cpu, which holds the parameters; set JAX_PLATFORMS={platforms},cpu."
    ) from error


def convert(source: Source, target: pathlib.Path, overrides: Mapping[str, Any], extra_files: Mapping[str, str]) -> None:
  """Writes the model folder `target` with a model in another project's format.

  Args:
    overrides: MaxText's keys, such as `scan_layers` or `weight_dtype`, which go into model.yml.
    extra_files: text of further files in the folder, by name.

  Raises:
    ConfigError: as `source_keys` and `check_parameters`, or the target exists or cannot be written. Then no file is
      left behind.
  """
  _check_overrides({key: value for key, value in overrides.items() if key not in source.keys})
  keys = source_keys(source, {"scan_layers": False, "weight_dtype": "float32", **overrides})
  config, tokenizer_keys = model_config.build(keys | model_config.local_keys()), tokenizers.keys(source.path)
  if tokenizer_keys:
    tokenizer_keys |= {"tokenizer_path": str(target.absolute() / TOKENIZER)}
  with staged(target) as stage, tqdm.tqdm(total=source.size, unit="B", unit_scale=True, desc=source.path.name) as bar:
    parameters = check_parameters(config, source.parameters(config, bar.update), source.path)
    save(stage, config, parameters, keys | tokenizer_keys)
    tokenizers.copy(source.path, stage / TOKENIZER)
    remote_code.copy(source.path, stage / remote_code.FOLDER)
    for name, text in extra_files.items():
      (stage / name).write_text(text)


def _check_overrides(overrides: Mapping[str, Any]) -> None:
  """Raises ConfigError for a key that does not describe a model. It would change every later use of the folder."""
  accepted = ACCEPTED_KEYS | {"base_config"}  # `source_keys` checks base_config
  for key, value in overrides.items():
    if key in MuddConfig.model_fields and key not in accepted:
      raise ConfigError(
        f"{key}={value}: {CONFIG} describes a model, to which {key} does not belong; leave it out, and set it where "
        "the model is used."
      )


def save(path: pathlib.Path, config, parameters: Mapping[str, jax.Array], keys: Mapping[str, Any] | None) -> None:
  """Writes model.yml and the parameters, as MaxText's `save_params_to_path` does, with fewer copies at a time.

  Args:
    parameters: values by path.
    keys: those of model.yml; None: it is not written.

  Raises:
    OSError: Orbax failed.
  """
  nested = traverse_util.unflatten_dict({tuple(name.split("/")): x for name, x in parameters.items()})
  try:
    with _orbax_context(config, nested):
      ocp.save(path, {"params": {"params": nested}}, checkpointable_name=ITEMS, overwrite=True)
  except Exception as error:  # Orbax has no base class for its errors
    raise OSError(brief(error)) from error
  if keys is not None:
    (path / CONFIG).write_text(yaml.safe_dump({"base_config": model_config.BASE, **keys}, sort_keys=False))


def _orbax_context(config, parameters) -> ocp.Context:
  context = checkpoint_context.build_context(
    use_ocdbt=config.checkpoint_storage_use_ocdbt, use_zarr3=config.checkpoint_storage_use_zarr3
  )
  largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(parameters))
  memory = context.memory
  memory.write_concurrent_bytes = memory.transfer_concurrent_bytes = largest + CONCURRENT_BYTES
  memory.read_concurrent_bytes = memory.write_concurrent_bytes
  return context
