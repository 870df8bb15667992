"""benchmarks/study.py: what it plans, what it refuses, what it keeps; and that its runs are paired."""

import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time

from maxtext.configs import pyconfig
from maxtext.input_pipeline.input_pipeline_interface import create_data_iterator
from maxtext.utils import maxtext_utils
import numpy as np
import pytest
from tensorboardX import SummaryWriter

from maxtext_mudd.cluster import request, training
from maxtext_mudd.config.errors import ConfigError
from tests import models, runs

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import study
import study_plan

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
STEPS = {"tokens": 0, "models": {"plain": {}, "mudd": {"keys": {"mudd": True}}}}  # as many as the configuration says


def write(folder, **changes):
  (folder / "model.yml").write_text("per_device_batch_size: 2\nmax_target_length: 5\nsteps: 7\n")
  path = folder / "plan.yml"
  path.write_text(json.dumps(PLAN | changes))
  return path


def write_events(folder, cell, lost=()):
  """The TensorBoard events of a whole run whose losses are all 2 bits per byte, less those of some steps."""
  writer = SummaryWriter(str(folder / "tensorboard"))
  for tag, value in {
    "learning/loss": 2 * math.log(2),
    "learning/raw_grad_norm": 1.0,
    "perf/per_device_tokens_per_sec": 50.0,
    "perf/per_device_tflops_per_sec": 0.1,
    "perf/step_time_seconds": 3.0,
  }.items():
    for step in range(cell.steps):
      if step not in lost:
        writer.add_scalar(tag, value, step)
  writer.add_scalar("eval/avg_loss", 2 * math.log(2), cell.steps - 1)
  writer.add_text("num_model_parameters", "1000", 0)
  writer.close()


def test_cells_of_a_seed_differ_in_the_model_alone(tmp_path):
  plan = study_plan.read(write(tmp_path))
  plain, mudd, other_seed, _ = study_plan.cells(plan, tmp_path, {})
  assert [plain.model, mudd.model, other_seed.model] == ["plain", "mudd", "plain"]
  assert mudd.keys == plain.keys | {"mudd": True}
  assert {key for key, value in other_seed.keys.items() if plain.keys[key] != value} == {
    "init_weights_seed",
    "data_shuffle_seed",
  }


def test_a_run_is_evaluated_after_its_last_step(tmp_path):
  cell = study_plan.cells(study_plan.read(write(tmp_path)), tmp_path, {})[0]
  assert cell.keys["steps"] == 101  # 100 steps of 10 tokens, and the one that the last evaluation follows
  assert (cell.keys["steps"] - 1) % cell.keys["eval_interval"] == 0


def test_a_model_of_equal_time_waits_for_the_timing(tmp_path):
  plan = study_plan.read(write(tmp_path))
  assert "longer" not in {cell.model for cell in study_plan.cells(plan, tmp_path, {})}
  (longer, _) = [cell for cell in study_plan.cells(plan, tmp_path, {"mudd": 1.2}) if cell.model == "longer"]
  assert longer.keys["steps"] == 121


def test_names_of_runs_are_names_of_workloads_and_differ(tmp_path):
  long = "a_model_whose_name_has_more_letters_than_a_workload"
  models_of_plan = {"plain": {}, long: {"keys": {"a": 1}}, long + "_2": {"keys": {"a": 2}}}
  cells = study_plan.cells(study_plan.read(write(tmp_path, models=models_of_plan)), tmp_path, {})
  names = [cell.run_name for cell in cells]
  assert names[0] == f"plain-lr0-003-seed0-{cells[0].fingerprint[:8]}"
  assert len(set(names)) == 6
  for name in names:
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 40


def test_two_runs_of_one_folder_are_refused(tmp_path):
  long = "a_model_whose_name_has_more_letters_than_a_workload"
  plan = study_plan.read(write(tmp_path, models={"plain": {}, long: {}, long + "_2": {}}))
  with pytest.raises(ConfigError, match=f"models.{long} and models.{long}_2 are trained in the same way"):
    study_plan.cells(plan, tmp_path, {})


