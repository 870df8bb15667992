"""Parameters of a MaxText checkpoint, held to a configuration before they are loaded.

MaxText's own loader repeats, transposes, drops or leaves out what does not fit, and gives another model without a word.
"""

from collections.abc import Mapping

from etils import epath
from flax import nnx, traverse_util
import jax
from maxtext.utils import maxtext_utils, model_creation_utils
from orbax.checkpoint import PyTreeCheckpointer

from maxtext_mudd.checkpoints import folder
from maxtext_mudd.config.errors import ConfigError, brief


def load(config) -> nnx.Module:
  """The model of a configuration with the parameters of its `load_parameters_path`, on the devices of its mesh.

  Raises:
    ConfigError: that is damaged or no checkpoint, or has other parameters than the configuration makes.
  """
  path = str(config.load_parameters_path)
  check_path(path, config)
  try:
    return model_creation_utils.from_pretrained(config, maxtext_utils.get_mesh_from_config(config))
  except Exception as error:  # Orbax and MaxText raise all kinds
    raise ConfigError(f"{path} cannot be read; it is damaged ({brief(error)}).") from error


def items(path: str) -> epath.Path:
  """The tree in a checkpoint, which some of MaxText's loaders want named."""
  inner = epath.Path(path) / "items"
  return inner if inner.is_dir() else epath.Path(path)


def check_path(path: str, config) -> None:
  """`check` of what is saved there. Raises ConfigError."""
  found = shapes(path)
  if not found:
    raise ConfigError(f"{path} is no checkpoint with parameters, or is damaged; name OUTPUT/RUN/checkpoints/STEP.")
  check(found, folder.parameter_shapes(config), path)


def shapes(path: str) -> dict[str, tuple[int, ...]]:
  """Of the parameters of an Orbax tree, by path; none where there is no such tree."""
  try:
    tree = PyTreeCheckpointer().metadata(epath.Path(path)).item_metadata.tree
  except Exception:  # Orbax raises all kinds
    return {}
  for _ in range(2):  # params/params
    tree = tree.get("params", {}) if isinstance(tree, Mapping) else {}
  flat = traverse_util.flatten_dict(tree)
  return {"/".join(map(str, name)): tuple(x.shape) for name, x in flat.items() if hasattr(x, "shape")}


def check(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, jax.ShapeDtypeStruct], path: str) -> None:
  """Raises ConfigError where a parameter is missing, is one too many, or has another shape."""
  advice = "name the keys that the model was trained with."
  scanned = {any("decoder/layers/" in name for name in names) for names in (found, wanted)}
  if len(scanned) > 1:
    advice = "scan_layers has to be as it was trained with."
  for name, like in wanted.items():
    if name not in found:
      raise ConfigError(f"{path} has no {name}, which this configuration needs; {advice}")
    if found[name] != like.shape:
      raise ConfigError(
        f"{path}: {name} is {list(found[name])}, and this configuration needs {list(like.shape)}; {advice}"
      )
  extra = sorted(found.keys() - wanted.keys())
  if extra:
    raise ConfigError(f"{path} has {extra[0]}, for which this configuration has no place; {advice}")
