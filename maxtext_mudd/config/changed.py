"""Configurations that differ from a validated one in a few keys."""

import copy
from typing import Any

from maxtext.configs.pyconfig import HyperParameters


def changed(config: HyperParameters, **keys: Any) -> HyperParameters:
  """Returns the configuration with other values of `keys`.

  MaxText has no such function: its configurations are read-only. This function validates no value. MaxText derives some
  keys from others. This function does not derive them again, so pass the values of derived keys, too.

  Args:
    config: a configuration of MaxText, or one that this function returned.
    keys: values by key. They must be hashable, and of the types that `config.get_keys()` has: a dtype is a NumPy dtype.

  Raises:
    AttributeError: a key that the configuration does not have.
  """
  base, earlier = (config._base, config._changes) if isinstance(config, ChangedConfig) else (config, {})
  return ChangedConfig(base, earlier | keys)


class ChangedConfig(HyperParameters):
  """A configuration that differs from a validated one in a few keys. `changed` creates it.

  Modules hold configurations as static data, which JAX compares and hashes to find a compiled function. Two changed
  configurations are equal if they have the same base object and the same changes. A copy, deep or pickled,
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
    return isinstance(other, ChangedConfig) and self._base is other._base and self._changes == other._changes

  def __hash__(self):
    return hash((id(self._base), frozenset(self._changes.items())))
