"""Depth connections: how a block's input is made from what came before it.

`base` states what a family is, and `FAMILIES` lists those that exist. A family that is defined elsewhere becomes one by
`register`, before the first configuration is read. Imports neither JAX nor MaxText.
"""

from maxtext_mudd.connections.base import Family, Plan
from maxtext_mudd.connections.hyper_connections import HyperConnections
from maxtext_mudd.connections.mudd import Dense
from maxtext_mudd.connections.residual import Residual

FAMILIES: dict[str, type[Family]] = {
  "dense": Dense,
  "hyper_connections": HyperConnections,
  "residual": Residual,
}


def register(name: str, family: type[Family]) -> None:
  """Makes `depth_connection=NAME` stand for a family.

  Raises:
    ValueError: the name is taken.
  """
  if FAMILIES.setdefault(name, family) is not family:
    raise ValueError(f"depth_connection={name} is a family already; register it under another name.")


def family(config) -> type[Family]:
  """The family that a configuration names."""
  return FAMILIES[config.depth_connection]


def plan(config) -> Plan:
  """Where the family of a configuration reads."""
  return family(config).plan(config)
