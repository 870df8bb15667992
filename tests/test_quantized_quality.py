"""Quantization costs a model with connections no more loss than it costs the plain model."""

import math
import sys

import pytest

from tests import runs

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import quantization


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["qwix:int8", "qwix:fp8"])
def test_loss_increases_no_more_than_without_connections(recipe):
  losses = quantization.compare([recipe], seeds=3, steps=quantization.STEPS)
  of_plain, of_mudd = (quantization.increases(losses[name], recipe) for name in ("plain", "MUDD"))
  (plain, noise_of_plain), (mudd, noise_of_mudd) = map(quantization.mean_and_interval, (of_plain, of_mudd))
  noise = math.hypot(noise_of_plain, noise_of_mudd)  # 0.001 and 0.003 were seen
  assert noise < 0.02  # of losses around 1.8
  assert mudd - plain < noise  # 0.0003 and 0.0001 were seen
  assert min(losses["MUDD"][""]) < 2.5  # and 5.8 at the start: the models learn
