"""Fine-tuning by MaxText's trainers: what the launcher refuses, and runs of a tiny MUDD model to their ends."""

import json
import math
import pathlib
import subprocess
import sys
import types

from flax import nnx
import numpy as np
import pytest

from maxtext_mudd import plugin, post_train, report
from maxtext_mudd.checkpoints import orbax_folder, run
from maxtext_mudd.runs import end_of_data
from tests import runs

LAUNCHER = "MaxText/post_train.py"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A folder with chat.jsonl and pairs.jsonl, of 64 rows each."""
  folder = tmp_path_factory.mktemp("data")
  messages = (("user", "Add {} and 1."), ("assistant", "{}"))
  with (folder / "chat.jsonl").open("w") as chat, (folder / "pairs.jsonl").open("w") as pairs:
    for i in range(64):
      contents = [{"role": role, "content": text.format(i + (role == "assistant"))} for role, text in messages]
      chat.write(json.dumps({"messages": contents}) + "\n")
      pairs.write(json.dumps({"prompt": f"Is {i} a number?", "chosen": "yes", "rejected": "no"}) + "\n")
  return folder


def start(folder: pathlib.Path, name: str, *overrides: str) -> pathlib.Path:
  """Trains a tiny model from random weights; the checkpoint of its last step."""
  runs.train(runs.LAUNCHER, runs.RUN_YML, folder, name, "dataset_type=synthetic", "steps=2", *overrides)
  return folder / name / "checkpoints" / "1"


@pytest.fixture(scope="module")
def mudd_model(folder) -> pathlib.Path:
  return start(folder, "mudd", "learning_rate=1e-3")


def fine_tune(folder, run_name, method, *arguments, status=0, config=runs.RUN_YML) -> subprocess.CompletedProcess:
  keys = [f"base_output_directory={folder}", f"run_name={run_name}", f"jax_cache_dir={runs.ROOT / '.cache' / 'jax'}"]
  finished = subprocess.run(
    [sys.executable, LAUNCHER, method, config, f"post_train/{method}.yml", *arguments, "log_period=1", *keys],
    cwd=runs.ROOT,
    env=runs.environment(),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == status, finished.stdout[-2000:] + finished.stderr[-4000:]
  return finished


def losses(folder: pathlib.Path) -> list[float]:
  return list(runs.losses(folder).values())


def newest(run: pathlib.Path) -> pathlib.Path:
  """The parameters of the newest checkpoint of a run."""
  return run / "checkpoints" / str(max(int(path.name) for path in (run / "checkpoints").iterdir())) / "model_params"


@slow
def test_conversations(folder, mudd_model):
  """Prompts have no loss. The data end before the last step, which the run says."""
  data = f"hf_train_files={folder / 'chat.jsonl'}"
  start_from = f"load_parameters_path={mudd_model}"
  finished = fine_tune(folder, "sft", "sft", data, start_from, "learning_rate=1e-2", "steps=6")
  assert "step 1/6  loss " in finished.stdout and "finished step 6/6" in finished.stdout
  of_run = losses(folder / "sft")
  assert len(of_run) == 6 and of_run[-1] < 0.8 * of_run[0]
  before = orbax_folder.parameters(mudd_model / "items")
  after = orbax_folder.parameters(newest(folder / "sft"))
  assert before.keys() == after.keys()
  for name in ("decoder/layers_1/connection/depth_aggregate/w2", "decoder/layers_0/self_attention/query/kernel"):
    assert before[name].shape == after[name].shape and np.abs(before[name].read() - after[name].read()).max() > 1e-3

  resumed = fine_tune(folder, "sft", "sft", data, start_from, "steps=4000", status=end_of_data.DATA_ENDED)
  assert "resuming from checkpoints/6" in resumed.stdout
  done = newest(folder / "sft").parent.name
  assert f"the data ended after {done} of steps=4000" in resumed.stderr and 6 < int(done) < 4000


@slow
def test_adapter(folder, mudd_model):
  """Only an adapter is trained and saved. Merged into its model, it computes what the model with the adapter does."""
  data, start_from = f"hf_train_files={folder / 'chat.jsonl'}", f"load_parameters_path={mudd_model}"
  adapter = ("post_train/lora.yml", "lora.lora_rank=4", "lora.lora_alpha=16", data)
  fine_tune(folder, "adapter", "sft", *adapter, start_from, "learning_rate=1e-2", "steps=4")
  saved = newest(folder / "adapter")
  trained = orbax_folder.parameters(saved)
  assert len(trained) == 2 * 14 and all(name.endswith(("kernel_lora_a", "kernel_lora_b")) for name in trained)
  assert {min(x.shape) for x in trained.values()} == {4}

  restored = f"lora.lora_restore_path={saved}"
  fine_tune(folder, "restored", "sft", *adapter, restored, start_from, "steps=1")
  target = folder / "merged"
  keys = {"lora": {"lora_alpha": 16.0}, "load_parameters_path": str(mudd_model)}
  run.from_run(saved.parent, target, runs.RUN_YML, keys)
  fine_tune(folder, "of_merged", "sft", data, f"load_parameters_path={target / 'items'}", "steps=1")
  (of_adapter,), (of_merged,) = losses(folder / "restored"), losses(folder / "of_merged")
  (of_start,) = losses(folder / "adapter")[:1]
  assert of_merged == pytest.approx(of_adapter, rel=1e-5) and abs(of_adapter - of_start) > 0.1


@slow
def test_preferences(folder, mudd_model):
  """The policy starts as the reference, with which DPO's loss is log 2."""
  data = f"hf_train_files={folder / 'pairs.jsonl'}"
  fine_tune(folder, "dpo", "dpo", data, f"load_parameters_path={mudd_model}", "learning_rate=1e-2", "steps=8")
  of_run = losses(folder / "dpo")
  assert of_run[0] == pytest.approx(math.log(2), abs=1e-6)
  assert of_run[-1] < 0.6
  scalars = report.read_scalars(folder / "dpo")
  assert scalars["learning/reward_margin"][8] > 0.1
  assert orbax_folder.parameters(newest(folder / "dpo")).keys() == orbax_folder.parameters(mudd_model / "items").keys()


