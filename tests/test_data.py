"""Megatron's .bin and .idx maps, as the Pile comes: the tokens that the model sees are those of the file."""

import jax
from maxtext.common.data_loader import DataLoader
from maxtext.trainers.pre_train import train
import numpy as np
import pytest

from tests import data_files, runs

EOD = 0
ROWS, LENGTH = 2, 32


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  rng = np.random.default_rng(0)
  documents = [np.append(rng.integers(1, 300, n), EOD) for n in rng.integers(5, 90, 40)]
  prefix = tmp_path_factory.mktemp("maps") / "document"
  data_files.write_pair(prefix, documents)
  return prefix, np.concatenate(documents)


@pytest.fixture
def settings_of_jax():
  """MaxText's `main` sets some for its process."""
  names = ("jax_default_prng_impl", "jax_compilation_cache_dir", "jax_use_shardy_partitioner")
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_tokens_of_the_file_across_a_resume(pair, tmp_path, monkeypatch, settings_of_jax):
  prefix, tokens = pair
  seen = []
  load = DataLoader.load_next_batch_pre_sharding

  def record(self):
    batch = load(self)
    seen.append({key: np.asarray(value) for key, value in batch.items()})
    return batch

  monkeypatch.setattr(DataLoader, "load_next_batch_pre_sharding", record)
  argv = ["", runs.RUN_YML, str(runs.ROOT / "yaml" / "data" / "pile.yml"), "run_name=maps", "log_config=false"]
  argv += [f"base_output_directory={tmp_path}", f"grain_train_files={prefix}", "checkpoint_period=2"]
  argv += [
    f"max_target_length={LENGTH}",
    f"per_device_batch_size={ROWS}",
    "grain_worker_count=0",
    "enable_data_shuffling=false",
  ]

  def rows_of_run(steps):
    seen.clear()
    train.main([*argv, f"steps={steps}"])
    return len(seen)

  assert tokens.size > 8 * ROWS * LENGTH
  step = 0
  for steps in (3, 7):
    loaded = rows_of_run(steps)
    assert loaded >= steps - step
    for batch in seen[: steps - step]:
      first = step * ROWS * LENGTH
      expected = tokens[first : first + ROWS * LENGTH].reshape(ROWS, LENGTH)
      np.testing.assert_array_equal(batch["inputs"], expected)
      np.testing.assert_array_equal(batch["targets"][:, :-1], expected[:, 1:])
      np.testing.assert_array_equal(batch["inputs_position"], np.tile(np.arange(LENGTH), (ROWS, 1)))
      assert (batch["inputs_segmentation"] == 1).all()  # documents in a row see each other
      # Learnt from: every position but the last of a row and those before an end of document.
      learnt = np.pad(expected[:, 1:] != EOD, ((0, 0), (0, 1)))
      np.testing.assert_array_equal(batch["targets_segmentation"] != 0, learnt)
      step += 1
  assert step == 7
