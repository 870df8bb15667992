"""Converts local text files to Parquet, so that MaxText's Grain pipeline can read them.

Grain saves its position in the data with every checkpoint, but reads no plain text. So `prepare` writes the rows of
each split to one Parquet file in a cache folder, once, and sets the keys from which Grain takes its files.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import glob
import hashlib
import json
import logging
import os
import pathlib
import tempfile

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tqdm

from maxtext_mudd.config.errors import ConfigError, brief
from maxtext_mudd.runs import console, data_faults, data_settings

_FORMAT_VERSION = 1  # a part of the name of converted files; raise it when the same text is converted differently
_ROW_GROUP_BYTES = 8 << 20  # small, because Grain holds a whole row group as Python strings
_BLANK_ROWS = b"maxtext_mudd.blank_rows"  # Parquet metadata: for each text file, the numbers of blank rows and of rows
_logger = logging.getLogger(__name__)


def prepare(config) -> None:
  """Sets `grain_train_files` and `grain_eval_files` if a Grain configuration names its files by the hf_* keys.

  Parquet files are used as they are, and files of other formats are converted. Logs a warning for files whose rows are
  mostly blank.

  Args:
    config: MuddConfig of a run whose data files exist.

  Raises:
    ConfigError: a file is remote or cannot be converted, or the cache folder cannot be written.
  """
  if config.dataset_type != "grain":
    return
  for key, value in data_settings.file_keys(config):
    if not key.startswith("hf"):
      continue
    if config.hf_path != "parquet":
      if data_settings.is_remote(value):
        raise ConfigError(
          f"{key}={value} is not local, and dataset_type=grain converts local text; copy the files, or set "
          "dataset_type=hf."
        )
      files = data_settings.local_files(key, value, config)
      value = glob.escape(str(convert(files, key, config.hf_path, data_settings.columns(key, config))))
    setattr(config, key.replace("hf", "grain", 1), value)


def convert(files: Sequence[pathlib.Path], key: str, file_type: str, columns: data_settings.Columns) -> pathlib.Path:
  """Writes the rows of the files to one Parquet file, in their order, unless the cache has that file already.

  Args:
    key: the configuration key that names the files, for errors.
    file_type: the loader of `datasets` that splits the files into rows: text, json, csv or arrow.
    columns: the columns to keep.

  Returns:
    The path of the Parquet file.

  Raises:
    ConfigError: as for `prepare`.
  """
  states = _states(files)
  content = json.dumps([_FORMAT_VERSION, file_type, columns.names, columns.tokenize, states])
  path = data_settings.cache_folder() / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.parquet"
  if not _is_complete(path):
    with _new_file(path) as incomplete:
      _write(incomplete, files, key, file_type, columns)
      if _states(files) != states:
        raise ConfigError(f"{key}: a file was written to while it was read; start again when its writer has ended.")
  _warn_of_blank_rows(json.loads(pq.read_metadata(path).metadata[_BLANK_ROWS]), key)
  return path


def _is_complete(path: pathlib.Path) -> bool:
  try:
    return _BLANK_ROWS in (pq.read_metadata(path).metadata or {})
  except (pa.ArrowException, OSError):
    return False


def _states(files: Sequence[pathlib.Path]) -> list[tuple[str, int, int]]:
  """The path, size in bytes and time of the last change (in ns) of each file."""
  return [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@contextlib.contextmanager
def _new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a file of another name in the same folder. At the end renames it to `path`, or removes it after an error.

  Raises:
    ConfigError: the file cannot be written.
  """
  incomplete = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(suffix=".part", dir=path.parent)
    os.close(descriptor)
    incomplete = pathlib.Path(name)
    yield incomplete
    incomplete.rename(path)
  except OSError as error:
    raise ConfigError(
      f"{path.parent}: converted text cannot be written there ({error.strerror or brief(error)}); set the environment "
      "variable XDG_CACHE_HOME to a folder that has space and that files can be written to."
    ) from error
  finally:
    if incomplete:
      incomplete.unlink(missing_ok=True)


