"""Finds what is wrong with the data of a run, and says it in one sentence."""

from collections.abc import Iterable, Iterator
import contextlib
import glob
import json
import logging
import pathlib
import time
from typing import BinaryIO
import warnings

from google.protobuf.message import DecodeError
import grain.python as grain
from maxtext.input_pipeline.protos import example_pb2
import pyarrow as pa
import pyarrow.parquet as pq

from maxtext_mudd.config.errors import ConfigError, brief, failed_in
from maxtext_mudd.runs import sources, token_maps

SEARCH_SECONDS = 120  # a run that has failed does not wait longer for a better sentence
LINE_BYTES = 2**28  # longer lines, and lists of JSON, are not read into memory to name the line of a fault
_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"Rar!")


class _SearchEnded(Exception):
  """The time for a search is over."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Without log messages and warnings: a run gives those of its data again, and errors become sentences."""
  disabled = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  finally:
    logging.disable(disabled)


@quiet()
def explain(config, error: Exception) -> str:
  """What is wrong with the data that a configuration names, in one sentence.

  Searches the local files of the configuration, for training and for evaluation, up to the first fault, for at most
  `SEARCH_SECONDS`.

  Args:
    config: MaxText's configuration, as either of its classes.
    error: what a data iterator of MaxText raised.

  Returns:
    A sentence that names the file and the row, counted from 1, where the search locates them; else the cause, and that
    the file is not known.
  """
  if isinstance(error, ConfigError):
    return str(error)
  if sentence := _setting_at_fault(config, error):
    return sentence
  deadline = time.monotonic() + SEARCH_SECONDS
  searched = False
  names = " and ".join(sources.named(split, config) for split in sources.splits(config))
  unreadable = f"{names}: the data cannot be read ({brief(error)})"
  try:
    for key, value in sources.data_files(config):
      for file in sources.local_files(key, value, config):
        if fault := find(file, sources.file_type(key, config), sources.columns(key, config), deadline):
          return f"{key}={file}: {fault}"
        searched = True
  except _SearchEnded:
    return f"{unreadable}; the search for the file at fault ended after {SEARCH_SECONDS} seconds."
  return f"{unreadable}; {'the local files show no fault' if searched else 'which file is at fault is not known'}."


def _setting_at_fault(config, error: Exception) -> str:
  """What is said where a key is at fault, and no file."""
  if isinstance(error, ModuleNotFoundError):
    return (
      f"{sources.named('train', config)} needs the module {error.name}, which is not installed; install it, or use "
      "another dataset_type."
    )
  if not config.use_sft:
    return ""
  # MaxText asserts that columns have the names, and rows the form, of conversations.
  if failed_in(error, "validate_and_configure_sft_columns"):
    return (
      f"use_sft=True reads conversations, and train_data_columns={list(config.train_data_columns)} are none; name "
      "[messages], [prompt,completion] or [question,answer], in eval_data_columns, too, or set use_sft=False."
    )
  if failed_in(error, "apply_chat_template") and "chat_template" in str(error):
    return (
      f"use_sft=True needs a chat template, and the tokenizer of tokenizer_path={config.tokenizer_path} has none; set "
      "chat_template, or name a tokenizer that has one."
    )
  if "conversational format" in str(error):
    return (
      f"use_sft=True reads conversations, and the column {config.train_data_columns[0]!r} holds none; a row is a list "
      "of messages, each with a role and a content."
    )
  return ""


def find(file: pathlib.Path, file_type: str, columns: sources.Columns, deadline: float = float("inf")) -> str:
  """The first fault of a file.

  Args:
    file_type: as of `sources.file_type`.
    columns: those that MaxText reads.
    deadline: on the clock of `time.monotonic`, when the search ends.

  Returns:
    The end of a sentence; empty if there is no fault, and for formats that are not searched.

  Raises:
    _SearchEnded: after the deadline.
  """
  try:
    return _first_fault(file, file_type, columns, deadline)
  except OSError as error:
    return f"the file cannot be read ({error.strerror or brief(error)}); name one that can."


