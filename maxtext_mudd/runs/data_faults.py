"""Finds the first fault in the data files of a run, and describes it in one sentence.

`explain` turns an exception of MaxText's data iterators into such a sentence. `find` searches one file.
"""

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
import jinja2
from maxtext.input_pipeline.protos import example_pb2
import pyarrow as pa
import pyarrow.parquet as pq

from maxtext_mudd.config.errors import ConfigError, brief, failed_in
from maxtext_mudd.runs import data_settings, megatron_files

SEARCH_SECONDS = 120  # the longest time that a failed run searches for the file at fault
LINE_BYTES = 2**28  # longer lines, and larger files of one JSON list, are not searched: they may not fit in memory
_COMPRESSED_STARTS = (
  b"\x1f\x8b",
  b"PK\x03\x04",
  b"BZh",
  b"\xfd7zXZ",
  b"\x28\xb5\x2f\xfd",
  b"\x04\x22\x4d\x18",
  b"Rar!",
)


class _SearchEnded(Exception):
  """The search was stopped at its deadline."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Turns off log messages and warnings: the run repeats those of its data later, and errors become sentences."""
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
  """Says in one sentence what is wrong with the data that a configuration names.

  Searches the local files of the configuration, for training and for evaluation, up to the first fault. The search
  takes at most `SEARCH_SECONDS`.

  Args:
    config: MaxText's configuration: `HyperParameters`, or the pydantic class behind it.
    error: what a data iterator of MaxText raised.

  Returns:
    A sentence. It names the file and the row, counted from 1, if the search finds them. Otherwise it gives the cause
    and says that the file is not known.
  """
  if isinstance(error, ConfigError):
    return str(error)
  if sentence := _setting_at_fault(config, error):
    return sentence
  deadline = time.monotonic() + SEARCH_SECONDS
  has_searched = False
  data = " and ".join(data_settings.describe(split, config) for split in data_settings.splits(config))
  unreadable = f"{data}: the data cannot be read ({brief(error)})"
  try:
    for key, value in data_settings.file_keys(config):
      for file in data_settings.local_files(key, value, config):
        if fault := find(file, data_settings.file_type(key, config), data_settings.columns(key, config), deadline):
          return f"{key}={file}: {fault}"
        has_searched = True
  except _SearchEnded:
    return f"{unreadable}; the search for the file at fault ended after {SEARCH_SECONDS} seconds."
  conclusion = "the local files show no fault" if has_searched else "which file is at fault is not known"
  return f"{unreadable}; {conclusion}."


def _setting_at_fault(config, error: Exception) -> str:
  """The sentence for an error that comes from the value of a key and not from a file; empty for other errors."""
  if isinstance(error, ModuleNotFoundError):
    return (
      f"{data_settings.describe('train', config)} needs the module {error.name}, which is not installed; install it, "
      "or use another dataset_type."
    )
  if not config.use_sft:
    return ""
  # With use_sft MaxText asserts that the columns have names of conversations, and the rows the form of conversations.
  if failed_in(error, "validate_and_configure_sft_columns"):
    return (
      f"use_sft=True reads conversations, and train_data_columns={list(config.train_data_columns)} holds none; set it "
      "and eval_data_columns to [messages], [prompt,completion] or [question,answer], or set use_sft=False."
    )
  if failed_in(error, "apply_chat_template") and "chat_template" in str(error):
    return (
      f"use_sft=True needs a chat template, and the tokenizer of tokenizer_path={config.tokenizer_path} has none; set "
      "chat_template, or name a tokenizer that has one."
    )
  if isinstance(error, jinja2.TemplateError):
    return f"chat_template cannot be used ({brief(error)}); correct the template."
  if "conversational format" in str(error):
    columns = [repr(getattr(config, f"{split}_data_columns")[0]) for split in data_settings.splits(config)]
    return (
      f"use_sft=True reads conversations, and the column {' or '.join(dict.fromkeys(columns))} holds none; a row is a "
      "list of messages, each with a role and a content."
    )
  return ""


def find(file: pathlib.Path, file_type: str, columns: data_settings.Columns, deadline: float = float("inf")) -> str:
  """Finds the first fault of a file.

  Args:
    file_type: a value of `data_settings.file_type`.
    columns: the columns that MaxText reads.
    deadline: the time of `time.monotonic`, in seconds, at which the search stops.

  Returns:
    The fault as the end of a sentence. It is empty if there is no fault, or if files of this type are not searched.

  Raises:
    _SearchEnded: the deadline has passed.
  """
  try:
    return _first_fault(file, file_type, columns, deadline)
  except OSError as error:
    return f"the file cannot be read ({error.strerror or brief(error)}); name one that can."


