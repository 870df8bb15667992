"""benchmarks/study.py: what it plans, what it refuses, what it keeps; and that its runs are paired."""

import json
import sys

import numpy as np
import pytest

from maxtext_mudd.errors import ConfigError
from tests import models, runs

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import study

STUDIES = runs.ROOT / "yaml" / "study"
PLANS = sorted(path for path in STUDIES.glob("*.yml") if "\nmodels:" in path.read_text())
PLAN = {
  "config": "model.yml",
  "tokens": 1000,
  "seeds": [0, 1],
  "learning_rates": [0.003],
  "baseline": "plain",
  "models": {"plain": {}, "mudd": {"keys": {"mudd": True}}, "longer": {"same_time_as": "mudd"}},
}


def write(folder, **changes):
  (folder / "model.yml").write_text("per_device_batch_size: 2\nmax_target_length: 5\n")
  path = folder / "plan.yml"
  path.write_text(json.dumps(PLAN | changes))
  return path


def test_cells_of_a_seed_differ_in_the_model_alone(tmp_path):
  plan = study.read(write(tmp_path))
  plain, mudd, other_seed, _ = study.cells(plan, tmp_path, {})
  assert [plain.model, mudd.model, other_seed.model] == ["plain", "mudd", "plain"]
  assert mudd.keys == plain.keys | {"mudd": True}
  assert {key for key, value in other_seed.keys.items() if plain.keys[key] != value} == {
    "init_weights_seed",
    "data_shuffle_seed",
  }


def test_a_run_is_evaluated_after_its_last_step(tmp_path):
  cell = study.cells(study.read(write(tmp_path)), tmp_path, {})[0]
  assert cell.keys["steps"] == 101  # 100 steps of 10 tokens, and the one that the last evaluation follows
  assert (cell.keys["steps"] - 1) % cell.keys["eval_interval"] == 0


def test_a_model_of_equal_time_waits_for_the_timing(tmp_path):
  plan = study.read(write(tmp_path))
  assert "longer" not in {cell.model for cell in study.cells(plan, tmp_path, {})}
  (longer, _) = [cell for cell in study.cells(plan, tmp_path, {"mudd": 1.2}) if cell.model == "longer"]
  assert longer.keys["steps"] == 121


@pytest.mark.parametrize(
  "changes, says",
  [
    ({"token": 5}, "token: is not a key of studies; those are config, tokens,"),
    ({"tokens": 0}, "tokens: Input should be greater than 0"),
    ({"seeds": [1, 1]}, "seeds=[1, 1] names one of them twice"),
    ({"baseline": "plane"}, "baseline=plane: there is no such model; the models are plain, mudd, longer"),
    ({"config": "none.yml"}, "config: none.yml: there is no such file beside it"),
    ({"models": {"plain": {"paper": 0.5}}}, "models.plain.paper: Input should be greater than 1"),
  ],
)
def test_bad_plans_are_refused_in_one_sentence(tmp_path, changes, says):
  with pytest.raises(ConfigError) as refused:
    study.read(write(tmp_path, **changes))
  assert says in str(refused.value)
  assert "\n" not in str(refused.value)


def test_plans_that_are_not_there_or_no_yaml(tmp_path):
  with pytest.raises(ConfigError, match="cannot be read"):
    study.read(tmp_path / "none.yml")
  (tmp_path / "bad.yml").write_text("a: [")
  with pytest.raises(ConfigError, match="is not valid YAML"):
    study.read(tmp_path / "bad.yml")


def test_results_survive_a_write_that_was_cut_off(tmp_path):
  results = study.Results(tmp_path / "results.jsonl")
  results.append({"kind": "cell", "cell": "a"})
  with results.path.open("a") as file:
    file.write('{"kind": "cel')
  assert [row["cell"] for row in results.rows()] == ["a"]
  results.append({"kind": "cell", "cell": "b"})
  assert [row["cell"] for row in results.rows()] == ["a", "b"]


def test_a_result_of_another_form_of_the_model_does_not_count(tmp_path):
  results = study.Results(tmp_path / "results.jsonl")
  cell = study.cells(study.read(write(tmp_path)), tmp_path, {})[0]
  results.append({"kind": "cell", "cell": cell.name, "fingerprint": cell.fingerprint})
  assert results.of(cell)
  (tmp_path / "model.yml").write_text("per_device_batch_size: 2\nmax_target_length: 10\n")
  changed = study.cells(study.read(tmp_path / "plan.yml"), tmp_path, {})[0]
  assert changed.name == cell.name
  assert results.of(changed) is None


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_studies_of_the_project_can_be_read(path):
  assert study.cells(study.read(path), path.parent, {})


def test_models_of_a_seed_start_from_the_same_shared_parameters():
  """And another seed does not: then nothing would be shown."""
  plan = study.read(STUDIES / "table_5.yml")

  def start(name, seed):
    keys = plan.models[name].keys
    if keys.get("mudd_ffn_reallocation"):
      keys = keys | {"mudd_ffn_round_to": 8}
    parameters = models.parameters(models.build(models.config(**keys), seed))
    return {path: np.asarray(variable.get_value()) for path, variable in parameters.items()}

  plain, other = start("plain", 5), start("plain", 6)
  for name in ("mudd", "static", "dynamic"):
    connected = start(name, 5)
    shared = [path for path in plain.keys() & connected.keys() if plain[path].shape == connected[path].shape]
    assert len(shared) > len(plain) / 2
    for path in shared:
      np.testing.assert_array_equal(connected[path], plain[path], err_msg=path)
      if not path.endswith("scale"):
        assert (plain[path] != other[path]).any(), path
