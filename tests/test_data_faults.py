"""Data that cannot be read: the sentence names the file and the row."""

import struct

from array_record.python import array_record_module
from maxtext.configs import pyconfig
from maxtext.input_pipeline.protos import example_pb2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import data_faults, data_settings
from tests import data_files, runs


@pytest.fixture(scope="module")
def settings():
  return pyconfig.initialize_pydantic(["", runs.RUN_YML, "run_name=x"])


def explain(settings, files, file_type, error=None, **changes):
  """The sentence for files of a format that only Grain reads, or that the loaders of `datasets` read."""
  grain = file_type in ("arrayrecord", "tfrecord", "mmap")
  changes |= {"dataset_type": type(settings.dataset_type)("grain" if grain else "hf")}
  changes |= {"grain_file_type": file_type, "grain_train_files": files} if grain else {}
  changes |= {} if grain else {"hf_path": file_type, "hf_train_files": files}
  return data_faults.explain(settings.model_copy(update=changes), error or ValueError("something with a tensor"))


def parquet(*columns):
  def write(path):
    writer = pq.ParquetWriter(path, pa.table({"text": columns[0]}).schema)
    for values in columns:  # a row group each
      writer.write_table(pa.table({"text": values}))
    writer.close()

  return write


def damaged(path):
  parquet(["a" * 50] * 500)(path)
  content = bytearray(path.read_bytes())
  content[8:60] = b"\xff" * 52
  path.write_bytes(content)


def not_utf8_strings(path):
  binary = pa.array([b"a", b"ab\xff"], pa.binary())
  pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, binary.buffers())}), path)


def example(**features):
  record = example_pb2.Example()
  for name, values in features.items():
    feature = record.features.feature[name]
    (feature.bytes_list if isinstance(values[0], bytes) else feature.int64_list).value.extend(values)
  return record.SerializeToString()


def records(*values):
  def write(path):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for value in values:
      writer.write(value)
    writer.close()

  return write


GOOD = example(text=[b"a"])
FAULTS = {
  "text": ("text", b"a\nb\nc\xe9d\n", "line 3 is not UTF-8 (0xe9 at byte 2 of the line, byte 6 of the file); "),
  "JSON that is cut off": (
    "json",
    b'{"text": "a"}\n{"text": "b"\n',
    "line 2 is not valid JSON (Expecting ',' delimiter at character 13); correct it.",
  ),
  "a JSON list": ("json", b'[{"text": "a"},\n {"text" "b"}]', "line 2 is not valid JSON (Expecting ':' delimiter at "),
  "JSON without a value": ("json", b'{"text": "a"}\n\n{"text": null}\n', "row 2 has no value in column 'text'; "),
  "JSON without the column": ("json", b'{"body": "a"}\n', "the file has no column 'text'; it has body."),
  "a cell without a value": ("csv", b"text,n\na,1\n,2\n", "row 2 has no value in column 'text'; "),
  "a null": ("parquet", parquet(["a", "b"], ["c", None]), "row 4 has no value in column 'text'; "),
  "another column": ("parquet", lambda path: pq.write_table(pa.table({"b": ["a"]}), path), "the file has no column"),
  "numbers": ("parquet", parquet([1, 2]), "column 'text' holds int64; text or lists of tokens are needed."),
  "tokens for text": (
    "parquet",
    parquet([[1, 2]]),
    "column 'text' holds tokens, and MaxText would tokenize them; set ",
  ),
  "strings of bytes": ("parquet", not_utf8_strings, "row 2 is not UTF-8 in column 'text' (byte 3 of its text); "),
  "a damaged page": ("parquet", damaged, "rows 1 to 500 cannot be read: column 'text' is damaged ("),
  "half a file": ("parquet", b"PAR1 and then nothing", "the file is not a complete parquet file ("),
  "plain bytes": ("arrayrecord", records(GOOD, b"plain"), "record 2 is not a tf.train.Example"),
  "an empty record": ("arrayrecord", records(GOOD, b""), "record 2 is not a tf.train.Example with features; "),
  "another feature": ("arrayrecord", records(GOOD, example(b=[b"a"])), "record 2 has no feature 'text'; it has b."),
  "tokens in records": (
    "arrayrecord",
    records(example(text=[1])),
    "record 1 holds tokens in 'text', and MaxText would ",
  ),
  "bytes in records": (
    "arrayrecord",
    records(GOOD, example(text=[b"\xff"])),
    "record 2 is not UTF-8 in 'text' (byte 1",
  ),
  "half a record": ("tfrecord", b"\x05\0\0\0\0\0\0\0\0\0\0\0abc", "the file cannot be read after record 0 ("),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_file_and_row(kind, settings, tmp_path):
  file_type, content, message = FAULTS[kind]
  file = tmp_path / "[a] file"  # which would match other names as a pattern
  file.write_bytes(content) if isinstance(content, bytes) else content(file)
  key = "grain_train_files" if file_type in ("arrayrecord", "tfrecord") else "hf_train_files"
  assert explain(settings, f"{tmp_path}/*file", file_type).startswith(f"{key}={file}: {message}")


def test_files_of_the_evaluation(settings, tmp_path):
  """The search goes through them behind the files of training."""
  (tmp_path / "train.txt").write_text("a\n")
  (tmp_path / "eval.txt").write_bytes(b"\xff\n")
  changes = {"eval_interval": 1, "hf_eval_files": f"{tmp_path}/eval.txt"}
  sentence = explain(settings, f"{tmp_path}/train.txt", "text", **changes)
  assert sentence.startswith(f"hf_eval_files={tmp_path}/eval.txt: line 1 is not UTF-8 (0xff at byte 1 of the line")


def test_a_compressed_file_is_read_as_datasets_reads_it(settings, tmp_path):
  import gzip

  (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a\n"))
  sentence = explain(settings, f"{tmp_path}/a.txt.gz", "text")
  assert sentence.endswith("; the local files show no fault.")


def test_a_file_that_the_system_does_not_open(tmp_path):
  columns = data_settings.Columns(("text",), "tokenize_train_data", True)
  for file_type in ("text", "json", "csv"):
    sentence = data_faults.find(tmp_path / "gone", file_type, columns)
    assert sentence == "the file cannot be read (No such file or directory); name one that can."


def test_no_file_at_fault(settings, tmp_path):
  (tmp_path / "a.txt").write_text("a\n")
  assert explain(settings, f"{tmp_path}/a.txt", "text", OSError("one\n two")) == (
    f"hf_train_files={tmp_path}/a.txt: the data cannot be read (OSError: one two); the local files show no fault."
  )
  assert explain(settings, "en/*", "allenai/c4", OSError("no net")) == (
    "hf_path=allenai/c4: the data cannot be read (OSError: no net); which file is at fault is not known."
  )
  assert explain(settings, f"{tmp_path}/a.txt", "text", ConfigError("a=b is wrong.")) == "a=b is wrong."


def test_a_configuration_as_maxtext_passes_it_on(settings, tmp_path):
  (tmp_path / "a.txt").write_bytes(b"\xff\n")
  changes = {
    "dataset_type": type(settings.dataset_type)("hf"),
    "hf_path": "text",
    "hf_train_files": f"{tmp_path}/a.txt",
  }
  config = pyconfig.HyperParameters(settings.model_copy(update=changes))
  sentence = data_faults.explain(config, ValueError("x"))
  assert sentence.startswith(f"hf_train_files={tmp_path}/a.txt: line 1 is not UTF-8")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'[{"text": "a"},\n {"text" "b"}]', "the file cannot be read after row 0 ("),
    (b'{"text" "a"}\n', "the file cannot be read after row 0 ("),
    (b'{"text": "\xff"}\n', "row 1 is not UTF-8 in column 'text' (byte 1 of its text); "),
  ],
)
def test_lines_and_lists_that_may_not_fit_the_memory(content, message, settings, tmp_path, monkeypatch):
  """Are searched by rows alone."""
  monkeypatch.setattr(data_faults, "LINE_BYTES", 10)
  (tmp_path / "a.json").write_bytes(content)
  assert explain(settings, f"{tmp_path}/a.json", "json").startswith(f"hf_train_files={tmp_path}/a.json: {message}")


