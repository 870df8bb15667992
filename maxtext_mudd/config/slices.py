"""Names of TPU slices: MaxText's and XPK's, and the nearest to a mistyped one."""

from collections.abc import Iterable

from maxtext_mudd.config import errors

_OF_XPK = {"v5e": "v5litepod"}
_OF_MAXTEXT = {theirs: ours for ours, theirs in _OF_XPK.items()}


def of_xpk(name: str) -> str:
  """XPK's name of a slice: v5litepod-16 for v5e-16."""
  return _renamed(name, _OF_XPK)


def of_maxtext(name: str) -> str:
  """MaxText's name of a slice: v5e-16 for v5litepod-16."""
  return _renamed(name, _OF_MAXTEXT)


def nearest(name: str, known: Iterable[str]) -> str:
  """The known name nearest to `name`: the nearest number of the same chips, else the most similar name.

  Args:
    name: a mistyped name, MaxText's or XPK's.
    known: MaxText's names.
  """
  name = of_maxtext(name)
  chips, _, number = name.rpartition("-")
  same_chips = [x for x in known if x.rpartition("-")[0] == chips and x.rpartition("-")[2].isdigit()]
  if same_chips and number.isdigit():
    return min(same_chips, key=lambda x: abs(int(x.rpartition("-")[2]) - int(number)))
  return errors.nearest(name, known)


def _renamed(name: str, names: dict[str, str]) -> str:
  chips, dash, size = name.partition("-")
  return names.get(chips, chips) + dash + size
