"""Two train steps of every decoder block through the launcher."""

import math

import pytest

from tests import models, runs
from tests.blocks import KEYS, SIMPLE, SINGLE

SYNTHETIC = str(runs.ROOT / "yaml" / "data" / "synthetic.yml")


@pytest.mark.slow
@pytest.mark.parametrize("block", [*KEYS, *SIMPLE])
def test_trains_by_the_launcher(block, tmp_path):
  keys = {key: x for key, x in models.SMALL.items() if key not in ("run_name", "jax_cache_dir")}
  keys |= {"decoder_block": block, "scan_layers": block not in SINGLE} | KEYS.get(block, {"mudd_ways": 1})
  keys |= {"mudd": True, "steps": 2, "hardware": "cpu", "skip_jax_distributed_system": True}
  overrides = [f"{key}={str(x).replace(chr(39), '')}" for key, x in keys.items()]  # lists as YAML has them
  losses = runs.train(runs.LAUNCHER, SYNTHETIC, tmp_path, "run", *overrides)
  assert sorted(losses) == [0, 1]
  assert all(math.isfinite(loss) and 3 < loss < 6 for loss in losses.values())  # log(64) is 4.2
