"""A training checkpoint from single layers to scanned ones, or back: parameters, moments, data position.

Random states start as in a new model, for layers share them in one layout and not in the other: dropout draws other
masks. The converted run lies in a folder of its own, which appears when it is complete.
"""

import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.common import checkpointing, train_state_nnx
from maxtext.configs.pyconfig import HyperParameters
from maxtext.utils import maxtext_utils, model_creation_utils, train_utils
import numpy as np

from maxtext_mudd.checkpoints import folder as folders
from maxtext_mudd.checkpoints import layout
from maxtext_mudd.config.errors import ConfigError

_DATA_POSITION = "iter"
_STATE = "items"


def convert(config: HyperParameters, source: pathlib.Path, target: pathlib.Path, step: int | None = None) -> int:
  """Writes the run `target` with one checkpoint of the run `source`, in the layout of `config.scan_layers`.

  Args:
    config: of the model, read with `run_name` the name of `target`.
    source, target: folders of runs, as OUTPUT/RUN_NAME; the target's must not exist.
    step: which checkpoint; None: the latest.

  Returns:
    the step.

  Raises:
    ConfigError: a folder or checkpoint that is missing or there already, or does not fit the configuration. Nothing is
      left behind then.
  """
  if not config.mudd:
    raise ConfigError("mudd=False: layouts of models with connections are converted; name such a configuration.")
  if target.exists():
    raise ConfigError(f"{target} exists already; name a run that does not.")
  step, folder = checkpoint(source, step)
  values = {path: x for path, x in _by_path(folders.numpy_tree(folder, _STATE)).items() if "/rngs/" not in path}
  scanned = any("/decoder/layers/" in path for path in values)
  if scanned == config.scan_layers:
    raise ConfigError(
      f"{folder} has {'scanned' if scanned else 'single'} layers already, as scan_layers={config.scan_layers} wants it."
    )
  try:
    values = (layout.stack if config.scan_layers else layout.unstack)(values, config)
  except (KeyError, IndexError, ValueError) as error:
    what = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
    raise ConfigError(f"{folder} is not of this model: {what}; name the run's own configuration.") from None
  state = _fit(values, config, folder)
  with folders.staged(target) as stage:
    _write(config, state, step, stage, folder)
  return step


def checkpoint(source: pathlib.Path, step: int | None = None) -> tuple[int, pathlib.Path]:
  """Of a run, and its step, the latest if not told. Raises ConfigError where there is none."""
  folder = source / "checkpoints"
  if not folder.is_dir():
    raise ConfigError(f"{source} is not the folder of a run: it has no checkpoints/.")
  found = {int(x.name): x for x in folder.iterdir() if x.name.isdigit() and (x / _STATE).is_dir()}
  if not found:
    raise ConfigError(f"{folder} holds no complete checkpoint.")
  step = max(found) if step is None else step
  if step not in found:
    raise ConfigError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, sorted(found)))}.")
  return step, found[step]


def _by_path(tree) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_name(path): np.asarray(jax.random.key_data(x) if _is_key(x) else x) for path, x in leaves}


def _is_key(x) -> bool:
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _name(path) -> str:
  return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _fit(values: dict[str, np.ndarray], config, folder: pathlib.Path):
  """The values as the tree that MaxText saves, with the random states of a new model."""
  mesh = maxtext_utils.get_mesh_from_config(config)
  create, abstract = model_creation_utils.create_nnx_abstract_model(config, mesh)
  _, tx = train_utils.create_training_optimizer(config, abstract, mesh=mesh)

  def new():
    model = create()
    state = train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))
    return train_state_nnx.to_checkpoint_dict(nnx.state(state))

  with jax.set_mesh(mesh):
    wanted = jax.eval_shape(new)
    random = jax.jit(lambda: {"nnx_aux": new().get("nnx_aux", {})})()
    keys = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(random) if _is_key(x)}
    random = _by_path(random)

  def fitting(path, like):
    name = _name(path)
    value = values.get(name, random.get(name))
    if value is None:
      raise ConfigError(f"{folder} has no {name}, which this configuration needs; name the run's own configuration.")
    if name in keys and value.shape == random[name].shape:
      return jax.random.wrap_key_data(value, impl=jax.random.key_impl(keys[name]))
    if value.shape != like.shape or value.dtype != like.dtype:
      found, needed = (f"{x.dtype}{list(x.shape)}" for x in (value, like))
      raise ConfigError(
        f"{folder}: {name} is {found}, and this configuration needs {needed}; name the run's own configuration."
      )
    return jnp.asarray(value)  # Orbax restores arrays as what they were saved as

  state = jax.tree_util.tree_map_with_path(fitting, wanted)
  names = {_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(wanted)}
  left = sorted(path for path in values if path not in names)
  if left:
    raise ConfigError(f"{folder} has {left[0]}, for which this configuration has no place; name the run's own.")
  return state


def _write(config, state, step: int, staged: pathlib.Path, folder: pathlib.Path) -> None:
  manager = checkpointing.create_orbax_checkpoint_manager(
    str(staged / "checkpoints"),
    True,
    False,
    1,
    use_ocdbt=config.checkpoint_storage_use_ocdbt,
    use_zarr3=config.checkpoint_storage_use_zarr3,
  )
  # The data position is not ours to make: it is copied.
  placeholder = checkpointing.PlaceHolderDataIterator(config, maxtext_utils.get_mesh_from_config(config))
  checkpointing.save_checkpoint(manager, step, state, config, placeholder, force=True)
  checkpointing.wait_until_finished(manager)
  manager.close()
  if (folder / _DATA_POSITION).is_dir():
    shutil.copytree(folder / _DATA_POSITION, staged / "checkpoints" / str(step) / _DATA_POSITION)
