"""Depth connections: how a block's input is made from what came before it.

`base` states what a family is, and `FAMILIES` lists those that exist. A family that is defined elsewhere becomes one by
`register`. Imports neither JAX nor MaxText.
"""

import sys

from maxtext_mudd.connections.attnres import AttentionResiduals
from maxtext_mudd.connections.base import Family, Plan
from maxtext_mudd.connections.dca import DeepCrossAttention
from maxtext_mudd.connections.family_keys import FamilyKeys
from maxtext_mudd.connections.hyper_connections import HyperConnections
from maxtext_mudd.connections.mhc import ManifoldHyperConnections
from maxtext_mudd.connections.mudd import Dense
from maxtext_mudd.connections.residual import Residual

DEFAULT = "dense"
FAMILIES: dict[str, type[Family]] = {
  "attnres": AttentionResiduals,
  "dca": DeepCrossAttention,
  DEFAULT: Dense,
  "hyper_connections": HyperConnections,
  "mhc": ManifoldHyperConnections,
  "residual": Residual,
}


def register(name: str, family: type[Family]) -> None:
  """Makes `depth_connection=NAME` stand for a family.

  Raises:
    ValueError: the name is taken, or the keys do not go with those of other families.
    RuntimeError: the family has keys, and the configuration was composed without them.
  """
  known = FAMILIES.get(name, family)
  if known is not family:
    raise ValueError(f"depth_connection={name} is a family already; register it under another name.")
  composed = sys.modules.get("maxtext_mudd.config.keys")
  if composed and not issubclass(composed.MuddKeys, family.Keys):
    raise RuntimeError(f"register {name} before maxtext_mudd.config.keys is imported, so that its keys become known.")
  _check_keys(name, family.Keys)
  FAMILIES[name] = family


def key_groups() -> list[type[FamilyKeys]]:
  """The groups of keys of all families, without those that another one inherits."""
  groups = list(dict.fromkeys(family.Keys for family in FAMILIES.values()))
  return [x for x in groups if not any(issubclass(y, x) and y is not x for y in groups)]


def _check_keys(name: str, keys: type[FamilyKeys]) -> None:
  """Raises ValueError where the groups of `keys` cannot be inherited beside those of the other families."""
  groups = {group for family in FAMILIES.values() for group in family.Keys.__mro__}
  taken = {key: group for group in groups for key in vars(group).get("__annotations__", ())}
  for group in {*keys.__mro__} - groups:
    for key in taken.keys() & vars(group).get("__annotations__", {}).keys():
      raise ValueError(f"{name} declares {key}, a key of {taken[key].__name__}; inherit that group, or rename the key.")
  for other in key_groups():
    in_both = [x for x in keys.__mro__ if x in other.__mro__]
    if in_both != [x for x in other.__mro__ if x in in_both]:
      raise ValueError(f"{keys.__name__} of {name} inherits the groups of {other.__name__} in another order; keep it.")


def family(config) -> type[Family]:
  """The family that a configuration names."""
  return FAMILIES[config.depth_connection]


def plan(config) -> Plan:
  """Where the family of a configuration reads."""
  return family(config).plan(config)