def test_a_search_ends(settings, tmp_path, monkeypatch):
  monkeypatch.setattr(data_faults, "SEARCH_SECONDS", -1)
  (tmp_path / "a.txt").write_bytes(b"\xff\n")
  assert explain(settings, f"{tmp_path}/a.txt", "text", OSError("x")) == (
    f"hf_train_files={tmp_path}/a.txt: the data cannot be read (OSError: x); the search for the file at fault ended "
    "after -1 seconds."
  )


def header(magic=b"MMIDIDX\x00\x00", version=1, code=8, sequences=3, documents=4):
  return lambda index: struct.pack("<9sQBQQ", magic, version, code, sequences, documents) + index[34:]


MAPS = {
  "short": (lambda index: index[:20], "{idx} has 20 bytes, fewer than the 34 of its header; write it again."),
  "another file": (
    header(b"PK\x03\x04MMID"),
    "{idx} does not begin with b'MMIDIDX\\x00\\x00', so it is not an index of ",
  ),
  "version": (header(version=2), "{idx} has version 2; MaxText reads version 1."),
  "type": (header(code=9), "{idx} has the type code 9; tokens have one of 1 (uint8), 2 (int8), 3 (int16), 4 (int32), "),
  "floats": (header(code=7), "{idx} has the type code 7; tokens have one of 1 (uint8)"),
  "count": (
    header(sequences=5),
    "{idx} has 102 bytes, which do not fit the 5 sequences and 4 documents of its header; ",
  ),
  "cut off": (
    lambda index: index[:-16],
    "{idx} has 86 bytes, which do not fit the 3 sequences and 4 documents of its ",
  ),
  "no documents": (
    lambda index: header(sequences=0, documents=1)(index)[:42],
    "{idx} says that {bin} holds no documents; write both again.",
  ),
  "wider tokens": (header(code=4), "{bin} has 30 bytes, and pair.idx describes 60; copy or write both again."),
}


@pytest.mark.parametrize("kind", MAPS)
def test_maps_of_megatron(kind, settings, tmp_path):
  change, message = MAPS[kind]
  data_files.write_pair(tmp_path / "pair", [np.arange(5)] * 3)
  assert explain(settings, f"{tmp_path}/pair", "mmap").endswith("show no fault.")
  index = tmp_path / "pair.idx"
  index.write_bytes(change(index.read_bytes()))
  sentence = explain(settings, f"{tmp_path}/pair", "mmap")
  assert sentence.startswith(f"grain_train_files={index}: " + message.format(idx=index, bin=tmp_path / "pair.bin"))


def test_maps_whose_tokens_are_cut_off(settings, tmp_path):
  data_files.write_pair(tmp_path / "pair", [np.arange(5)] * 3)
  tokens = tmp_path / "pair.bin"
  tokens.write_bytes(tokens.read_bytes()[:-2])
  sentence = explain(settings, f"{tmp_path}", "mmap")  # a folder of pairs
  assert sentence.endswith(f": {tokens} has 28 bytes, and pair.idx describes 30; copy or write both again.")
