"""Attention Residuals in models: how they start, what they count, which settings they refuse. Their maths:
test_golden_connections.py; scanned layers: test_scan.py."""

import numpy as np
import pytest

from maxtext_mudd.model import counts
from tests import models, steps
from tests.blocks import BLOCKS, config_of, packed

ATTNRES = {"mudd": True, "depth_connection": "attnres"}


@pytest.mark.parametrize("block", [x if x == "llama2" else pytest.param(x, marks=pytest.mark.slow) for x in BLOCKS])
@pytest.mark.parametrize("size", [1, 2])
def test_starts_as_the_plain_model(block, size):
  """With equal weights a sublayer reads the plain residual stream, divided by the number of sources."""
  if block == "pythia":
    with pytest.raises(ValueError, match="mudd_decoder_layer=pythia does not work with depth_connection=attnres"):
      config_of(block, **ATTNRES)
    return
  stock = config_of(block)
  data = packed(stock)
  plain = models.jitted_logits(models.build(stock), data)
  found = models.jitted_logits(models.build(config_of(block, **ATTNRES, mudd_attnres_block=size)), data)
  # The epsilon of norms weighs up to 49 times as much with 7 sources: 1.2e-5 was seen.
  np.testing.assert_allclose(found, plain, atol=1e-4 * np.abs(plain).max(), rtol=0)


@pytest.mark.parametrize("keys", [{}, {"mudd_attnres_block": 4}, {"mudd_attnres_block": 3, "scan_layers": True}])
def test_parameters_are_counted(keys):
  cfg = models.config(**ATTNRES, **keys)
  connected, plain = (
    sum(x.get_value().size for x in models.parameters(models.build(c)).values())
    for c in (cfg, models.config(scan_layers=cfg.scan_layers))
  )
  assert counts.connections_cost(cfg).parameters == connected - plain


@pytest.mark.parametrize(
  ("size", "mixed", "kept"),
  [
    (1, 1 + 2 + 3 + 4 + 5 + 6 + 7, 6 + 3),  # gradients of 7 sources but one; outputs of three attentions
    (2, 1 + 2 + 2 + 3 + 3 + 4 + 4, 3),
    (3, 1 + 2 + 2 + 2 + 3 + 3 + 3, 2 + 1),  # a block of 3 ends after an attention
    (6, 1 + 2 + 2 + 2 + 2 + 2 + 2, 1),
  ],
)
def test_counts(size, mixed, kept):
  """By hand: three blocks of width 32, so six sublayers and the final aggregate."""
  cost = counts.connections_cost(models.config(**ATTNRES, mudd_attnres_block=size))
  assert cost.parameters == 2 * 7 * 32
  assert cost.flops == 2 * 7 * 7 * 32 + 2 * mixed * 32
  assert cost.activations == kept


@pytest.mark.parametrize(
  ("keys", "sentence"),
  [
    ({"mudd_attnres_block": 0}, "mudd_attnres_block=0 is not valid: input should be greater than or equal to 1."),
    (
      {"mudd_attnres_block": 7},
      "mudd_attnres_block=7 is more than the 6 sublayers of 3 Transformer blocks; use at most 6.",
    ),
    (
      {"mudd_ways": 1},
      "mudd_ways=1 does nothing with depth_connection=attnres; leave it at 4, or set depth_connection=dense.",
    ),
    (
      {"mudd_expansion_rate": 2},
      "mudd_expansion_rate=2 does nothing with depth_connection=attnres; leave it at 4, or set "
      "depth_connection=hyper_connections or mhc.",
    ),
    (
      {"depth_connection": "dense", "mudd_attnres_block": 2},
      "mudd_attnres_block=2 does nothing with depth_connection=dense; leave it at 1, or set depth_connection=attnres.",
    ),
    (
      {"enable_dropout": True, "dropout_rate": 0.1},
      "dropout_rate=0.1 does not work with depth_connection=attnres: MaxText drops parts of one residual stream, which "
      "this family does not have; set dropout_rate=0.",
    ),
  ],
)
def test_settings_that_do_not_work(keys, sentence):
  with pytest.raises(ValueError) as error:
    models.config(**(ATTNRES | keys))
  assert str(error.value) == sentence


def test_metrics():
  """With equal weights all but one of N goes to older sources."""
  step, state = steps.prepare(models.config(**ATTNRES, record_internal_nn_metrics=1))
  steps.set_zero(state, "depth_queries/query")
  scalars = step(state, models.batch(models.config()))[1]["scalar"]
  found = {key: float(x) for key, x in scalars.items() if key.startswith("mudd/older_weight")}
  assert found == pytest.approx(
    {f"mudd/older_weight/attention/da_{i:03d}": 1 - 1 / (2 * i + 1) for i in range(3)}
    | {f"mudd/older_weight/ffn/da_{i:03d}": 1 - 1 / (2 * i + 2) for i in range(3)}
    | {"mudd/older_weight/x/da_003": 1 - 1 / 7},
    abs=3e-7,  # one rounding of float32, 4e-8, was seen
  )