def _first_fault(file: pathlib.Path, file_type: str, columns: sources.Columns, deadline: float) -> str:
  if file_type == "mmap":
    return token_maps.fault(str(file).removesuffix(".idx"))
  if file_type == "parquet":
    return _in_parquet(file, columns, deadline)
  if file_type in ("arrayrecord", "tfrecord"):
    return _in_records(file, file_type, columns, deadline)
  if file_type in ("text", "json", "csv"):
    fault = ""
    if not _is_compressed(file):
      fault = _in_text(file, deadline) or (_in_json(file, deadline) if file_type == "json" else "")
    return fault or _in_tables(tables(file, file_type), columns, deadline)
  return ""


def tables(file: pathlib.Path, file_type: str) -> Iterator[pa.Table]:
  """The rows of a file as the loader of `datasets` cuts them, in tables of at most 10,000. Raises what it raises."""
  import datasets  # takes a second, and most runs do without

  rows = datasets.load_dataset(file_type, data_files=glob.escape(str(file)), split="train", streaming=True)
  yield from rows.with_format("arrow").iter(batch_size=10_000)


def _in_time(rows: Iterable, deadline: float) -> Iterator:
  for row in rows:
    if time.monotonic() > deadline:
      raise _SearchEnded
    yield row


def _lines(file: BinaryIO, deadline: float) -> Iterator[bytes]:
  """The lines of a file up to the first that is longer than `LINE_BYTES`."""
  for line in _in_time(iter(lambda: file.readline(LINE_BYTES + 1), b""), deadline):
    if len(line) > LINE_BYTES:
      return
    yield line


def _is_compressed(file: pathlib.Path) -> bool:
  """Whether `datasets` decompresses the file, which it knows by its first bytes."""
  with file.open("rb") as start:
    return start.read(6).startswith(_COMPRESSED)


def _in_text(file: pathlib.Path, deadline: float) -> str:
  start = 0
  with file.open("rb") as stream:
    for number, line in enumerate(_lines(stream, deadline), 1):
      try:
        line.decode()
      except UnicodeDecodeError as error:
        return (
          f"line {number} is not UTF-8 (0x{line[error.start]:02x} at byte {error.start + 1} of the line, byte "
          f"{start + error.start + 1} of the file); convert the file to UTF-8, or correct the line."
        )
      start += len(line)
  return ""


def _in_json(file: pathlib.Path, deadline: float) -> str:
  """Of a list of objects, or of JSON Lines."""
  with file.open("rb") as stream:
    is_list = next((line for line in _lines(stream, deadline) if line.strip()), b"").lstrip().startswith(b"[")
    if is_list and file.stat().st_size > LINE_BYTES:
      return ""
    stream.seek(0)
    for number, text in enumerate([stream.read()] if is_list else _lines(stream, deadline), 1):
      try:
        json.loads(text.rstrip() or b"{}")
      except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        return f"line {line} is not valid JSON ({error.msg} at character {error.colno}); correct it."
  return ""


def _in_tables(rows: Iterable[pa.Table], columns: sources.Columns, deadline: float) -> str:
  first = 1
  try:
    for table in _in_time(rows, deadline):
      if fault := in_table(table, columns, first):
        return fault
      first += table.num_rows
  except _SearchEnded:
    raise
  except Exception as error:  # of several libraries behind `datasets`
    return f"the file cannot be read behind row {first - 1} ({brief(error)}); write it again."
  return ""


def in_table(table: pa.Table, columns: sources.Columns, first: int) -> str:
  """The first fault of a table whose first row has the number `first`, as the end of a sentence; else empty."""
  faults = (_in_column(table[column], column, first) for column in columns.names)
  return in_schema(table.schema, columns) or next(filter(None, faults), "")


