"""MaxText's blocks without attention, which are scanned and read one stream, against a float64 reference."""

import numpy as np
import pytest

import maxtext_mudd
from maxtext_mudd.checkpoints import layout
from tests import models, steps
from tests.blocks import SIMPLE, TOLERANCE, expected, packed
from tests.oracle import Arch, Oracle

SCANNED = {"scan_layers": True}
MUDD = {"mudd": True, "mudd_ways": 1, **SCANNED}


class SimpleOracle(Oracle):
  def block(self, i, xq, xk, xv, xr, positions, segments):
    """Products of the input and matrices, without a residual sum."""
    layer, x = f"decoder/layers_{i - 1}", xr
    for name in ("weights", "ff_1", "ff_2"):
      x = x @ self[f"{layer}/{name}"] if f"{layer}/{name}" in self.parameters else x
    return x


def config_of(block, **keys):
  return models.config(decoder_block=block, **keys)


@pytest.mark.parametrize("block", SIMPLE)
def test_starts_as_the_stock_model(block):
  stock, mudd = config_of(block, **SCANNED), config_of(block, **MUDD)
  data = packed(stock)
  plain = models.jitted_logits(models.build(stock), data)
  assert np.std(plain) > 0.1
  np.testing.assert_array_equal(models.jitted_logits(models.build(mudd), data), plain)


@pytest.mark.parametrize("block", SIMPLE)
def test_equals_the_oracle(block):
  config = config_of(block, **MUDD)
  model = models.build(config)
  start = {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}
  singles = models.random_parameters({path: x.shape for path, x in layout.unstack(start, config).items()})
  models.set_parameters(model, layout.stack(singles, config))
  oracle, data = SimpleOracle(Arch(3, ways=1), singles), packed(config)
  found = models.jitted_logits(model, data)
  assert np.abs(found - expected(oracle, data)).max() <= TOLERANCE
  for aggregate in (1, 2, 3):
    for source in range(1, aggregate + 1):
      oracle.shifted = (aggregate, source)
      assert np.abs(found - expected(oracle, data)).max() > 10 * TOLERANCE, oracle.shifted


@pytest.mark.slow
@pytest.mark.parametrize("block", SIMPLE)
def test_trains(block):
  config = config_of(block, **MUDD, learning_rate=1e-3, steps=20, warmup_steps_fraction=0.05)
  step, state = steps.prepare(config)
  losses = []
  for _ in range(3):
    state, found = step(state, models.batch(config))
    losses.append(float(found["scalar"]["learning/loss"]))
  assert losses[2] < losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("block", SIMPLE)
def test_generates_what_teacher_forcing_says(block):
  config = config_of(block, **MUDD, max_target_length=24)
  model = models.build(config)
  models.randomise(model)
  prompts = [[1, 7, 11, 2, 30], [5, 9]]
  for row, prompt in zip(maxtext_mudd.generate(model, config, prompts, 6), prompts):
    models.check_greedy(model, row, len(prompt), 6)


@pytest.mark.parametrize("block", SIMPLE)
def test_maxtext_does_not_run_single_layers(block):
  """The reason why they are refused."""
  config = config_of(block)
  with pytest.raises(ValueError, match="too many values to unpack"):
    models.logits(models.build(config), models.batch(config))
