"""What is refused before JAX is imported, that it is no more than the configuration refuses, and `--help`, `--list`."""

import json
import subprocess
import sys

from maxtext.configs import pyconfig
import pytest

from maxtext_mudd.config import errors
from maxtext_mudd.config import files as config_files
from maxtext_mudd.config.keys import MuddKeys
from maxtext_mudd.config.mudd_config import MuddConfig
from maxtext_mudd.runs import data_settings, early_check, usage
from tests import runs

MODEL = str(runs.ROOT / "yaml" / "mudd_405m.yml")
TINY = str(runs.ROOT / "yaml" / "mudd_tiny.yml")
FIXED = ("run_name=x", "log_config=false", "skip_jax_distributed_system=true")


def refusal(function, *arguments) -> str:
  with pytest.raises(errors.ConfigError) as error:
    function(["", *arguments, *FIXED])
  return str(error.value)


@pytest.mark.parametrize(
  "arguments",
  [
    [MODEL, "mudd_way=4"],
    [MODEL, "learning_rte=1"],
    [MODEL, "mudd_ways=3"],
    [MODEL, "mudd_window=none"],
    [MODEL, "mudd_ffn_last=.inf"],
    [MODEL, "mudd=false"],
    [MODEL, "mudd_dense_streams=qx"],
    [MODEL, "steps=[1"],
    [MODEL, "mudd"],
    [MODEL, "data/pil.yml"],
    [MODEL, "mudd_1p4b.yml"],
    [MODEL, "base_config=tiny.yml"],
    ["mudd_3b.yml"],
    ["mudd.yaml"],
  ],
)
def test_the_sentence_is_that_of_the_configuration(arguments):
  assert refusal(early_check.check, *arguments) == refusal(pyconfig.initialize_pydantic, *arguments)


def test_files_are_refused_by_the_same_sentence(tmp_path):
  file = str(tmp_path / "my.yml")
  for text in (
    "base_config: mudd_base.yml\nmudd_way: 4",
    "base_config: mudd_base.yml\nmudd_ways: 3",
    "base_config: base.yml\nmudd_window: 2",
    "base_config: nowhere.yml",
    "base_config: my.yml",
    "mudd: true",
    "- mudd",
    "mudd: [",
  ):
    (tmp_path / "my.yml").write_text(text)
    assert refusal(early_check.check, file) == refusal(pyconfig.initialize_pydantic, file)


@pytest.mark.parametrize(
  "arguments, says",
  [
    (
      ["grain_train_files=none.parquet"],
      "grain_train_files=none.parquet: no such file; yaml/README.md says where data",
    ),
    (["grain_train_files=a,x;b,1"], "grain_train_files=a,x: 'x' is not a weight; write pattern,number."),
    (["data/local_text.yml", "hf_train_files=none.txt"], "hf_train_files=none.txt: no such file"),
    (["data/local_text.yml"], "hf_train_files='' names no data"),
    (
      ["data/local_text.yml", f"hf_train_files={__file__}"],
      "hf_eval_files='' names no data; set it to files, or to a pattern that matches files, or set eval_interval=-1 "
      "for a run without evaluation.",
    ),
    (
      ["data/local_text.yml", "hf_path=jsn", "hf_train_files=a"],
      "hf_path=jsn is not a format of local files; set it to arrow, csv, json, parquet, text.",
    ),
    (["steps=9", "--run_name=r"], "--run_name=r: keys have no dashes before them; write run_name=r."),
  ],
)
def test_data_that_are_not_there(arguments, says):
  with pytest.raises(errors.ConfigError) as refused:
    early_check.check(["", TINY, *arguments], data_settings.check)
  assert says in str(refused.value)


@pytest.mark.parametrize("ending, loader", [("jsonl", "json"), ("csv", "csv"), ("parquet", "parquet")])
def test_files_that_are_no_plain_text(ending, loader, tmp_path):
  (tmp_path / f"data.{ending}").write_text("x")
  with pytest.raises(errors.ConfigError) as refused:
    early_check.check(
      ["", TINY, "data/local_text.yml", f"hf_train_files={tmp_path}/data.{ending}"], data_settings.check
    )
  assert str(refused.value).endswith(f"is not plain text by its ending; set hf_path={loader}, or rename the file.")


def test_data_that_may_be_there():
  files = f"grain_train_files={__file__}"
  early_check.check(["", TINY, files, "eval_interval=-1"], data_settings.check)
  early_check.check(["", TINY, "grain_train_files=gs://bucket/none", "eval_interval=-1"], data_settings.check)
  early_check.check(["", TINY, "dataset_type=synthetic", "grain_train_files=none"], data_settings.check)
  early_check.check(["", TINY, files, "eval_interval=x"], data_settings.check)  # refused later, for what it is


