"""A weight MLP that several DAs of `mudd_placements` share: trained, saved, resumed, loaded, decoded and upcycled.

Models with one are compared with the oracle in test_connections.py.
"""

import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

import maxtext_mudd
from maxtext_mudd import convert
from tests import models, runs, steps
from tests.placements import BLOCKS, SHARED

KEYS = {"mudd": True, "mudd_placements": SHARED, "base_num_decoder_layers": BLOCKS}
MLPS = 3  # of five DAs


def paths(values, name: str) -> list[str]:
  return [path for path in values if path.split("/")[-1] == name]


def test_parameters_exist_once():
  """Static weights are of each DA."""
  found = models.parameters(models.build(models.config(**KEYS, mudd_weight_scale=True, mudd_weight_norm_scale=True)))
  shared = ("w1", "w2", "weight_scale", "weight_norm_scale")
  assert {name: len(paths(found, name)) for name in (*shared, "a")} == dict.fromkeys(shared, MLPS) | {"a": 5}


def test_starts_with_the_values_of_the_first_aggregate():
  """DA_10 and DA_11: the path of the latter comes first in alphabetical order, so that w1 has it."""
  row = {"sources": "last:1", "streams": "vr"}
  rows = [row | {"block": 9, "mlp": "late"}, row | {"block": 10, "mlp": "late"}]
  alone = [{name: x for name, x in row.items() if name != "mlp"} for row in rows]
  shared, separate = (
    models.parameters(models.build(models.config(mudd=True, base_num_decoder_layers=11, mudd_placements=x)))
    for x in (rows, alone)
  )
  (path,) = paths(shared, "w1")
  first = separate["decoder/layers_9/connection/depth_aggregate/w1"].get_value()
  np.testing.assert_array_equal(shared[path].get_value(), first)
  assert not np.array_equal(separate["decoder/layers_10/connection/depth_aggregate/w1"].get_value(), first)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "minimal"])
def test_remat_policies_change_nothing(policy):
  """With full rematerialisation a shared parameter goes from one block to the next through `jax.checkpoint`."""
  loss, _, expected = steps.value_and_gradients(models.config(**KEYS, remat_policy="full"))
  found_loss, _, found = steps.value_and_gradients(models.config(**KEYS, remat_policy=policy))
  assert found_loss == pytest.approx(loss, rel=1e-6)
  for path, gradient in expected.items():
    # The errors seen are up to 1.9e-5 of the largest entry, and 1.3e-4 without sharing, where XLA fuses otherwise.
    np.testing.assert_allclose(found[path], gradient, rtol=0, atol=1e-4 * np.abs(gradient).max(), err_msg=str(path))


RUN = [
  "dataset_type=synthetic",
  "dtype=float32",
  "learning_rate_schedule_steps=4",
  "async_checkpointing=false",
  "base_num_decoder_layers=3",
]
TABLE = "[{block: 1..2, sources: [0, last:1], streams: vr, mlp: both}]"
MODEL = {"mudd_placements": yaml.safe_load(TABLE), "base_num_decoder_layers": 3}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_is_resumed_and_loaded(optimizer, tmp_path):
  keys = [*RUN, f"mudd_placements={TABLE}", f"opt_type={optimizer}"]

  def train(name, number):
    return runs.train(runs.LAUNCHER, runs.RUN_YML, tmp_path, name, *keys, f"steps={number}")

  whole = train("whole", 4)
  train("resumed", 2)
  resumed = train("resumed", 4)
  assert {step: resumed[step] for step in (2, 3)} == {step: whole[step] for step in (2, 3)}

  checkpoint = tmp_path / "resumed" / "checkpoints" / "3"
  decoder = ocp.PyTreeCheckpointer().restore(checkpoint / "items")["params"]["params"]["decoder"]
  by_block = [decoder[f"layers_{k}"]["connection"]["depth_aggregate"] for k in (1, 2)]
  assert [sorted(x) for x in by_block] == [["a", "w1", "w2"], ["a"]]
  assert np.abs(by_block[0]["w2"]).max() > 0

  of_model = ["base_num_decoder_layers=3", f"mudd_placements={TABLE}"]
  folders = ["--checkpoint", str(checkpoint), "--maxtext-dir", str(tmp_path / "m")]
  convert.main(["from-run", *folders, runs.RUN_YML, *of_model])
  tokens = [[5, 9, 3, 7]]
  of_run, _ = maxtext_mudd.from_run(checkpoint, runs.RUN_YML, **MODEL)
  of_folder, _ = maxtext_mudd.from_pretrained(tmp_path / "m")
  logits = maxtext_mudd.logits(of_run, tokens)
  np.testing.assert_array_equal(maxtext_mudd.logits(of_folder, tokens), logits)
  w2 = of_run.decoder.layers_2.connection.depth_aggregate.w2
  w2.set_value(0 * w2.get_value())  # that of both DAs
  assert not np.any(of_run.decoder.layers_1.connection.depth_aggregate.w2.get_value())
  assert not np.array_equal(maxtext_mudd.logits(of_run, tokens), logits)


@pytest.mark.slow
def test_decoding():
  """Each new token is the most probable one after all before it."""
  config = models.config(**KEYS, max_target_length=24)
  model = models.build(config)
  models.randomise(model)
  prompts = [[5, 9, 3, 7, 1, 8], [2, 4]]
  for row, prompt in zip(maxtext_mudd.generate(model, config, prompts, 6), prompts):
    logits = np.asarray(maxtext_mudd.logits(model, row[None, : len(prompt) + 6]))[0]
    np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(-1), row[len(prompt) : len(prompt) + 6])
