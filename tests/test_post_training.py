"""Fine-tuning by MaxText's trainers: runs of a tiny MUDD model to their ends, and what they need of Tunix."""

import json
import math
import pathlib
import re
import subprocess
import sys
import types

from flax import nnx
from maxtext.configs import pyconfig
from maxtext.input_pipeline import hf_data_processing, input_pipeline_interface
from maxtext.utils import maxtext_utils
import numpy as np
import pytest

import maxtext_mudd
from maxtext_mudd import plugin, post_train, report
from maxtext_mudd.checkpoints import orbax_folder, run
from maxtext_mudd.model import evaluation_rows
from maxtext_mudd.runs import end_of_data
from tests import conversations, runs

LAUNCHER = "MaxText/post_train.py"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  return conversations.write(tmp_path_factory.mktemp("data"))


def start(folder: pathlib.Path, name: str, *overrides: str) -> pathlib.Path:
  """Trains a tiny model from random weights; the checkpoint of its last step."""
  runs.train(runs.LAUNCHER, runs.RUN_YML, folder, name, "dataset_type=synthetic", "steps=2", *overrides)
  return folder / name / "checkpoints" / "1"


@pytest.fixture(scope="module")
def mudd_model(folder) -> pathlib.Path:
  return start(folder, "mudd", "learning_rate=1e-3")


def fine_tune(
  folder, run_name, method, *arguments, status=0, config=runs.RUN_YML, **env
) -> subprocess.CompletedProcess:
  keys = [f"base_output_directory={folder}", f"run_name={run_name}", f"jax_cache_dir={runs.ROOT / '.cache' / 'jax'}"]
  finished = subprocess.run(
    [sys.executable, LAUNCHER, method, config, f"post_train/{method}.yml", *arguments, "log_period=1", *keys],
    cwd=runs.ROOT,
    env=runs.environment(**env),
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
  """Prompts have no loss. Evaluations read the same rows. The data end before the last step, which the run says."""
  data, start_from = f"hf_train_files={folder / 'chat.jsonl'}", f"load_parameters_path={mudd_model}"
  keys = (data, start_from, "learning_rate=1e-2")
  evaluation = ("eval_interval=2", f"hf_eval_files={folder / 'chat.jsonl'}", "eval_steps=-1")
  finished = fine_tune(folder, "sft", "sft", *keys, *evaluation, "per_device_batch_size=4", "steps=6")
  assert "step 1/6  loss " in finished.stdout and "finished step 6/6" in finished.stdout
  of_run = losses(folder / "sft")
  assert len(of_run) == 6 and of_run[-1] < 0.8 * of_run[0]
  scalars = report.read_scalars(folder / "sft")
  evaluated = scalars[report.EVAL_LOSS]
  assert list(evaluated) == [0, 2, 4, 6] and evaluated[6] < 0.8 * evaluated[0]
  assert len(set(scalars["eval/total_weights"].values())) == 1
  shown = re.findall(r"eval after step (\d+): ([\d.]+) bits per byte", finished.stdout)
  # MaxText prints nats with three decimals.
  expected = {step: pytest.approx(loss / math.log(2), abs=1.5e-3) for step, loss in evaluated.items()}
  assert {int(step): float(bits) for step, bits in shown} == expected

  before = orbax_folder.parameters(mudd_model / "items")
  after = orbax_folder.parameters(newest(folder / "sft"))
  assert before.keys() == after.keys()
  for name in ("decoder/layers_1/connection/depth_aggregate/w2", "decoder/layers_0/self_attention/query/kernel"):
    assert before[name].shape == after[name].shape and np.abs(before[name].read() - after[name].read()).max() > 1e-3

  mesh = ("ici_fsdp_parallelism=4", "per_device_batch_size=1", "steps=6")
  fine_tune(folder, "mesh", "sft", *keys, *mesh, XLA_FLAGS="--xla_force_host_platform_device_count=4")
  assert losses(folder / "mesh") == pytest.approx(of_run, rel=1e-6)  # 1.2e-7 was seen

  resumed = fine_tune(folder, "sft", "sft", *keys, "steps=4000", status=end_of_data.DATA_ENDED)
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
def test_odds_ratios(folder, mudd_model):
  """ORPO's first loss (Hong et al. 2024, Eqs. 4, 6 and 7), restated for each answer without padding. As in Tunix, P is
  the probability of the whole answer."""
  keys = {"dpo": {"algo": "orpo", "orpo_lambda": 3.0}, "hf_train_files": str(folder / "pairs.jsonl")}
  arguments = ("dpo.algo=orpo", "dpo.orpo_lambda=3", f"hf_train_files={keys['hf_train_files']}", "steps=1")
  fine_tune(folder, "orpo", "dpo", *arguments, f"load_parameters_path={mudd_model}")

  model, _ = maxtext_mudd.from_run(mudd_model, runs.RUN_YML)
  config = pyconfig.initialize_pydantic(
    ["", runs.RUN_YML, "post_train/dpo.yml"], run_name="x", log_config=False, **keys
  )
  iterator, _ = input_pipeline_interface.create_data_iterator(config, maxtext_utils.get_mesh_from_config(config))
  batch = {name: np.asarray(x) for name, x in next(iterator).items()}

  def log_likelihood(row: int, answer: str) -> tuple[float, int]:
    """log P of an answer, and its number of tokens."""
    parts = [batch[f"{x}_ids"][row][batch[f"{x}_mask"][row] == 1] for x in ("prompt", answer)]
    logits = np.asarray(maxtext_mudd.logits(model, np.concatenate(parts)[None]), np.float64)[0, len(parts[0]) - 1 : -1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log_p, parts[1][:, None], -1).sum(), len(parts[1])

  def log_odds(log_p: float) -> float:
    return log_p - math.log1p(-math.exp(log_p))

  expected = []
  for row in range(len(batch["prompt_ids"])):
    (chosen, length), (rejected, _) = (log_likelihood(row, answer) for answer in ("chosen", "rejected"))
    ratio = log_odds(chosen) - log_odds(rejected)
    expected.append(-chosen / length + 3 * math.log1p(math.exp(-ratio)))
  assert losses(folder / "orpo") == pytest.approx([np.mean(expected)], rel=1e-6)


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


def test_every_evaluation_reads_the_same_rows(folder):
  plugin.install(plugin.Reading())
  files = dict.fromkeys(("hf_train_files", "hf_eval_files"), str(folder / "chat.jsonl"))
  keys = {**files, "eval_interval": 1, "eval_per_device_batch_size": 4, "run_name": "x", "log_config": False}
  config = pyconfig.initialize(["", runs.RUN_YML, "post_train/sft.yml"], **keys)
  make = evaluation_rows.from_the_first(hf_data_processing.make_hf_eval_iterator)
  iterator = make(config, maxtext_utils.get_mesh_from_config(config), [0])
  first, second = ([np.asarray(batch["inputs"]) for batch in iterator] for _ in range(2))
  assert len(first) > 2
  np.testing.assert_array_equal(first, second)
