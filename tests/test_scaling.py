"""Scaling fits, on losses with a known law."""

import sys

import numpy as np
import pytest

from maxtext_mudd.errors import ConfigError
from tests import runs

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import scaling


def law(factor, exponent, noise=0.0, seeds=range(3)):
  """Points of L = factor·C^(-exponent) at three sizes, with multiplicative noise of a seed."""
  random = np.random.default_rng(1)
  return [
    scaling.Point(size, seed, compute, factor * compute**-exponent * np.exp(noise * random.standard_normal()))
    for size, compute in (("s", 1e15), ("m", 4e15), ("l", 2e16))
    for seed in seeds
  ]


def test_a_known_law_is_recovered():
  fitted = scaling.fit(law(40.0, 0.08), law(38.0, 0.08))
  np.testing.assert_allclose([fitted.plain, fitted.connected, fitted.exponent], [40, 38, 0.08], rtol=1e-8)
  np.testing.assert_allclose(fitted.multiplier, (40 / 38) ** (1 / 0.08), rtol=1e-7)


def test_the_multiplier_is_the_compute_at_equal_loss():
  fitted = scaling.fit(law(40.0, 0.08), law(38.0, 0.08))
  loss = fitted.loss(1e16, "connected")
  np.testing.assert_allclose(fitted.loss(1e16 * fitted.multiplier, "plain"), loss, rtol=1e-12)


def test_the_interval_holds_the_truth_and_shrinks_with_the_noise():
  truth = (40 / 38) ** (1 / 0.08)
  widths = []
  for noise in (0.004, 0.001):
    low, high = scaling.interval(law(40.0, 0.08, noise, range(8)), law(38.0, 0.08, noise, range(8)), draws=300)
    assert low < high
    assert low - 0.15 < truth < high + 0.15
    widths.append(high - low)
  assert widths[1] < widths[0] / 2


def test_too_few_sizes_are_refused():
  one = [point for point in law(40.0, 0.08) if point.size == "s"]
  with pytest.raises(ConfigError, match="--connected has results of fewer than two sizes"):
    scaling.fit(law(40.0, 0.08), one)


def test_loss_that_rises_with_compute_is_refused():
  with pytest.raises(ConfigError, match="does not fall with compute"):
    scaling.fit(law(1.0, -0.05), law(0.9, -0.05))
