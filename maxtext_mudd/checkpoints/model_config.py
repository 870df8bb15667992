"""Builds MaxText configurations from dictionaries of keys, for models that are converted or loaded."""

from collections.abc import Mapping
import pathlib
import re
from typing import Any

from flax import nnx
import jax
from maxtext.configs import pyconfig
from maxtext.configs.types import MaxTextConfig
from maxtext.utils import maxtext_utils, model_creation_utils

from maxtext_mudd.checkpoints import model_keys
from maxtext_mudd.config.errors import ConfigError

BASE = "base.yml"  # MaxText's file of defaults


def local_keys() -> dict[str, Any]:
  """Keys that place a model on the devices of this host, whatever mesh it was or will be trained on."""
  axes = [key for key in MaxTextConfig.model_fields if re.fullmatch(r"(ici|dcn)_\w+_parallelism", key)]
  keys = {"run_name": "", "log_config": False, "enable_checkpointing": False}
  keys |= {"skip_jax_distributed_system": True, "num_slices": 1}
  keys |= {"base_output_directory": "maxtext_output"}  # MaxText's default; set here, it gives no warning
  return keys | dict.fromkeys(axes, 1) | {"ici_fsdp_parallelism": -1}


def build(keys: Mapping[str, Any]):
  """MaxText's configuration with these keys, on top of its defaults.

  Raises:
    ConfigError: the keys cannot work.
  """
  defaults = pathlib.Path(pyconfig.__file__).parent / BASE
  return pyconfig.initialize(["", str(defaults)], **{key: x for key, x in keys.items() if key != "base_config"})


def parameter_shapes(config) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of every parameter of a model, by path. No memory is allocated for the parameters."""
  mesh = maxtext_utils.get_mesh_from_config(config)
  _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def with_overrides(
  keys: Mapping[str, Any], overrides: Mapping[str, Any], path: pathlib.Path, free=model_keys.FREE
) -> dict[str, Any]:
  """The keys of a trained model, updated with a user's overrides.

  Args:
    path: where the model is, for messages.
    free: keys whose values may differ from the model's. The values of `model_keys.HOW` may differ, too.

  Raises:
    ConfigError: an override would describe another model.
  """
  fixed = {key: value for key, value in overrides.items() if key not in free and key not in model_keys.HOW}
  unset = {key for key in fixed.keys() - keys.keys() if key in model_keys.FUNCTION}
  defaults = build({"scan_layers": False, **keys, **local_keys()}) if unset else None
  model_values = {"base_config": BASE} | keys | {key: getattr(defaults, key) for key in unset if hasattr(defaults, key)}
  for key, value in fixed.items():
    model_value = model_keys.plain(model_values.get(key, value))
    if model_value != value:
      raise ConfigError(f"{key}={value}: the model in {path} has {key}={model_value}; leave it out.")
  return {**keys, **overrides}