def _in_parquet(file: pathlib.Path, columns: sources.Columns, deadline: float) -> str:
  try:
    table = pq.ParquetFile(file)
  except (pa.ArrowException, OSError) as error:
    return f"the file is not a complete parquet file ({brief(error)}); write it again."
  if fault := in_schema(table.schema_arrow, columns):
    return fault
  first = 1
  for group in _in_time(range(table.num_row_groups), deadline):
    rows = table.metadata.row_group(group).num_rows
    for column in columns.names:
      try:
        values = table.read_row_group(group, columns=[column])[column]
      except (pa.ArrowException, OSError) as error:
        name = f"rows {first} to {first + rows - 1}"
        return f"{name} cannot be read: column {column!r} is damaged ({brief(error)}); write the file again."
      if fault := _in_column(values, column, first):
        return fault
    first += rows
  return ""


def in_schema(schema: pa.Schema, columns: sources.Columns) -> str:
  """What is wrong with the columns of a table, as the end of a sentence: they are not there, or of a wrong type."""
  for column in columns.names:
    if column not in schema.names:
      return f"the file has no column {column!r}; it has {', '.join(schema.names)}."
    kind = schema.field(column).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    tokens = lists and pa.types.is_integer(kind.value_type)
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if columns.tokenize and tokens:
      return f"column {column!r} holds tokens, and MaxText would tokenize them; set {columns.tokenize_key}=False."
    if not columns.tokenize and texts:
      return f"column {column!r} holds text, and tokens are to be read; set {columns.tokenize_key}=True."
    if not (texts or lists):
      return f"column {column!r} holds {kind}; text or token lists are needed."
  return ""


def _in_column(values: pa.ChunkedArray, column: str, first: int) -> str:
  """The first fault in a column's values, whose first row has the number `first`, as the end of a sentence."""
  if values.null_count:
    row = first + values.is_null().index(True).as_py()
    return f"row {row} has no value in column {column!r}; fill it, or delete the row."
  try:
    values.validate(full=True)
  except pa.ArrowInvalid:
    for row, value in enumerate(values, first):
      try:
        value.as_py()
      except UnicodeDecodeError as error:
        return f"row {row} is not UTF-8 in column {column!r} (byte {error.start + 1} of its text); write it again."
  return ""


def _in_records(file: pathlib.Path, file_type: str, columns: sources.Columns, deadline: float) -> str:
  """Of ArrayRecord and TFRecord, whose records must be tf.train.Examples."""
  number = 0
  try:
    for number, record in enumerate(_in_time(_records(file, file_type), deadline), 1):
      if fault := _in_record(record, columns):
        return f"record {number} {fault}"
  except _SearchEnded:
    raise
  except Exception as error:  # of libraries in C++
    return f"the file cannot be read behind record {number} ({brief(error)}); write it again."
  return ""


def _records(file: pathlib.Path, file_type: str) -> Iterable[bytes]:
  if file_type == "tfrecord":
    return grain.experimental.TFRecordIterDataset(str(file))
  source = grain.ArrayRecordDataSource([str(file)])
  return (source[index] for index in range(len(source)))


def _in_record(record: bytes, columns: sources.Columns) -> str:
  example = example_pb2.Example()
  try:
    example.ParseFromString(record)
  except DecodeError:
    return "is not a tf.train.Example; write the file with serialized tf.train.Examples."
  features = example.features.feature
  if not features:
    return "is not a tf.train.Example with features; write the file with serialized tf.train.Examples."
  for column in columns.names:
    names = (column, {"text": "messages", "messages": "text"}.get(column))  # MaxText takes either of these
    name = next((name for name in names if name in features), None)
    if name is None:
      return f"has no feature {column!r}; it has {', '.join(sorted(features))}."
    values, tokens = features[name].bytes_list.value, features[name].int64_list.value
    if columns.tokenize and tokens:
      return f"holds tokens in {name!r}, and MaxText would tokenize them; set {columns.tokenize_key}=False."
    if columns.tokenize and not values:
      return f"has no value in {name!r}; fill it, or delete the record."
    if not columns.tokenize and values:
      return f"holds text in {name!r}, and tokens are to be read; set {columns.tokenize_key}=True."
    try:
      for value in values:
        value.decode()
    except UnicodeDecodeError as error:
      return f"is not UTF-8 in {name!r} (byte {error.start + 1} of its text); write it again."
  return ""