def _first_fault(file: pathlib.Path, file_type: str, columns: data_settings.Columns, deadline: float) -> str:
  if file_type == "mmap":
    return megatron_files.fault(str(file).removesuffix(".idx"))
  if file_type == "parquet":
    return _fault_in_parquet(file, columns, deadline)
  if file_type in ("arrayrecord", "tfrecord"):
    return _fault_in_records(file, file_type, columns, deadline)
  if file_type in ("text", "json", "csv"):
    fault = ""
    if not _is_compressed(file):
      fault = _fault_in_text(file, deadline) or (_fault_in_json(file, deadline) if file_type == "json" else "")
    return fault or _fault_in_tables(tables(file, file_type), columns, deadline)
  return ""


def tables(file: pathlib.Path, file_type: str) -> Iterator[pa.Table]:
  """Yields the rows of a file, as the loader of `datasets` splits it, in tables of at most 10,000 rows.

  Raises:
    Exception: whatever the loader raises.
  """
  import datasets  # the import takes a second, and most runs do not need it

  rows = datasets.load_dataset(file_type, data_files=glob.escape(str(file)), split="train", streaming=True)
  yield from rows.with_format("arrow").iter(batch_size=10_000)


def _until(deadline: float, rows: Iterable) -> Iterator:
  """Yields the rows. Raises _SearchEnded at the first one after the deadline."""
  for row in rows:
    if time.monotonic() > deadline:
      raise _SearchEnded
    yield row


def _lines(file: BinaryIO, deadline: float) -> Iterator[bytes]:
  """Yields the lines of a file, and stops before the first that is longer than `LINE_BYTES`."""
  for line in _until(deadline, iter(lambda: file.readline(LINE_BYTES + 1), b"")):
    if len(line) > LINE_BYTES:
      return
    yield line


def _is_compressed(file: pathlib.Path) -> bool:
  """Whether `datasets` decompresses the file. It decides by the first bytes, and so does this function."""
  with file.open("rb") as stream:
    return stream.read(6).startswith(_COMPRESSED_STARTS)


def _fault_in_text(file: pathlib.Path, deadline: float) -> str:
  """The first byte that is not UTF-8."""
  line_start = 0
  with file.open("rb") as stream:
    for number, line in enumerate(_lines(stream, deadline), 1):
      try:
        line.decode()
      except UnicodeDecodeError as error:
        return (
          f"line {number} is not UTF-8 (0x{line[error.start]:02x} at byte {error.start + 1} of the line, byte "
          f"{line_start + error.start + 1} of the file); convert the file to UTF-8, or correct the line."
        )
      line_start += len(line)
  return ""


def _fault_in_json(file: pathlib.Path, deadline: float) -> str:
  """The first place that is not valid JSON, in a file that holds one list of objects, or an object on each line."""
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


def _fault_in_tables(tables_of_file: Iterable[pa.Table], columns: data_settings.Columns, deadline: float) -> str:
  first_row = 1
  try:
    for table in _until(deadline, tables_of_file):
      if fault := fault_in_table(table, columns, first_row):
        return fault
      first_row += table.num_rows
  except _SearchEnded:
    raise
  except Exception as error:  # each library behind `datasets` raises its own
    return f"the file cannot be read after row {first_row - 1} ({brief(error)}); write it again."
  return ""


def fault_in_table(table: pa.Table, columns: data_settings.Columns, first_row: int) -> str:
  """The first fault of a table, as the end of a sentence; empty if there is none.

  Args:
    first_row: the number of the table's first row in its file, counted from 1.
  """
  faults = (_fault_in_column(table[column], column, first_row) for column in columns.names)
  return fault_in_schema(table.schema, columns) or next(filter(None, faults), "")


