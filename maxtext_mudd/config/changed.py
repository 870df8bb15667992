"""Configurations that differ from a validated one in a few keys."""

import copy
from typing import Any

from maxtext.configs.pyconfig import HyperParameters
from maxtext.configs.types import MaxTextConfig


def changed(config: HyperParameters | MaxTextConfig, **keys: Any) -> HyperParameters:
  """Returns the configuration with other values of `keys`.

  MaxText has no such function: its configurations are read-only. This function validates no value. MaxText derives some
  keys from others. This function does not derive them again, so pass the values of derived keys, too.

  Args:
    config: a configuration of MaxText, or one that this function returned. The pydantic object behind a configuration
      will do, too: MaxText's trainers for fine-tuning pass it to models.
    keys: values by key. They must be hashable, and of the types that `config.get_keys()` has: a dtype is a NumPy dtype.

  Raises:
    AttributeError: a key that the configuration does not have.
  """
  if isinstance(config, MaxTextConfig):
    config = HyperParameters(config)
  base, earlier = (config._base, config._changes) if isinstance(config, ChangedConfig) else (config, {})
  return ChangedConfig(base, earlier | keys)


class ChangedConfig(HyperParameters):
  """A configuration that differs from a validated one in a few keys. `changed` creates it.

  Modules hold configurations as static data, which JAX compares and hashes to find a compiled function. Two changed
  configurations are equal if they change the same keys of the same pydantic object. A copy, deep or pickled,
  keeps the changes and has a copy of the base.
  """

  def __init__(self, base: HyperParameters, changes: dict[str, Any]):
    for key in changes:
      if key not in base.get_keys():
        raise AttributeError(f"{key} is not a configuration key.")
    object.__setattr__(self, "_base", base)
    object.__setattr__(self, "_changes", changes)
    # MaxText creates further configurations from this attribute.
    object.__setattr__(self, "_pydantic_config", base._pydantic_config.model_copy(update=changes))
    object.__setattr__(self, "_flat_config", base.get_keys() | changes)

  def __deepcopy__(self, memo):
    return ChangedConfig(copy.deepcopy(self._base, memo), self._changes)

  def __reduce__(self):
    return ChangedConfig, (self._base, self._changes)

  def __eq__(self, other):
    if not isinstance(other, ChangedConfig):
      return False
    return self._base._pydantic_config is other._base._pydantic_config and self._changes == other._changes

  def __hash__(self):
    return hash((id(self._base._pydantic_config), frozenset(self._changes.items())))
