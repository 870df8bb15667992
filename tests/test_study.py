"""benchmarks/study.py: what it plans, what it refuses, what it keeps; and that its runs are paired."""

import json
import os
import signal
import subprocess
import sys
import time

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


def test_lines_for_a_cluster(tmp_path):
  plan, results = study.read(write(tmp_path)), study.Results(tmp_path / "results.jsonl")
  lines = study.submissions(plan, tmp_path, results)
  assert len(lines) == 4
  assert lines[1].endswith(
    "WORKLOAD=mudd-lr0-003-seed0 ARGS='run_name=mudd-lr0.003-seed0 mudd=true steps=101 eval_interval=25 "
    "learning_rate=0.003 init_weights_seed=0 data_shuffle_seed=0'"
  )
  results.append(
    {"kind": "cell", "cell": "mudd-lr0.003-seed0", "fingerprint": study.cells(plan, tmp_path, {})[1].fingerprint}
  )
  assert len(study.submissions(plan, tmp_path, results)) == 3


@pytest.mark.parametrize(
  "changes, says",
  [
    ({"token": 5}, "token: is not a key of studies; those are config, tokens,"),
    ({"tokens": -1}, "tokens: Input should be greater than or equal to 0"),
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


@pytest.mark.slow
def test_a_killed_study_resumes_and_gives_the_same_result(tmp_path):
  files = runs.build_corpus(tmp_path)
  (tmp_path / "model.yml").write_text(
    f"base_config: {runs.ROOT}/yaml/tiny.yml\nbase_num_decoder_layers: 2\nbase_emb_dim: 32\nbase_mlp_dim: 64\n"
    "per_device_batch_size: 2\nmax_target_length: 32\neval_steps: 1\ncheckpoint_period: 5\n"
    f"jax_cache_dir: {runs.ROOT}/.cache/jax\n" + "\n".join(file.replace("=", ": ", 1) for file in files) + "\n"
  )
  plan = tmp_path / "plan.yml"
  plan.write_text(json.dumps(PLAN | {"tokens": 64 * 200, "seeds": [0], "models": {"plain": {}}}))

  def command(name):
    paths = ["--work", str(tmp_path / name), "--results", str(tmp_path / f"{name}.jsonl")]
    return [sys.executable, str(runs.ROOT / "benchmarks" / "study.py"), str(plan), *paths]

  subprocess.run(command("whole"), check=True, env=runs.environment())
  process = subprocess.Popen(command("killed"), env=runs.environment(), start_new_session=True)
  checkpoints = tmp_path / "killed" / "plain-lr0.003-seed0" / "checkpoints"
  deadline = time.monotonic() + 300
  while not (checkpoints / "10").exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGKILL)  # the launcher, too
  process.wait()
  assert not (tmp_path / "killed.jsonl").exists(), "killed too late to tell anything"
  subprocess.run(command("killed"), check=True, env=runs.environment())
  (whole,), (resumed,) = (study.Results(tmp_path / f"{name}.jsonl").rows() for name in ("whole", "killed"))
  assert resumed["held_out"] == whole["held_out"]
  assert resumed["train"] == whole["train"]
  assert not checkpoints.exists()