@pytest.mark.parametrize(
  "name, configs",
  [
    ("table_5_405m", ["transformer_pp_405m", "ablation/static"]),
    ("stability_405m", ["transformer_pp_405m"] * 2),
    ("size_405m", ["transformer_pp_405m", "mudd_405m"]),
  ],
)
def test_make_xpk_accepts_the_lines_for_a_cluster(name, configs, tmp_path, monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  plan, results = study_plan.read(STUDIES / f"{name}.yml"), study.Results(tmp_path / "results.jsonl")
  others = shlex.split("CLUSTER=a TPU_TYPE=v5p-16 NUM_SLICES=1 OUTPUT=gs://bucket/runs DOCKER_IMAGE=a/b:c DRY_RUN=1")
  lines = study.submissions(plan, STUDIES, results)
  requests = [request.read(["LAUNCHER=xpk", *shlex.split(line.removeprefix("make xpk ")), *others]) for line in lines]
  cells = study_plan.cells(plan, STUDIES, {})
  assert [x.workload for x in requests] == [cell.run_name for cell in cells]
  assert [x.config for x in requests[:2]] == [f"yaml/{config}.yml" for config in configs]
  for x, cell in zip(requests, cells, strict=True):
    training.check(x)
    assert list(x.overrides) == [f"{key}={study._written(value)}" for key, value in cell.keys.items()]
    steps = (study_plan.merged_values(cell.config) | cell.keys)["steps"]
    assert (steps - 1) % cell.keys["eval_interval"] == 0


def test_a_collected_run_is_not_of_this_machine(tmp_path):
  plan, results = study_plan.read(write(tmp_path, **STEPS)), study.Results(tmp_path / "results.jsonl")
  lines = study.submissions(plan, tmp_path, results)
  cell = study_plan.cells(plan, tmp_path, {})[1]
  (workload,) = re.findall("WORKLOAD=(mudd-lr0-003-seed0[^ ]*)", "\n".join(lines))
  write_events(tmp_path / "output" / workload, cell)
  study.collect(plan, tmp_path, results, tmp_path / "output")
  (row,) = results.rows()
  assert (row["cell"], row["cpu"], row["cores"], row["commit"]) == (cell.name, "elsewhere", None, "unknown")
  np.testing.assert_allclose(list(row["held_out"].values()), [2.0], rtol=2e-7)  # the events are float32, 6e-8
  assert study.submissions(plan, tmp_path, results) == [line for line in lines if workload not in line]


def test_curves_end_at_the_same_steps_where_a_killed_run_lost_some(tmp_path):
  cell = study_plan.cells(study_plan.read(write(tmp_path)), tmp_path, {})[0]
  for name, lost in (("whole", ()), ("killed", (9, 10))):
    write_events(tmp_path / name, cell, lost)
  whole, killed = (study.result(cell, tmp_path / name)["train"] for name in ("whole", "killed"))
  assert list(killed) == list(whole) == [*range(9, 100, 10), 100]


@pytest.mark.parametrize(
  "changes, says",
  [
    ({}, "tokens=1000 is for one device, and a run on a cluster would train on that many for each of its devices;"),
    (STEPS | {"models": {"plain": {"tokens": 20}}}, "models.plain.tokens=20 is for one device,"),
  ],
)
def test_studies_that_count_tokens_are_not_for_a_cluster(tmp_path, changes, says):
  with pytest.raises(ConfigError) as refused:
    study.submissions(study_plan.read(write(tmp_path, **changes)), tmp_path, study.Results(tmp_path / "results.jsonl"))
  assert str(refused.value).startswith(says)


@pytest.mark.parametrize(
  "changes, says",
  [
    ({"token": 5}, "token: is not a key of studies; those are config, tokens,"),
    ({"tokens": -1}, "tokens: Input should be greater than or equal to 0"),
    ({"tokens": 0}, "models.longer.same_time_as changes the tokens of a run; set tokens above 0"),
    ({"seeds": [1, 1]}, "seeds=[1, 1] has a value twice"),
    ({"baseline": "plane"}, "baseline=plane: there is no such model; the models are plain, mudd, longer"),
    (
      {"models": {"plain": {}, "24_blocks": {}}},
      "models.24_blocks: a name is lower-case letters, digits and underscores",
    ),
    ({"config": "none.yml"}, "config: none.yml: there is no such file beside it"),
    ({"models": {"plain": {"paper": 0.5}}}, "models.plain.paper: Input should be greater than 1"),
  ],
)
def test_bad_plans_are_refused_in_one_sentence(tmp_path, changes, says):
  with pytest.raises(ConfigError) as refused:
    study_plan.read(write(tmp_path, **changes))
  assert says in str(refused.value)
  assert "\n" not in str(refused.value)


def test_plans_that_are_not_there_or_no_yaml(tmp_path):
  with pytest.raises(ConfigError, match="cannot be read"):
    study_plan.read(tmp_path / "none.yml")
  (tmp_path / "bad.yml").write_text("a: [")
  with pytest.raises(ConfigError, match="is not valid YAML"):
    study_plan.read(tmp_path / "bad.yml")


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
  cell = study_plan.cells(study_plan.read(write(tmp_path)), tmp_path, {})[0]
  results.append({"kind": "cell", "cell": cell.name, "fingerprint": cell.fingerprint})
  assert results.of(cell)
  (tmp_path / "model.yml").write_text("per_device_batch_size: 2\nmax_target_length: 10\n")
  assert results.of(cell), "the cell was planned before the change"
  changed = study_plan.cells(study_plan.read(tmp_path / "plan.yml"), tmp_path, {})[0]
  assert changed.name == cell.name
  assert changed.run_name != cell.run_name
  assert results.of(changed) is None


def test_rows_of_accumulated_gradients_count_as_tokens(tmp_path):
  path = write(tmp_path)
  whole = study_plan.cells(study_plan.read(path), tmp_path, {})[0].keys
  model = tmp_path / "model.yml"
  model.write_text(model.read_text().replace("size: 2", "size: 1") + "gradient_accumulation_steps: 2\n")
  assert study_plan.cells(study_plan.read(path), tmp_path, {})[0].keys == whole


def test_a_configuration_that_changes_during_a_study_ends_it(tmp_path):
  cell = study_plan.cells(study_plan.read(write(tmp_path)), tmp_path, {})[0]
  (tmp_path / "model.yml").write_text("per_device_batch_size: 2\nmax_target_length: 10\n")
  with pytest.raises(ConfigError, match=r"model.yml has changed since the study started; start the study again\."):
    study.run(cell, tmp_path / "work")
  assert not (tmp_path / "work").exists()


def test_a_run_of_another_form_of_the_model_does_not_count(tmp_path):
  """Not even where its folder lies in --work: model, learning rate and seed are the same."""
  plan, work = study_plan.read(write(tmp_path)), tmp_path / "work"
  cell = study_plan.cells(plan, tmp_path, {})[0]
  write_events(work / cell.run_name, cell)
  (tmp_path / "model.yml").write_text("per_device_batch_size: 2\nmax_target_length: 5\nwarmup_steps_fraction: 0.5\n")
  results = study.Results(tmp_path / "results.jsonl")
  study.collect(plan, tmp_path, results, work)
  assert results.rows() == []


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_studies_of_the_project_can_be_read(path):
  assert study_plan.cells(study_plan.read(path), path.parent, {})


def test_models_of_a_seed_start_from_the_same_shared_parameters():
  """And another seed does not: then nothing would be shown."""
  plan = study_plan.read(STUDIES / "table_5.yml")

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


def test_models_of_a_seed_read_the_same_rows_in_the_same_order(tmp_path):
  """And another seed reads others: then nothing would be shown."""
  corpus = dict(file.split("=") for file in runs.build_corpus(tmp_path))
  cells = study_plan.cells(study_plan.read(STUDIES / "table_5.yml"), STUDIES, {})

  def rows(name, seed):
    (cell,) = [cell for cell in cells if (cell.model, cell.seed) == (name, seed)]
    config = pyconfig.initialize(["", str(cell.config)], **cell.keys, **corpus)
    train, evaluation = create_data_iterator(config, maxtext_utils.get_mesh_from_config(config))
    batches = [*itertools.islice(train, 3), *itertools.islice(evaluation, 1)]
    return [np.asarray(batch["inputs"]) for batch in batches]

  plain, mudd, other_seed = rows("plain", 0), rows("mudd", 0), rows("plain", 1)
  assert not (plain[0] == plain[1]).all()
  for one, another in zip(plain, mudd, strict=True):
    np.testing.assert_array_equal(one, another)
  assert all((one != another).any() for one, another in zip(plain[:3], other_seed[:3], strict=True))
  np.testing.assert_array_equal(plain[3], other_seed[3], err_msg="all seeds are evaluated on the same rows")


@pytest.mark.slow
def test_a_killed_study_resumes_and_gives_the_same_result(tmp_path):
  """Killed with its launcher by SIGKILL, and alone by SIGTERM: a launcher that went on would refuse a second one."""
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
  (cell,) = study_plan.cells(study_plan.read(plan), tmp_path, {})
  checkpoints = tmp_path / "killed" / cell.run_name / "checkpoints"
  for step, kill in ((10, lambda pid: os.killpg(pid, signal.SIGKILL)), (60, lambda pid: os.kill(pid, signal.SIGTERM))):
    process = subprocess.Popen(command("killed"), env=runs.environment(), start_new_session=True)
    deadline = time.monotonic() + 300
    while not any(path.name.isdigit() and int(path.name) >= step for path in checkpoints.glob("*")):
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
    kill(process.pid)
    assert process.wait() != 0
  assert not (tmp_path / "killed.jsonl").exists(), "killed too late to tell anything"
  subprocess.run(command("killed"), check=True, env=runs.environment())
  (whole,), (resumed,) = (study.Results(tmp_path / f"{name}.jsonl").rows() for name in ("whole", "killed"))
  assert len(whole["corpus"]) == 12
  assert resumed["corpus"] == whole["corpus"]
  assert resumed["held_out"] == whole["held_out"]
  assert resumed["train"].keys() == whole["train"].keys()
  # TensorBoard's writer had not written the events of the last steps before the kills.
  lost = {"9", "19", "29", "59", "69", "79"}
  assert {k: x for k, x in resumed["train"].items() if k not in lost} == {
    k: x for k, x in whole["train"].items() if k not in lost
  }
  assert not checkpoints.exists()
