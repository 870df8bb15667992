"""Settings with which MaxText's trainer fails late, or trains nothing: one sentence before anything is written."""

import os
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from maxtext_mudd import plugin, train
from maxtext_mudd.config.errors import ConfigError
from tests import models, runs

CREDENTIALS = (
  "GCE_METADATA_HOST",
  "GCE_METADATA_ROOT",
  "GOOGLE_APPLICATION_CREDENTIALS",
  "KUBERNETES_SERVICE_HOST",
)
MISTAKES = {
  "no steps": (["steps=0"], "steps=0 is not a number of steps to train for; set it to 1 or more."),
  "steps of a schedule without steps": (
    ["steps=-1"],
    "steps=-1 is not a number of steps to train for; set it to 1 or more.",
  ),
  "no period of checkpoints": (
    ["checkpoint_period=0"],
    "checkpoint_period=0 is not a number of steps between checkpoints; set it to 1 or more.",
  ),
  "a period below zero": (
    ["checkpoint_period=-1"],
    "checkpoint_period=-1 is not a number of steps between checkpoints; set it to 1 or more.",
  ),
  "no period of logs": (
    ["log_period=0"],
    "log_period=0 is not a number of steps between two flushes of the log; set it to 1 or more.",
  ),
  "no epochs": (["num_epoch=0"], "num_epoch=0 is not a number of passes over the data; set it to 1 or more."),
  "no profile": (
    ["profiler=xplane", "profiler_steps=0"],
    "profiler_steps=0 is not a number of steps to profile; set it to 1 or more.",
  ),
  "fewer than no workers": (
    ["grain_worker_count=-2"],
    "grain_worker_count=-2 is not a number of processes; set it to 0 or more, or -1 for MaxText's choice.",
  ),
  "seed below zero": (
    ["data_shuffle_seed=-1", "enable_data_shuffling=true"],
    "data_shuffle_seed=-1 is not a seed that data can be shuffled with; set it to 0 or more, below 4294967296.",
  ),
  "DPO": (
    ["use_dpo=true"],
    "use_dpo=True does not work with pre-training; start python3 -m maxtext_mudd.post_train dpo instead, or set "
    "use_dpo=False.",
  ),
  "LoRA": (
    ["lora.enable_lora=true"],
    "lora.enable_lora=True does not work with pre-training: MaxText adds no adapters to the model there, and so trains "
    "and saves nothing; start python3 -m maxtext_mudd.post_train sft instead, or set lora.enable_lora=False.",
  ),
  "goodput without credentials": (
    ["enable_goodput_recording=true"],
    "enable_goodput_recording=True needs Google Cloud's credentials, and this machine has none; run `gcloud auth "
    "application-default login`, or set enable_goodput_recording=False.",
  ),
  "monitoring without credentials": (
    ["monitor_goodput=true"],
    "monitor_goodput=True needs Google Cloud's credentials, and this machine has none; run `gcloud auth "
    "application-default login`, or set monitor_goodput=False.",
  ),
}


@pytest.fixture(autouse=True)
def restore_reading():
  yield
  plugin.install(plugin.Reading())


@pytest.fixture
def no_credentials(tmp_path, monkeypatch):
  for name in CREDENTIALS:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.delenv("DECOUPLE_GCLOUD", raising=False)
  monkeypatch.setenv("NO_GCE_CHECK", "true")
  monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))


@pytest.fixture
def data(tmp_path) -> list[str]:
  pa.parquet.write_table(pa.table({"text": ["some text"]}), tmp_path / "text.parquet")
  return [f"grain_train_files={tmp_path / 'text.parquet'}", f"grain_eval_files={tmp_path / 'text.parquet'}"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_sentence_and_nothing_written(mistake, data, no_credentials, tmp_path, monkeypatch, capsys):
  overrides, message = MISTAKES[mistake]
  output = tmp_path / "out"
  monkeypatch.setattr(
    sys, "argv", ["train.py", runs.RUN_YML, "run_name=x", f"base_output_directory={output}", *data, *overrides]
  )
  with pytest.raises(SystemExit) as ended:
    train.run()
  assert ended.value.code == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maxtext-mudd: ")]
  assert lines == [f"maxtext-mudd: {message}"]
  assert not output.exists()


def config(tmp_path, **overrides):
  return models.config(dataset_type="synthetic", run_name="x", base_output_directory=str(tmp_path), **overrides)


def test_metrics_for_cloud_storage(no_credentials, tmp_path, monkeypatch):
  cfg = config(tmp_path, gcs_metrics=True)
  with pytest.raises(ConfigError, match=r"gcs_metrics=True uploads to Cloud Storage, and base_output_directory=/"):
    train.check_training(cfg)
  monkeypatch.setenv("DECOUPLE_GCLOUD", "TRUE")
  train.check_training(cfg)


def test_a_user_without_a_home_folder(no_credentials, tmp_path, monkeypatch):
  monkeypatch.delenv("CLOUDSDK_CONFIG")
  monkeypatch.delenv("HOME")
  monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)  # whom the system does not know
  with pytest.raises(ConfigError, match=r"monitor_goodput=True needs Google Cloud's credentials"):
    train.check_training(config(tmp_path, monitor_goodput=True))


def test_goodput_with_credentials_is_not_refused(no_credentials, tmp_path):
  folder = tmp_path / "gcloud"
  folder.mkdir()
  (folder / "application_default_credentials.json").write_text("{}")
  train.check_training(config(tmp_path, enable_goodput_recording=True, monitor_goodput=True))


def test_keys_that_nothing_reads_are_not_refused(tmp_path):
  overrides = {"enable_checkpointing": False, "checkpoint_period": 0, "num_epoch": 0, "profiler_steps": 0}
  train.check_training(config(tmp_path, enable_data_shuffling=False, data_shuffle_seed=-1, **overrides))