def _fault_in_parquet(file: pathlib.Path, columns: data_settings.Columns, deadline: float) -> str:
  try:
    parquet = pq.ParquetFile(file)
  except (pa.ArrowException, OSError) as error:
    return f"the file is not a complete parquet file ({brief(error)}); write it again."
  if fault := fault_in_schema(parquet.schema_arrow, columns):
    return fault
  first_row = 1
  for group in _until(deadline, range(parquet.num_row_groups)):
    rows = parquet.metadata.row_group(group).num_rows
    for column in columns.names:
      try:
        values = parquet.read_row_group(group, columns=[column])[column]
      except (pa.ArrowException, OSError) as error:
        row_range = f"rows {first_row} to {first_row + rows - 1}"
        return f"{row_range} cannot be read: column {column!r} is damaged ({brief(error)}); write the file again."
      if fault := _fault_in_column(values, column, first_row):
        return fault
    first_row += rows
  return ""


def fault_in_schema(schema: pa.Schema, columns: data_settings.Columns) -> str:
  """The first column that is missing or has a wrong type, as the end of a sentence; empty if there is none."""
  for column in columns.names:
    if column not in schema.names:
      return f"the file has no column {column!r}; it has {', '.join(schema.names)}."
    column_type = schema.field(column).type
    holds_lists = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    holds_tokens = holds_lists and pa.types.is_integer(column_type.value_type)
    holds_text = pa.types.is_string(column_type) or pa.types.is_large_string(column_type)
    if columns.tokenize and holds_tokens:
      return f"column {column!r} holds tokens, and MaxText would tokenize them; set {columns.tokenize_key}=False."
    if not columns.tokenize and holds_text:
      return f"column {column!r} holds text, and MaxText would read tokens; set {columns.tokenize_key}=True."
    if not (holds_text or holds_lists):
      return f"column {column!r} holds {column_type}; text or lists of tokens are needed."
  return ""


def _fault_in_column(values: pa.ChunkedArray, column: str, first_row: int) -> str:
  """The first value that is missing or is not UTF-8, as the end of a sentence; empty if there is none."""
  if values.null_count:
    row = first_row + values.is_null().index(True).as_py()
    return f"row {row} has no value in column {column!r}; fill it, or delete the row."
  try:
    values.validate(full=True)
  except pa.ArrowInvalid:
    for row, value in enumerate(values, first_row):
      try:
        value.as_py()
      except UnicodeDecodeError as error:
        return f"row {row} is not UTF-8 in column {column!r} (byte {error.start + 1} of its text); write it again."
  return ""


def _fault_in_records(file: pathlib.Path, file_type: str, columns: data_settings.Columns, deadline: float) -> str:
  """The first fault of an ArrayRecord or TFRecord file, whose records must be tf.train.Examples."""
  number = 0
  try:
    for number, record in enumerate(_until(deadline, _records(file, file_type)), 1):
      if fault := _fault_in_record(record, columns):
        return f"record {number} {fault}"
  except _SearchEnded:
    raise
  except Exception as error:  # each library in C++ raises its own
    return f"the file cannot be read after record {number} ({brief(error)}); write it again."
  return ""


def _records(file: pathlib.Path, file_type: str) -> Iterable[bytes]:
  if file_type == "tfrecord":
    return grain.experimental.TFRecordIterDataset(str(file))
  source = grain.ArrayRecordDataSource([str(file)])
  return (source[index] for index in range(len(source)))


def _fault_in_record(record: bytes, columns: data_settings.Columns) -> str:
  """The first fault of a serialized tf.train.Example, as the end of a sentence; empty if there is none."""
  example = example_pb2.Example()
  try:
    example.ParseFromString(record)
  except DecodeError:
    return "is not a tf.train.Example; write the file with serialized tf.train.Examples."
  features = example.features.feature
  if not features:
    return "is not a tf.train.Example with features; write the file with serialized tf.train.Examples."
  for column in columns.names:
    names = (column, {"text": "messages", "messages": "text"}.get(column))  # MaxText accepts either name
    name = next((name for name in names if name in features), None)
    if name is None:
      return f"has no feature {column!r}; it has {', '.join(sorted(features))}."
    values, tokens = features[name].bytes_list.value, features[name].int64_list.value
    if columns.tokenize and tokens:
      return f"holds tokens in {name!r}, and MaxText would tokenize them; set {columns.tokenize_key}=False."
    if columns.tokenize and not values:
      return f"has no value in {name!r}; fill it, or delete the record."
    if not columns.tokenize and values:
      return f"holds text in {name!r}, and MaxText would read tokens; set {columns.tokenize_key}=True."
    try:
      for value in values:
        value.decode()
    except UnicodeDecodeError as error:
      return f"is not UTF-8 in {name!r} (byte {error.start + 1} of its text); write it again."
  return ""
