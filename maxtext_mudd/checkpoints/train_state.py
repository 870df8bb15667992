"""Reads and writes training checkpoints, and converts them between layouts of layers (single, scanned, in the stages of
a pipeline): parameters, optimizer moments and data position.

The random states are those of a new model, because scanned layers share a random state and single layers do not. So
dropout draws other masks after the conversion. The converted run is a new folder, which appears when it is complete.
"""

from collections.abc import Callable
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.common import checkpointing, train_state_nnx
from maxtext.configs.pyconfig import HyperParameters
from maxtext.utils import maxtext_utils, model_creation_utils, train_utils
import numpy as np

from maxtext_mudd.blocks import stacks
from maxtext_mudd.checkpoints import layout, orbax_folder
from maxtext_mudd.checkpoints.staging import staged
from maxtext_mudd.config.errors import ConfigError

_DATA_POSITION = "iter"
_STATE = "items"


def convert(config: HyperParameters, source: pathlib.Path, target: pathlib.Path, step: int | None = None) -> int:
  """Writes the run `target` with one checkpoint of the run `source`, in the layout of the configuration.

  Args:
    config: configuration of the model. Its `run_name` is the name of `target`.
    source: folder of the run to convert, such as OUTPUT/RUN_NAME.
    target: folder of the new run, which must not exist.
    step: step of the checkpoint; default: that of the newest one.

  Returns:
    The step.

  Raises:
    ConfigError: the source or the checkpoint is missing, the target exists, or the checkpoint does not fit the
      configuration. Then nothing is left behind.
  """
  if not config.mudd:
    raise ConfigError("mudd=False: only models with connections can be converted; name such a configuration.")
  check_new(target)
  step, checkpoint = find_checkpoint(source, step)
  values = read(checkpoint)
  has = stacks.describe(layout.of_shapes(config, {path: x.shape for path, x in values.items()}))
  if has == stacks.describe(config):
    keys = f"scan_layers={str(not config.scan_layers).lower()}"
    if stacks.num_stages(config) > 1:
      keys = "ici_pipeline_parallelism and num_layers_per_pipeline_stage, or scan_layers_per_stage, to other values"
    raise ConfigError(f"{checkpoint} has {has} already; to convert it, set {keys}.")
  try:
    values = layout.convert(values, config)
  except (KeyError, IndexError, ValueError) as error:
    reason = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
    raise ConfigError(f"{checkpoint} is not of this model: {reason}; name the run's own configuration.") from None
  write(config, values, step, target, checkpoint)
  return step


def check_new(target: pathlib.Path) -> None:
  """Raises ConfigError if there is a run `target` already."""
  if target.exists():
    raise ConfigError(f"{target} exists already; name a run that does not.")


def read(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
  """A train state by path, such as "params/params/decoder/layers_0/mlp/wo/kernel", without random states.

  Raises:
    ConfigError: the checkpoint cannot be read.
  """
  state = _by_path(orbax_folder.read_tree(checkpoint, _STATE))
  return {path: x for path, x in state.items() if "/rngs/" not in path}


def write(
  config: HyperParameters,
  values: dict[str, np.ndarray],
  step: int,
  target: pathlib.Path,
  source: pathlib.Path,
  is_zero: Callable[[str], bool] = lambda path: False,
  advice: str = "name the run's own configuration",
) -> None:
  """Writes the run `target` with one checkpoint.

  Args:
    config: configuration of the model. Its `run_name` is the name of `target`.
    values: the train state by path, as `read` returns it.
    source: the checkpoint that the values are from. Its data position is copied.
    is_zero: whether a value that is missing is zero, from its path.
    advice: what helps where the values do not fit the configuration.

  Raises:
    ConfigError: the values do not fit the configuration, or the target exists or cannot be written. Then nothing is
      left behind.
  """
  state = _train_state(values, config, source, is_zero, advice)
  with staged(target) as stage:
    _save(config, state, step, stage, source)


def find_checkpoint(run: pathlib.Path, step: int | None = None) -> tuple[int, pathlib.Path]:
  """The step and the folder of a checkpoint of a run: the checkpoint of `step`, or the newest one.

  Raises:
    ConfigError: there is no such checkpoint.
  """
  folder = run / "checkpoints"
  if not folder.is_dir():
    raise ConfigError(f"{run} is not the folder of a run: it has no checkpoints/.")
  by_step = {int(x.name): x for x in folder.iterdir() if x.name.isdigit() and (x / _STATE).is_dir()}
  if not by_step:
    raise ConfigError(f"{folder} holds no complete checkpoint.")
  step = max(by_step) if step is None else step
  if step not in by_step:
    raise ConfigError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, sorted(by_step)))}.")
  return step, by_step[step]


