"""Text files on MaxText's Grain pipeline: the rows of `datasets`, converted once, and read on after a resume."""

import logging
import os

import datasets
import hypothesis
from hypothesis import strategies
import jax
from maxtext.common.data_loader import DataLoader
from maxtext.configs import pyconfig
from maxtext.input_pipeline import input_pipeline_interface
from maxtext.trainers.pre_train import train as stock_train
from maxtext.utils import maxtext_utils
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maxtext_mudd import plugin, train
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import data_settings, text_files
from tests import runs

TEXT_YML = str(runs.ROOT / "yaml" / "data" / "local_text.yml")
TEXT = data_settings.Columns(("text",), "tokenize_train_data", True)
NASTY = "\ufeffa\r\nb\rc\x0cd\u2028e\u0085f\n\n \t\n\x00g\nüñï🙂\n" + "x" * 70_000 + "\nlast"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "maxtext-mudd" / "text"


@pytest.fixture(scope="module")
def settings():
  """The configuration of a run on text files, to be changed by `model_copy`."""
  return pyconfig.initialize_pydantic(["", runs.RUN_YML, TEXT_YML, "run_name=x", "hf_train_files=none"])


def convert(files, file_type="text", columns=TEXT):
  return text_files.convert(files, "hf_train_files", file_type, columns)


def rows_of_datasets(file, file_type="text"):
  return datasets.load_dataset(file_type, data_files=str(file), split="train", streaming=True)


def test_rows_are_the_lines_of_the_files(tmp_path):
  files = [tmp_path / "[a]*.txt", tmp_path / "b,c;d.txt"]
  files[0].write_bytes(NASTY.encode())
  files[1].write_bytes(b"one\ntwo\n")
  expected = ["\ufeffa", "b", "c\x0cd\u2028e\u0085f", "", " \t", "\x00g", "üñï🙂", "x" * 70_000, "last", "one", "two"]
  assert pq.read_table(convert(files)).to_pydict() == {"text": expected}