@slow
def test_distillation(folder, mudd_model):
  """A plain teacher of stock MaxText; the loss is the distance to its predictions alone."""
  plain = ("mudd=false", "mudd_ffn_reallocation=false", "mudd_init=stock")
  teacher = start(folder, "teacher", "learning_rate=3e-2", "steps=3", *plain)
  overrides = {
    "mudd": False,
    "mudd_ffn_reallocation": False,
    "mudd_init": "stock",
    "load_parameters_path": str(teacher),
  }
  config = folder / "student.yml"
  config.write_text(
    f"base_config: {runs.RUN_YML}\ndataset_type: synthetic\nteacher_overrides: {json.dumps(overrides)}\n"
  )
  keys = ("distill_alpha=1.0", "learning_rate=1e-2", "steps=6")
  finished = fine_tune(folder, "distilled", "distill", f"load_parameters_path={mudd_model}", *keys, config=str(config))
  assert "step 1/6  loss " in finished.stdout and "finished step 6/6" in finished.stdout
  scalars = report.read_scalars(folder / "distilled")
  distances = list(scalars["train/distill/soft_loss"].values())
  assert distances == sorted(distances, reverse=True) and distances[-1] < 0.75 * distances[0]
  # Synthetic data are one batch, which the teacher's third step read with the parameters of this checkpoint.
  assert scalars["train/distill/teacher_loss"][6] == pytest.approx(losses(folder / "teacher")[2], rel=1e-5)
  assert newest(folder / "distilled").parent.name == "6"