def _by_path(tree) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_name(path): np.asarray(jax.random.key_data(x) if _is_key(x) else x) for path, x in leaves}


def _is_key(x) -> bool:
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _name(path) -> str:
  return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _train_state(values: dict[str, np.ndarray], config, checkpoint: pathlib.Path, is_zero: Callable, advice: str):
  """The tree that MaxText saves for a train state with these values by path, and with the random states of a new model.
  Arguments as for `write`.

  Raises:
    ConfigError: the values do not fit the model of the configuration.
  """
  mesh = maxtext_utils.get_mesh_from_config(config)
  create, abstract = model_creation_utils.create_nnx_abstract_model(config, mesh)
  _, tx = train_utils.create_training_optimizer(config, abstract, mesh=mesh)

  def new_state():
    model = create()
    state = train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))
    return train_state_nnx.to_checkpoint_dict(nnx.state(state))

  with jax.set_mesh(mesh):
    expected_tree = jax.eval_shape(new_state)
    random_tree = jax.jit(lambda: {"nnx_aux": new_state().get("nnx_aux", {})})()
    keys = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(random_tree) if _is_key(x)}
    random_states = _by_path(random_tree)

  def leaf(path, expected):
    name = _name(path)
    value = values.get(name, random_states.get(name))
    if value is None and is_zero(name):
      value = np.zeros(expected.shape, expected.dtype)
    if value is None:
      raise ConfigError(f"{checkpoint} has no {name}, which this configuration needs; {advice}.")
    if name in keys and value.shape == random_states[name].shape:
      return jax.random.wrap_key_data(value, impl=jax.random.key_impl(keys[name]))
    if value.shape != expected.shape or value.dtype != expected.dtype:
      given, needed = (f"{x.dtype}{list(x.shape)}" for x in (value, expected))
      raise ConfigError(f"{checkpoint}: {name} is {given}, and this configuration needs {needed}; {advice}.")
    return jnp.asarray(value)  # Orbax restores JAX arrays only if JAX arrays were saved

  state = jax.tree_util.tree_map_with_path(leaf, expected_tree)
  names = {_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected_tree)}
  extra = sorted(path for path in values if path not in names)
  if extra:
    raise ConfigError(f"{checkpoint} has {extra[0]}, which this configuration does not have; {advice}.")
  return state


def _save(config, state, step: int, stage: pathlib.Path, source: pathlib.Path) -> None:
  manager = checkpointing.create_orbax_checkpoint_manager(
    str(stage / "checkpoints"),
    True,
    False,
    1,
    use_ocdbt=config.checkpoint_storage_use_ocdbt,
    use_zarr3=config.checkpoint_storage_use_zarr3,
  )
  # MaxText's function takes the data iterator to save. There is none here: the file with the data position is copied.
  placeholder = checkpointing.PlaceHolderDataIterator(config, maxtext_utils.get_mesh_from_config(config))
  checkpointing.save_checkpoint(manager, step, state, config, placeholder, force=True)
  checkpointing.wait_until_finished(manager)
  manager.close()
  if (source / _DATA_POSITION).is_dir():
    shutil.copytree(source / _DATA_POSITION, stage / "checkpoints" / str(step) / _DATA_POSITION)
