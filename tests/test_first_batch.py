"""What a launcher finds out by the first batch, before anything is compiled or written."""

import json
import pathlib
import sys

import jax
from maxtext.configs import pyconfig
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maxtext_mudd import plugin, train
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import preflight
from tests import data_files, runs

TEXT_YML = str(runs.ROOT / "yaml" / "data" / "local_text.yml")
MESSAGES = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def settings():
  return pyconfig.initialize_pydantic(["", runs.RUN_YML, "run_name=x"])


@pytest.fixture
def check(settings, tmp_path):
  """Checks the settings with other values, as the launcher checks those of a run."""

  def checked(**changes):
    typed = {
      key: type(getattr(settings, key))(changes[key]) for key in changes.keys() & {"dataset_type", "tokenizer_type"}
    }
    output = {"base_output_directory": str(tmp_path / "out")}
    config = settings.model_copy(update=output | changes | typed)
    preflight.check_training(config)
    preflight.try_data(config)

  return checked


def refusal(check, **changes) -> str:
  with pytest.raises(ConfigError) as error:
    check(**changes)
  return str(error.value)


def write(path: pathlib.Path, rows: list, column="text") -> str:
  pq.write_table(pa.table({column: rows}), path)
  return str(path)


@pytest.fixture
def good(tmp_path) -> str:
  return write(tmp_path / "good.parquet", ["some text"] * 20)


def test_data_that_can_be_read(check, good, tmp_path):
  check(grain_train_files=good)
  check(grain_train_files=good, eval_interval=1, grain_eval_files=good, packing=True)
  (tmp_path / "a.txt").write_text("a line\n" * 20)
  check(dataset_type="hf", hf_path="text", hf_train_files=f"{tmp_path}/a.txt", enable_data_shuffling=True)
  data_files.write_pair(tmp_path / "pair", [np.arange(200)] * 3)
  check(grain_file_type="mmap", grain_train_files=f"{tmp_path}/pair", tokenizer_path="nowhere")  # reads no tokenizer
  check(dataset_type="synthetic", tokenizer_path="nowhere", vocab_size=8)


def test_rows_without_text(check, good, tmp_path):
  bad = write(tmp_path / "bad.parquet", ["a", None])
  assert refusal(check, grain_train_files=bad).startswith(f"grain_train_files={bad}: row 2 has no value in column")
  said = refusal(check, grain_train_files=good, grain_eval_files=bad, eval_interval=1)
  assert said.startswith(f"grain_eval_files={bad}: row 2 has no value in column")


def test_no_batch(check, tmp_path):
  """MaxText's pipeline of `datasets` leaves out a batch that is not full, if it does not pack; Grain's pads it."""
  (tmp_path / "a.txt").write_text("a line\n")
  hf = {"dataset_type": "hf", "hf_path": "text", "hf_train_files": f"{tmp_path}/a.txt"}
  assert refusal(check, **hf, packing=False) == (
    f"hf_train_files={tmp_path}/a.txt holds 1 row(s), which fill no batch of per_device_batch_size=2 for each device; "
    "use a smaller batch, more data or, for training, a higher num_epoch."
  )
  check(**hf, packing=True)
  check(grain_train_files=write(tmp_path / "one.parquet", ["a line"]))


def test_a_tokenizer_with_more_tokens_than_the_model(check, good):
  """MaxText would count targets beyond vocab_size as a loss of 0."""
  assert refusal(check, grain_train_files=good, vocab_size=8) == (
    "tokenizer_path=maxtext_mudd/byte has 259 tokens, and the model has vocab_size=8; set vocab_size=259 or more, or "
    "name another tokenizer."
  )
  check(grain_train_files=good, vocab_size=259)


def test_tokens_beyond_the_vocabulary(check, tmp_path):
  """Of data that are tokenized already: the tokenizer does not count, and the first batch does."""
  tokens = write(tmp_path / "tokens.parquet", [[3, 4, 320]] * 4)
  key = f"grain_train_files={tokens}"
  changes = {"grain_train_files": tokens, "tokenize_train_data": False}
  expected = (
    "holds token 320 in its first batch, and the model has vocab_size=320; set it to 321 or more, or name data of "
  )
  assert refusal(check, **changes) == f"{key} {expected}another tokenizer."
  check(**changes, vocab_size=321)
  small = write(tmp_path / "small.parquet", [[3, 4]] * 4)
  check(grain_train_files=small, tokenize_train_data=False, vocab_size=8)
  data_files.write_pair(tmp_path / "pair", [np.full(200, 320)] * 3)
  said = refusal(check, grain_file_type="mmap", grain_train_files=f"{tmp_path}/pair")
  assert said == f"grain_train_files={tmp_path}/pair {expected}another tokenizer."


def test_maps_whose_header_is_wrong(check, tmp_path):
  data_files.write_pair(tmp_path / "pair", [np.arange(5)] * 3)
  with (tmp_path / "pair.bin").open("ab") as file:
    file.write(b"\0\0")
  said = refusal(check, grain_file_type="mmap", grain_train_files=f"{tmp_path}/pair")
  tokens = f"{tmp_path}/pair.bin has 32 bytes, and pair.idx describes 30"
  assert said == f"grain_train_files={tmp_path}/pair: {tokens}; copy or write both again."


