"""A folder with a converted model: a checkpoint of parameters as MaxText reads it, and the YAML that describes it.

M/model.yml    all keys of the model
M/items        load_parameters_path
"""

from collections.abc import Iterable, Mapping
import contextlib
import pathlib
import shutil
from typing import Any

from etils import epath
from flax import nnx, traverse_util
import jax
from maxtext.common import checkpoint_context
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils
import numpy as np
from orbax.checkpoint import PyTreeCheckpointer, RestoreArgs
from orbax.checkpoint import v1 as ocp
import yaml

from maxtext_mudd.errors import ConfigError

CONFIG, ITEMS = "model.yml", "items"
BASE = "base.yml"  # MaxText's own
BYTES_AT_A_TIME = 64 * 2**20  # in flight to and from files, beside the largest array
# For conversions: one host, whatever the model is for.
HERE = {"run_name": "", "skip_jax_distributed_system": True, "log_config": False, "enable_checkpointing": False}


def is_folder(folder: pathlib.Path) -> bool:
  return (folder / CONFIG).exists()


def keys(folder: pathlib.Path) -> dict[str, Any]:
  """Of the model in it. Raises ConfigError where the file is damaged."""
  try:
    found = yaml.safe_load((folder / CONFIG).read_text())
  except (OSError, yaml.YAMLError) as error:
    raise ConfigError(f"{folder / CONFIG} cannot be read ({' '.join(str(error).split())}).") from error
  if not isinstance(found, dict):
    raise ConfigError(f"{folder / CONFIG} does not hold the keys of a model; convert it again.")
  return found


def configuration(keys: Mapping[str, Any], overrides: Mapping[str, Any]):
  """MaxText's configuration of a model from its keys. Raises ConfigError."""
  base = pathlib.Path(pyconfig.__file__).parent / BASE
  keys = {key: value for key, value in (dict(keys) | dict(overrides)).items() if key != "base_config"}
  return pyconfig.initialize(["", str(base)], **keys)


def layout_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
  """With what scanned layers need: each FFN width its own group, so that none is averaged."""
  if keys.get("scan_layers") and keys.get("mudd_ffn_reallocation"):
    return {"mudd_ffn_groups": keys["base_num_decoder_layers"], **keys}
  return dict(keys)


def parameter_shapes(config) -> dict[str, jax.ShapeDtypeStruct]:
  """Of the model, by path; nothing is allocated."""
  mesh = maxtext_utils.get_mesh_from_config(config)
  _, abstract = model_creation_utils.create_nnx_abstract_model(config, mesh)
  flat = nnx.to_flat_state(nnx.state(abstract, nnx.Param))
  return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def tree(config, parameters: Iterable[tuple[str, np.ndarray]], source: str) -> dict:
  """The parameters, as MaxText nests them, in its `weight_dtype`.

  Args:
    source: what they are from, for messages.

  Raises:
    ConfigError: one is missing, not of this model, of another shape, or has entries that are not finite.
  """
  wanted = parameter_shapes(config)
  made = {}
  for path, value in parameters:
    like = wanted.pop(path, None)
    if like is None:
      raise ConfigError(f"{source} has {path}, for which this configuration has no place.")
    if value.shape != like.shape:
      raise ConfigError(f"{source}: {path} is {list(value.shape)}, and this configuration needs {list(like.shape)}.")
    # Orbax bounds its copies of JAX's arrays, not those of NumPy's.
    made[tuple(path.split("/"))] = jax.device_put(np.ascontiguousarray(value, like.dtype))
  if wanted:
    raise ConfigError(f"{source} has no {min(wanted)}, which this configuration needs.")
  return traverse_util.unflatten_dict(made)


@contextlib.contextmanager
def staged(target: pathlib.Path):
  """A folder to write to, which becomes `target` when all went well, and is gone otherwise.

  Raises:
    ConfigError: the target exists, or cannot be written.
  """
  if target.exists():
    raise ConfigError(f"{target} exists already; name a folder that does not.")
  stage = target.with_name(f".{target.name}.partial")
  try:
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    yield stage
    stage.rename(target)
  except OSError as error:
    raise ConfigError(f"{target} cannot be written ({error.strerror or error}); name a folder that can be.") from error
  finally:
    shutil.rmtree(stage, ignore_errors=True)


def save(stage: pathlib.Path, config, parameters: dict, keys: Mapping[str, Any]) -> None:
  """Writes both, the parameters as MaxText's `save_params_to_path` does, with less of them copied at a time."""
  with _context(config, parameters):
    ocp.save(stage, {"params": {"params": parameters}}, checkpointable_name=ITEMS, overwrite=True)
  (stage / CONFIG).write_text(yaml.safe_dump({"base_config": BASE, **keys}, sort_keys=False))


def restore(folder: pathlib.Path, config) -> dict[str, np.ndarray]:
  """The parameters of such a folder by path, on this host. Raises ConfigError."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  try:
    saved = ocp.metadata(folder, checkpointable_name=ITEMS).metadata
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
    with _context(config, wanted):
      found = ocp.load(folder, wanted, checkpointable_name=ITEMS)["params"]["params"]
  except Exception as error:  # Orbax raises all kinds
    cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ConfigError(f"{folder / ITEMS} cannot be read; it is damaged, or holds no parameters ({cause}).") from error
  return {path: np.asarray(value) for path, value in by_path(found).items()}


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


def numpy_tree(path: pathlib.Path):
  """A saved tree on this host, whatever devices it was saved from."""
  checkpointer = PyTreeCheckpointer()
  saved = checkpointer.metadata(epath.Path(path)).item_metadata.tree
  as_numpy = jax.tree.map(lambda _: RestoreArgs(restore_type=np.ndarray), saved, is_leaf=lambda x: hasattr(x, "dtype"))
  return checkpointer.restore(epath.Path(path), restore_args=as_numpy)
