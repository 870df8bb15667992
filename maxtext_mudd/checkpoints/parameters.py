"""Loads the parameters of a MaxText checkpoint after checking them against the configuration.

MaxText's own loader silently repeats, transposes, drops or skips parameters that do not fit. The result is another
model.
"""

from collections.abc import Mapping

from etils import epath
from flax import nnx
import jax
from maxtext.utils import maxtext_utils, model_creation_utils
from orbax.checkpoint import PyTreeCheckpointer

from maxtext_mudd.blocks import stacks
from maxtext_mudd.checkpoints import model_config, orbax_folder
from maxtext_mudd.config.errors import ConfigError, brief


def load(config) -> nnx.Module:
  """The model of a configuration with the parameters of its `load_parameters_path`, on the devices of its mesh.

  Raises:
    ConfigError: the checkpoint is missing or damaged, its parameters are not those of the configuration, or
      `quantization` needs more than float parameters.
  """
  path = str(config.load_parameters_path)
  _check_quantization(config)
  check_path(path, config)
  try:
    return model_creation_utils.from_pretrained(config, maxtext_utils.get_mesh_from_config(config))
  except Exception as error:  # neither Orbax nor MaxText has a base class for its errors
    raise ConfigError(f"{path} cannot be read; it is damaged ({brief(error)}).") from error


def _check_quantization(config) -> None:
  """Raises ConfigError for quantized checkpoints, and where a quantized model has more than its parameters."""
  if config.checkpoint_is_quantized:
    raise ConfigError(
      "checkpoint_is_quantized=True: only float parameters are read; name a checkpoint of a run, and set it to False: "
      "quantization quantizes the parameters while the model runs."
    )
  if config.quantization in ("fp8", "nanoo_fp8") and not config.use_qwix_quantization:
    raise ConfigError(
      f"quantization={config.quantization.value}: its scales are not parameters, and only parameters are read of a "
      "checkpoint; leave it empty, or set quantization=fp8 and use_qwix_quantization=True, which computes scales anew."
    )


def items_folder(checkpoint: str) -> epath.Path:
  """The folder with the parameter tree of a checkpoint: `items`, or `model_params` of a fine-tuned model, if there is
  one. MaxText's loaders need this path."""
  path = epath.Path(checkpoint)
  return next((path / name for name in orbax_folder.ITEMS if (path / name).is_dir()), path)


def check_path(path: str, config) -> None:
  """Checks the shapes of the parameters of a checkpoint against a configuration. Does not read the values.

  Raises:
    ConfigError: as `check`, the checkpoint has no parameters, or the model has other state that is trained.
  """
  check_state(config)
  saved_shapes = shapes(path)
  if not saved_shapes:
    advice = "name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP."
    raise ConfigError(f"{path} has no parameters, or is damaged; {advice}")
  check(saved_shapes, model_config.parameter_shapes(config), path)


# Beginnings of `model_name` with which router biases are state that training updates by itself, and no parameters.
_SEPARATE_ROUTER_BIASES = ("deepseek3", "deepseek4", "kimi-k2")


def check_state(config, remedy: str = "use a model without them") -> None:
  """Raises ConfigError for a model with trained state besides its parameters, which alone are read of a checkpoint.

  Args:
    remedy: what the error advises.
  """
  if config.mudd and config.routed_bias and config.model_name.startswith(_SEPARATE_ROUTER_BIASES):
    raise ConfigError(
      f"routed_bias=True and model_name={config.model_name}: the biases of routers are not parameters, and only "
      f"parameters are read of a checkpoint; {remedy}."
    )
  first = config.first_num_hash_layers
  if config.mudd and first and config.decoder_block.value == "deepseek4":
    raise ConfigError(
      f"first_num_hash_layers={first}: the tables by which these layers choose experts are not parameters, and only "
      f"parameters are read of a checkpoint; {remedy}."
    )


def shapes(path: str) -> dict[str, tuple[int, ...]]:
  """The shapes of the parameters of an Orbax tree, by path; empty if the path has no such tree."""
  try:
    tree = PyTreeCheckpointer().metadata(epath.Path(path)).item_metadata.tree
  except Exception:  # Orbax has no base class for its errors
    return {}
  return {name: tuple(x.shape) for name, (_, x) in orbax_folder.leaves(tree).items() if hasattr(x, "shape")}


def check(
  saved_shapes: Mapping[str, tuple[int, ...]], model_shapes: Mapping[str, jax.ShapeDtypeStruct], path: str
) -> None:
  """Checks the shapes of saved parameters against those of the model, both by path.

  Raises:
    ConfigError: a parameter is missing, is not one of the model, or has another shape, or these are of an adapter.
  """
  if any(name.endswith("_lora_a") for name in saved_shapes):
    raise ConfigError(
      f"{path} has an adapter without its model; run python3 -m maxtext_mudd.convert from-run first, which merges the "
      "two, and name what that writes."
    )
  advice = "name the keys that the model was trained with."
  is_stacked = {any(stacks.is_stacked(name.split("/")) for name in names) for names in (saved_shapes, model_shapes)}
  if len(is_stacked) > 1:
    advice = "set scan_layers as it was in training."
  saved, wanted = (any(stacks.is_of_stages(x.split("/")) for x in names) for names in (saved_shapes, model_shapes))
  if saved and not wanted:
    advice = "the checkpoint has the stages of a pipeline; convert it first, with maxtext_mudd.convert from-run."
  if wanted and not saved:
    advice = (
      "the checkpoint has no stages of a pipeline; start the run without one, then move it by maxtext_mudd.convert "
      "layout."
    )
  for name, parameter in model_shapes.items():
    if name not in saved_shapes:
      raise ConfigError(f"{path} has no {name}, which this configuration needs; {advice}")
    if saved_shapes[name] != parameter.shape:
      raise ConfigError(
        f"{path}: {name} is {list(saved_shapes[name])}, and this configuration needs {list(parameter.shape)}; {advice}"
      )
  extra = sorted(saved_shapes.keys() - model_shapes.keys())
  if extra:
    raise ConfigError(f"{path} has {extra[0]}, which this configuration does not have; {advice}")