ADAPTER = ["sft", runs.RUN_YML, "post_train/sft.yml", "post_train/lora.yml", "hf_train_files=DATA"]
MISTAKES = {
  "no method": ([], "no method is not a method of fine-tuning; name sft, dpo, distill, before all else."),
  "another method": (["ppo"], "ppo is not a method of fine-tuning; name sft, dpo, distill, before all else."),
  "GRPO": (
    ["rl", runs.RUN_YML],
    "rl: MaxText's GRPO generates answers with vLLM alone, through the module tpu_inference, and vLLM has no model "
    "with connections; use dpo (docs/post_training.md).",
  ),
  "no keys of the method": (
    ["sft", runs.RUN_YML, "dataset_type=synthetic"],
    "use_sft=False: sft needs its own keys; name post_train/sft.yml after the model's file, or set use_sft=True.",
  ),
  "keys of another method": (
    ["dpo", runs.RUN_YML, "post_train/sft.yml", "use_dpo=true", "packing=false", "hf_train_files=DATA"],
    "Only one of `use_sft` or `use_dpo` can be True.",
  ),
  "no data": (
    ["sft", runs.RUN_YML, "post_train/sft.yml"],
    "hf_train_files='' names no data; set it to files, or to a pattern that matches files.",
  ),
  "no checkpoint": (
    ["sft", runs.RUN_YML, "post_train/sft.yml", "hf_train_files=DATA"],
    "load_parameters_path='' names no model to fine-tune; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP.",
  ),
  "a missing checkpoint": (
    ["sft", runs.RUN_YML, "post_train/sft.yml", "hf_train_files=DATA", "load_parameters_path=/none"],
    "load_parameters_path=/none: there is no such folder; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP.",
  ),
  "an adapter without rank": (
    [*ADAPTER, "lora.lora_rank=0"],
    "lora.lora_rank=0 and lora.lora_alpha=16 make no adapter; set both above 0.",
  ),
  "an adapter in scanned layers": (
    [*ADAPTER, "scan_layers=true", "mudd_ffn_reallocation=false"],
    "lora.enable_lora=True with scan_layers=True: scanned layers with connections take no adapters; set "
    "scan_layers=False.",
  ),
  "an adapter of another family": (
    [*ADAPTER, "depth_connection=mhc", "mudd_expansion_rate=2", "mudd_ffn_reallocation=false"],
    "lora.enable_lora=True with depth_connection=mhc: models with connections of this family take no adapters; set "
    "lora.enable_lora=False.",
  ),
  "an adapter for DPO": (
    ["dpo", runs.RUN_YML, "post_train/dpo.yml", "hf_train_files=DATA", "lora.enable_lora=true"],
    "lora.enable_lora=True does not work with dpo: MaxText adds no adapters to the model there; set it to False.",
  ),
  "no teacher": (
    ["distill", runs.RUN_YML, "post_train/distill.yml", "dataset_type=synthetic"],
    "teacher_overrides has no load_parameters_path, so there is no teacher; write teacher_overrides: "
    "{load_parameters_path: OUTPUT/RUN/checkpoints/STEP, ...} in the model's file.",
  ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_sentence_and_nothing_written(mistake, folder, tmp_path, monkeypatch, capsys):
  arguments, message = MISTAKES[mistake]
  arguments = [argument.replace("DATA", str(folder / "chat.jsonl")) for argument in arguments]
  if len(arguments) > 1:
    arguments += ["run_name=x", f"base_output_directory={tmp_path / 'out'}"]
  monkeypatch.setattr(sys, "argv", ["post_train.py", *arguments])
  try:
    with pytest.raises(SystemExit) as ended:
      post_train.run()
  finally:
    plugin.install(plugin.Reading())
  assert ended.value.code == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maxtext-mudd: ")]
  assert lines == [f"maxtext-mudd: {message}"]
  assert not (tmp_path / "out").exists()


def test_without_tunix(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module == "metrax" else types)
  with pytest.raises(post_train.ConfigError, match="fine-tuning needs the module metrax, which is not installed: "):
    post_train.check_installed()


def test_parameters_in_the_state_of_a_model():
  """As Tunix saves them: with random number generators and, after DPO, in `base`."""
  state = {"decoder": {"norm": {"scale": {"value": 1}}, "rngs": {"params": {"key": {"value": 2}}}}}
  assert orbax_folder.leaves(state) == {"decoder/norm/scale": (("decoder", "norm", "scale", "value"), 1)}
  assert orbax_folder.leaves({"base": state}) == {
    "decoder/norm/scale": (("base", "decoder", "norm", "scale", "value"), 1)
  }
  plain = {"params": {"params": {"decoder": {"scale": 1}}}}
  assert orbax_folder.leaves(plain) == {"decoder/scale": (("params", "params", "decoder", "scale"), 1)}


def test_students_are_saved_by_the_released_tunix(tmp_path):
  from maxtext.trainers.post_train.distillation import distillation_utils
  import optax

  from maxtext_mudd.model import distillation

  class Student(nnx.Module):
    def __init__(self, seed):
      self.kernel = nnx.Param(nnx.Rngs(seed).params.normal((2, 3)))

  manager_class = distillation.with_released_tunix(distillation_utils.MaxTextCheckpointManager)
  config = types.SimpleNamespace(learn_to_init_mode=False)
  manager = manager_class(raw_iterator=None, root_directory=str(tmp_path), student_config=config)
  student, other = Student(0), Student(1)
  optimizers = [nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param) for model in (student, other)]
  bundle = types.SimpleNamespace(student_model=student, teacher_model=other)
  assert manager.save(3, bundle, optimizers[0], force=True)
  manager.wait_until_finished()
  restored = types.SimpleNamespace(student_model=other, teacher_model=None)
  assert manager.maybe_restore(restored, optimizers[1])[0] == 3
  np.testing.assert_array_equal(other.kernel[...], student.kernel[...])
  manager.close()