TOKENIZERS = {
  "a mistyped name": (
    {"tokenizer_path": "nobody/nothing"},
    "tokenizer_path=nobody/nothing cannot be read as a tokenizer of huggingface: it is no local folder and, with "
    "HF_HUB_OFFLINE set, cannot be loaded from Hugging Face; name a folder with a tokenizer.json, or a model of the "
    "hub.",
  ),
  "a folder for SentencePiece": (
    {"tokenizer_type": "sentencepiece"},
    "tokenizer_path=maxtext_mudd/byte is a folder, and tokenizer_type=sentencepiece reads a file; name its file, or "
    "set tokenizer_type=huggingface.",
  ),
  "a folder for tiktoken": (
    {"tokenizer_type": "tiktoken"},
    "tokenizer_path=maxtext_mudd/byte is a folder, and tokenizer_type=tiktoken reads a file; name its file, or "
    "set tokenizer_type=huggingface.",
  ),
  "a file of another name": (
    {"tokenizer_type": "tiktoken", "tokenizer_path": "words.model"},
    "tokenizer_path=words.model has no 'tiktoken' in it, by which MaxText knows files of tokenizer_type=tiktoken; "
    "rename the file, or set another tokenizer_type.",
  ),
  "a file that is none": (
    {"tokenizer_type": "sentencepiece", "tokenizer_path": __file__},
    f"tokenizer_path={__file__} cannot be read as a tokenizer of sentencepiece; name another (",
  ),
}


@pytest.mark.parametrize("mistake", TOKENIZERS)
def test_tokenizers_that_cannot_be_read(mistake, check, good, monkeypatch):
  changes, message = TOKENIZERS[mistake]
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  assert refusal(check, grain_train_files=good, **changes).startswith(message)


def test_more_workers_than_files(check, good, tmp_path):
  assert refusal(check, grain_train_files=good, grain_worker_count=2) == (
    "grain_worker_count=2 with 1 file(s) in grain_train_files: each worker of a host reads whole files; set it to 1 or "
    "less."
  )
  check(grain_train_files=good, grain_worker_count=1)  # without starting the worker
  for name in ("a.txt", "b.txt"):
    (tmp_path / name).write_text("a line\n" * 20)
  text = {"hf_path": "text", "hf_train_files": f"{tmp_path}/*.txt", "grain_train_files": ""}
  assert refusal(check, **text, grain_worker_count=2) == (
    "grain_worker_count=2 with the one file that hf_train_files is converted to: each worker of a host reads whole "
    "files; set it to 1 or less."
  )


def test_workers_of_the_processes_that_read_data(settings, good, tmp_path, monkeypatch):
  """Files are divided among these alone, and among more readers where each process takes batches of several."""
  write(tmp_path / "good_2.parquet", ["some text"])
  config = settings.model_copy(update={"grain_train_files": f"{tmp_path}/good*.parquet", "grain_worker_count": 2})
  monkeypatch.setattr(jax, "process_count", lambda: 2)  # all devices are those of the first
  preflight.check_files(config)
  with pytest.raises(ConfigError, match=r"grain_worker_count=2 with 2 file\(s\) .* set it to 1 or less"):
    preflight.check_files(config.model_copy(update={"expansion_factor_real_data": 0.5}))
  preflight.check_files(config.model_copy(update={"expansion_factor_real_data": 0.5, "elastic_enabled": True}))


def test_fine_tuning(check, good, tmp_path):
  sentence = refusal(check, grain_train_files=good, use_sft=True)
  assert sentence.startswith("use_sft=True reads conversations, and train_data_columns=['text'] holds none; set it and")
  (tmp_path / "a.txt").write_text("a line\n" * 20)
  text = {"dataset_type": "hf", "hf_path": "text", "hf_train_files": f"{tmp_path}/a.txt"}
  assert refusal(check, **text, use_sft=True) == sentence
  sft = {"use_sft": True, "train_data_columns": ["messages"]}
  template = "use_sft=True needs a chat template, and the tokenizer of tokenizer_path="
  talk = write(tmp_path / "talk.parquet", MESSAGES * 4, "messages")
  assert refusal(check, **sft, grain_train_files=talk).startswith(template)
  (tmp_path / "talk.jsonl").write_text(f"{json.dumps({'messages': MESSAGES[0]})}\n" * 4)
  hf = {"dataset_type": "hf", "hf_path": "json", "hf_train_files": f"{tmp_path}/talk.jsonl"}
  assert refusal(check, **sft, **hf).startswith(template)
  no_talk = write(tmp_path / "no_talk.parquet", ["a"] * 4, "messages")
  assert refusal(check, **sft, grain_train_files=no_talk) == (
    "use_sft=True reads conversations, and the column 'messages' holds none; a row is a list of messages, each with a "
    "role and a content."
  )


def test_a_hub_that_cannot_be_reached(check, monkeypatch):
  said = refusal(check, dataset_type="hf", hf_path="nobody/nothing")
  assert said.startswith("hf_path=nobody/nothing: the data cannot be read (")
  assert said.endswith("; which file is at fault is not known.")


@pytest.mark.parametrize("pipeline", ["grain", "hf"])
def test_the_end_of_a_launcher(pipeline, tmp_path, monkeypatch, capsys):
  text = tmp_path / "a.txt"
  text.write_bytes(b"good\nb\xff\n")
  argv = [runs.RUN_YML, TEXT_YML, "run_name=x", f"hf_train_files={text}", f"dataset_type={pipeline}"]
  monkeypatch.setattr(sys, "argv", ["MaxText/train.py", *argv, f"base_output_directory={tmp_path / 'out'}"])
  with pytest.raises(SystemExit) as ended:
    train.run()
  plugin.install(plugin.Reading())
  assert ended.value.code == 2
  assert capsys.readouterr().err.splitlines()[-1] == (
    f"maxtext-mudd: hf_train_files={text}: line 2 is not UTF-8 (0xff at byte 2 of the line, byte 7 of the file); "
    "convert the file to UTF-8, or correct the line."
  )
  assert not (tmp_path / "out").exists()