@hypothesis.settings(max_examples=30, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(strategies.text("ab \n\r\t\x0b\x0c\x00\x1c\u0085\u2028\ufeffü🙂", min_size=1, max_size=40))
def test_rows_are_those_of_datasets(tmp_path, text):
  file = tmp_path / "any.txt"
  file.write_bytes(text.encode())
  assert pq.read_table(convert([file])).to_pylist() == list(rows_of_datasets(file))


@pytest.mark.parametrize(
  ("file_type", "content"),
  [
    ("json", '{"text": "a\\nb", "other": 1}\n{"text": "ü", "other": 2}\n'),
    ("json", '[{"text": "a"}, {"text": ""}]'),
    ("csv", 'other,text\n1,"a, b\nc"\n2,d\n'),
  ],
)
def test_rows_of_other_formats(file_type, content, tmp_path):
  file = tmp_path / "file"
  file.write_text(content)
  expected = [row["text"] for row in rows_of_datasets(file, file_type)]
  assert pq.read_table(convert([file], file_type)).to_pydict() == {"text": expected}


def test_files_are_converted_once(tmp_path, cache):
  file = tmp_path / "a.txt"
  file.write_text("a\n")
  first = convert([file])
  before = first.stat().st_mtime_ns
  assert convert([file]) == first and first.stat().st_mtime_ns == before
  os.utime(file, ns=(1, 1))
  assert convert([file]) != first
  assert convert([file, file]) not in (first, convert([file]))
  damaged = convert([file])
  damaged.write_bytes(b"PAR1 and then nothing")
  assert convert([file]) == damaged and pq.read_table(damaged).to_pydict() == {"text": ["a"]}
  assert {x.suffix for x in cache.iterdir()} == {".parquet"}


UNREADABLE = {
  "bytes": ("text", b"a\nb\xff\n", "line 2 is not UTF-8 (0xff at byte 2 of the line, byte 4 of the file)"),
  "half a character": ("text", b"a\n\xc3", "line 2 is not UTF-8 (0xc3 at byte 1 of the line, byte 3 of the file)"),
  "no value": ("json", b'{"text": "a"}\n{"text": null}\n', "row 2 has no value in column 'text'"),
  "no column": ("json", b'{"content": "a"}\n', "the file has no column 'text'; it has content."),
  "numbers": ("csv", b"text\n1\n2\n", "column 'text' holds int64; text or lists of tokens are needed."),
  "no rows": ("csv", b"text\n", "the files hold no rows; write them again."),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_converted(kind, tmp_path, cache):
  file_type, content, message = UNREADABLE[kind]
  file = tmp_path / "a"
  file.write_bytes(content)
  with pytest.raises(ConfigError) as error:
    convert([file], file_type)
  name = "hf_train_files" if kind == "no rows" else f"hf_train_files={file}"
  assert str(error.value).startswith(f"{name}: {message}")
  assert not list(cache.iterdir())


def test_other_types_in_another_file(tmp_path):
  files = [tmp_path / "a.csv", tmp_path / "b.csv"]
  files[0].write_text("text\na\n")
  files[1].write_text("text\n1\n")
  with pytest.raises(ConfigError, match=f"hf_train_files={files[1]}: column 'text' holds int64"):
    convert(files, "csv")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
  (tmp_path / "occupied").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
  (tmp_path / "a.txt").write_text("a")
  with pytest.raises(ConfigError, match=r"occupied/maxtext-mudd/text: converted text cannot be written there .*XDG_"):
    convert([tmp_path / "a.txt"])


def test_blank_files_are_warned_of(tmp_path, caplog):
  for name, text in (("blank.txt", "\n \n\t\na\n"), ("half.txt", "a\n\n"), ("full.txt", "a\nb\n")):
    (tmp_path / name).write_text(text)
  files = sorted(tmp_path.glob("*.txt"))
  for _ in range(2):  # converted, and read from the cache
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      convert(files)
    assert [record.getMessage() for record in caplog.records] == [
      f"hf_train_files: {tmp_path}/blank.txt (3 of 4 rows) holds mostly blank rows, from which nothing is learnt."
    ]


def test_keys_that_are_set(tmp_path, settings, cache):
  """Grain's keys name the converted files; parquet files are used as they are; what is named already stays."""
  (tmp_path / "a.txt").write_text("a\n")
  pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")

  def prepared(**changes):
    changed = settings.model_copy(update={"hf_train_files": str(tmp_path / "a.txt")} | changes)
    text_files.prepare(changed)
    return changed.grain_train_files, changed.grain_eval_files

  converted = prepared()
  assert converted == (str(next(cache.iterdir())), "")
  assert prepared(eval_interval=1, hf_eval_files=str(tmp_path / "a.txt")) == converted[:1] * 2
  pattern = str(tmp_path / "*.parquet")
  assert prepared(hf_path="parquet", hf_train_files=pattern) == (pattern, "")
  assert prepared(grain_train_files="mine.parquet") == ("mine.parquet", "")
  assert prepared(dataset_type=type(settings.dataset_type)("hf")) == ("", "")
  with pytest.raises(ConfigError, match=r"hf_train_files=https://x.org/a is not local, .* set dataset_type=hf"):
    prepared(hf_train_files="https://x.org/a")


def test_reading_a_configuration_converts_nothing(tmp_path, cache):
  """As train_compile, decode and evaluate read one."""
  (tmp_path / "a.txt").write_text("a\n")
  argv = ["", runs.RUN_YML, TEXT_YML, "run_name=x", f"hf_train_files={tmp_path / 'a.txt'}"]
  assert pyconfig.initialize_pydantic(argv).grain_train_files == ""
  assert not cache.exists()


def local_batches(settings, number):
  """The first batches that MaxText's iterator gives for a configuration."""
  settings = settings.model_copy()
  text_files.prepare(settings)
  config = pyconfig.HyperParameters(settings)
  iterator, _ = input_pipeline_interface.create_data_iterator(config, maxtext_utils.get_mesh_from_config(config))
  batches = [next(iterator.local_iterator) for _ in range(number)]
  iterator.close()
  return batches


def test_tokens_are_those_of_the_pipeline_of_datasets(tmp_path, settings):
  """Of lines that are shorter than a sequence; of longer ones Grain cuts off the end with its EOS, too."""
  (tmp_path / "a.txt").write_text("short\n\nüñï\n" + "x" * 62 + "\n")  # with BOS and EOS as long as a sequence
  changes = {"hf_train_files": str(tmp_path / "a.txt"), "enable_data_shuffling": False, "packing": False}
  changes |= {"global_batch_size_to_load": 4}
  grain = settings.model_copy(update=changes)
  (first,), (second,) = (
    local_batches(x, 1) for x in (grain, grain.model_copy(update={"dataset_type": type(settings.dataset_type)("hf")}))
  )
  assert first.keys() == second.keys()
  for key in first:
    np.testing.assert_array_equal(first[key], second[key], key)
  assert first["inputs"][0, 0] == 1 and first["inputs"][3, 63] == 2  # BOS and EOS of the byte tokenizer


@pytest.fixture
def settings_of_jax():
  """MaxText's `main` sets some for its process."""
  names = ("jax_default_prng_impl", "jax_compilation_cache_dir", "jax_use_shardy_partitioner")
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  plugin.install(plugin.Reading())


def test_a_resume_reads_on(tmp_path, monkeypatch, settings, settings_of_jax):
  """Through a window of shuffled lines and through packing."""
  text = tmp_path / "a.txt"
  text.write_text("".join(f"line {number}{' and more' * (number % 5)}\n" for number in range(300)))
  changes = {"hf_train_files": str(text), "grain_shuffle_buffer_size": 50}
  expected = local_batches(settings.model_copy(update=changes), 5)
  seen = []
  load = DataLoader.load_next_batch_pre_sharding

  def record(self):
    batch = load(self)
    seen.append({key: np.asarray(value) for key, value in batch.items()})
    return batch

  monkeypatch.setattr(DataLoader, "load_next_batch_pre_sharding", record)
  plugin.install(plugin.Reading(check=train.check_training))
  argv = ["", runs.RUN_YML, TEXT_YML, "run_name=text", f"base_output_directory={tmp_path / 'out'}"]
  argv += [f"{key}={value}" for key, value in changes.items()]
  trained = []
  for steps in (2, 5):
    seen.clear()
    stock_train.main([*argv, f"steps={steps}"])
    trained += seen[: steps - len(trained)]  # MaxText loads one more
  assert len(trained) == 5
  for batch, other in zip(trained, expected):
    for key, value in other.items():
      np.testing.assert_array_equal(batch[key], value, key)
