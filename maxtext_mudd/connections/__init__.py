"""Depth connections: how a block's input is made from what came before it.

`base` states what a family is, and `FAMILIES` lists those that exist. A family that is defined elsewhere becomes one by
`register`. Imports neither JAX nor MaxText.
"""

import sys

from maxtext_mudd.connections.base import Family, Plan
from maxtext_mudd.connections.hyper_connections import HyperConnections
from maxtext_mudd.connections.mudd import Dense
from maxtext_mudd.connections.residual import Residual

DEFAULT = "dense"
FAMILIES: dict[str, type[Family]] = {
  DEFAULT: Dense,
  "hyper_connections": HyperConnections,
  "residual": Residual,
}


def register(name: str, family: type[Family]) -> None:
  """Makes `depth_connection=NAME` stand for a family.

  Raises:
    ValueError: the name is taken.
    RuntimeError: the family has keys, and the configuration was composed without them.
  """
  composed = sys.modules.get("maxtext_mudd.config.keys")
  if composed and not issubclass(composed.MuddKeys, family.Keys) and family.Keys.model_fields:
    raise RuntimeError(f"register {name} before maxtext_mudd.config.keys is imported, so that its keys become known.")
  if FAMILIES.setdefault(name, family) is not family:
    raise ValueError(f"depth_connection={name} is a family already; register it under another name.")


def family(config) -> type[Family]:
  """The family that a configuration names."""
  return FAMILIES[config.depth_connection]


def plan(config) -> Plan:
  """Where the family of a configuration reads."""
  return family(config).plan(config)
