"""Numbers that are equal but for rounding."""

import pytest


def close(expected):
  """Of float64, computed in another order: a few roundings of 1.1e-16."""
  return pytest.approx(expected, rel=1e-15, abs=0)