def accept(*arguments):
  early_check.check(["", *arguments, *FIXED])
  return pyconfig.initialize_pydantic(["", *arguments, *FIXED])


def test_what_the_configuration_takes_is_not_refused(tmp_path, monkeypatch):
  accept(MODEL, "lora.enable_lora=true", "mudd_kernel=auto", "tokenizer_path=none")
  accept("src/maxtext/configs/base.yml", "mudd=true", "scan_layers=true")
  accept(str(runs.ROOT / "tests" / "stock.yml"), "data/local_text.yml")
  (tmp_path / "my.yml").write_text("base_config: mudd_base.yml\nmudd: true\nmudd_window: ${checkpoint_period}")
  assert accept(str(tmp_path / "my.yml"), "checkpoint_period=7").mudd_window == 7
  (tmp_path / "my.yml").write_text("base_config: mudd_base.yml\nmudd_window: 2")
  monkeypatch.setenv("M_MUDD", "true")
  assert accept(str(tmp_path / "my.yml")).mudd


def test_a_prompt_is_a_text():
  early_check.check(["", MODEL, "prompt=[def"])


def test_flags_of_abseil_are_left_alone():
  early_check.check(["", MODEL, "--verbosity", "1"])


def test_the_keys_are_those_of_the_configuration():
  def nested(fields):
    groups = [field.annotation.model_fields for field in fields.values() if hasattr(field.annotation, "model_fields")]
    return {key for group in groups for key in group.keys() | nested(group)}

  fields, groups = early_check.maxtext_keys()
  assert fields == MuddConfig.model_fields.keys() - MuddKeys.model_fields.keys()
  assert groups == nested(MuddConfig.model_fields)


COMMANDS = """
import contextlib, importlib, io, json, sys
answers = {}
for module, *arguments in json.loads(sys.argv[1]):
  errors = io.StringIO()
  with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
    try:
      sys.argv = [module, *arguments]
      command = importlib.import_module(f"maxtext_mudd.{module}")
      status = command.run() if hasattr(command, "run") else command.main(arguments)
    except SystemExit as ended:
      status = ended.code
  answers[" ".join([module, *arguments])] = [status, errors.getvalue()]
print(json.dumps([answers, [name for name in ("jax", "maxtext.configs.pyconfig") if name in sys.modules]]))
"""


def test_commands_answer_without_jax(tmp_path):
  """Each in a process where nothing has imported it."""
  key, sentence = "mudd_way=4", "maxtext-mudd: mudd_way is not a configuration key; the nearest is mudd_ways.\n"
  (tmp_path / "model").mkdir()
  mistakes = [
    ["train", "mudd_405m.yml", key],
    ["train_compile", "mudd_405m.yml", key],
    ["decode", "mudd_405m.yml", "prompt=[", key],
    ["evaluate.__main__", "--checkpoint", "model", "--tasks", "sciq", key],
    ["evaluate.__main__", "--checkpoint", "model", "--tasks", "sciq", "mudd_405m.yml", key],
    ["convert", "from-hf", "--hf-dir", "model", "--maxtext-dir", "M", key],
    ["convert", "from-run", "--checkpoint", "model", "--maxtext-dir", "M", "mudd_405m.yml", key],
    ["convert", "layout", "--from", "model", "--to", "new", "mudd_405m.yml", key],
  ]
  helps = [[*command.split(), "--help"] for command in usage.COMMANDS] + [["train", "--list"]]
  finished = subprocess.run(
    [sys.executable, "-c", COMMANDS, json.dumps(mistakes + helps)],
    cwd=tmp_path,
    env=runs.environment(PYTHONPATH=str(runs.ROOT)),
    capture_output=True,
    text=True,
    check=True,
  )
  answers, imported = json.loads(finished.stdout)
  assert not imported
  for arguments in mistakes:
    assert answers[" ".join(arguments)] == [2, sentence]
  for command, keys in usage.COMMANDS.items():
    status, text = answers[f"{command} --help"]
    assert not status
    assert text.startswith(f"usage: python3 -m maxtext_mudd.{command} MODEL.yml")
    assert {key.split(".")[0] for key in keys[1]} <= MuddConfig.model_fields.keys()
    assert all(f"  {key}=" in text for key in keys[1])
  status, text = answers["train --list"]
  assert not status
  assert [line.split()[0] for line in text.splitlines()] == config_files.packaged()
  assert all(len(line.split()) > 1 for line in text.splitlines())
