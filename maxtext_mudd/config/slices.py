"""Names of TPU slices: MaxText's, XPK's where they differ, and the nearest to one that is mistyped."""

from collections.abc import Iterable
import difflib

_OF_XPK = {"v5e": "v5litepod"}
_OF_MAXTEXT = {theirs: ours for ours, theirs in _OF_XPK.items()}


def of_xpk(name: str) -> str:
  """The slice by XPK's name: v5litepod-16 for v5e-16."""
  return _renamed(name, _OF_XPK)


def of_maxtext(name: str) -> str:
  """The slice by MaxText's name: v5e-16 for v5litepod-16."""
  return _renamed(name, _OF_MAXTEXT)


def nearest(name: str, known: Iterable[str]) -> str:
  """Of MaxText's names: of the same chips, the nearest number of them; else the most similar name."""
  name = of_maxtext(name)
  chips, _, number = name.rpartition("-")
  of_chips = [x for x in known if x.rpartition("-")[0] == chips and x.rpartition("-")[2].isdigit()]
  if of_chips and number.isdigit():
    return min(of_chips, key=lambda x: abs(int(x.rpartition("-")[2]) - int(number)))
  return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _renamed(name: str, names: dict[str, str]) -> str:
  chips, dash, size = name.partition("-")
  return names.get(chips, chips) + dash + size