def _write(
  path: pathlib.Path, files: Sequence[pathlib.Path], key: str, file_type: str, columns: data_settings.Columns
) -> None:
  """Writes the rows of the files and, as metadata `_BLANK_ROWS`, the counts of each. Raises ConfigError and OSError."""
  counts, total_bytes = {}, sum(file.stat().st_size for file in files)
  with (
    data_faults.quiet(),
    _RowWriter(path) as writer,
    tqdm.tqdm(
      total=total_bytes, desc="converting text", unit="B", unit_scale=True, delay=1, file=console.stderr()
    ) as progress,
  ):
    for file in files:
      rows = blank_rows = 0
      for table in _read(file, key, file_type, columns):
        writer.write(table, f"{key}={file}: rows {rows + 1} to {rows + table.num_rows}")
        rows += table.num_rows
        blank_rows += _count_blank_rows(table)
        progress.update(min(table.nbytes, total_bytes - progress.n))  # for plain text, nearly the bytes of the file
      counts[str(file)] = (blank_rows, rows)
    if not any(rows for _, rows in counts.values()):
      raise ConfigError(f"{key}: the files hold no rows; write them again.")
    writer.add_metadata({_BLANK_ROWS: json.dumps(counts)})


def _read(file: pathlib.Path, key: str, file_type: str, columns: data_settings.Columns) -> Iterator[pa.Table]:
  """Yields the columns of a file in tables. Raises ConfigError, which names the first fault."""
  first_row = 1
  try:
    for table in data_faults.tables(file, file_type):
      if fault := data_faults.fault_in_table(table, columns, first_row):
        raise ConfigError(f"{key}={file}: {fault}")
      yield table.select(list(columns.names))
      first_row += table.num_rows
  except ConfigError:
    raise
  except Exception as error:  # each library behind `datasets` raises its own
    fault = data_faults.find(file, file_type, columns) or f"the file cannot be read ({brief(error)}); write it again."
    raise ConfigError(f"{key}={file}: {fault}") from error


class _RowWriter:
  """Writes tables to a Parquet file, in row groups of about `_ROW_GROUP_BYTES`."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._writer: pq.ParquetWriter | None = None  # made with the schema of the first table
    self._tables: list[pa.Table] = []  # not written yet

  def write(self, table: pa.Table, described_rows: str) -> None:
    """Adds a table.

    Args:
      described_rows: the key, file and rows of the table, for errors.

    Raises:
      ConfigError: a column has another type than in the first table.
    """
    if self._writer is None:
      self._writer = pq.ParquetWriter(self._path, table.schema.remove_metadata(), compression="zstd")
    schema = self._writer.schema
    try:
      self._tables.append(table.replace_schema_metadata().select(schema.names).cast(schema))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
      raise ConfigError(
        f"{described_rows} have other types than the rows before them ({brief(error)}); make the types equal."
      ) from error
    if sum(table.nbytes for table in self._tables) >= _ROW_GROUP_BYTES:
      self._flush()

  def add_metadata(self, metadata: dict) -> None:
    self._writer.add_key_value_metadata(metadata)

  def _flush(self) -> None:
    if self._tables:
      self._writer.write_table(pa.concat_tables(self._tables))
      self._tables = []

  def __enter__(self) -> "_RowWriter":
    return self

  def __exit__(self, error_type, *_) -> None:
    if self._writer is not None:
      if error_type is None:
        self._flush()
      self._writer.close()


def _count_blank_rows(table: pa.Table) -> int:
  """The number of rows whose texts are all blank; 0 if a column does not hold text."""
  if not all(pa.types.is_string(column) or pa.types.is_large_string(column) for column in table.schema.types):
    return 0
  is_blank = [pc.equal(pc.utf8_trim_whitespace(column), "") for column in table.columns]
  return pc.sum(functools.reduce(pc.and_, is_blank)).as_py() or 0


def _warn_of_blank_rows(counts: dict[str, tuple[int, int]], key: str) -> None:
  """Warns of files with more blank rows than others. `counts` has the numbers of blank rows and of rows by file."""
  files = [f"{file} ({blank} of {rows} rows)" for file, (blank, rows) in counts.items() if 2 * blank > rows]
  if files:
    others = f", and so do {len(files) - 1} other files" if files[1:] else ""
    _logger.warning("%s: %s holds mostly blank rows, from which nothing is learnt%s.", key, files[0], others)
