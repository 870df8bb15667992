"""Text files for MaxText's Grain pipeline, which saves with every checkpoint the row that it has reached.

Grain reads parquet and no plain text, so text is converted once, to one parquet file for each split in a cache folder.
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
from maxtext_mudd.runs import console, data_faults, sources

_LAYOUT = 1  # raise it when the same text would be converted differently
_ROW_GROUP_BYTES = 8 << 20  # Grain holds a row group as Python strings
_BLANK = b"maxtext_mudd.blank_rows"
_logger = logging.getLogger(__name__)


def prepare(config) -> None:
  """Sets `grain_train_files` and `grain_eval_files` of a Grain configuration that names its files by the hf_* keys.

  Parquet files are used as they are; others are converted. Logs a warning for files whose rows are mostly blank.

  Args:
    config: MuddConfig; its data files exist.

  Raises:
    ConfigError: a file is remote or cannot be converted, or the cache folder cannot be written.
  """
  if config.dataset_type != "grain":
    return
  for key, value in sources.data_files(config):
    if not key.startswith("hf"):
      continue
    if config.hf_path != "parquet":
      if sources.REMOTE in value:
        raise ConfigError(
          f"{key}={value} is not local, and dataset_type=grain converts local text; copy the files, or set "
          "dataset_type=hf."
        )
      files = sources.local_files(key, value, config)
      value = glob.escape(str(convert(files, key, config.hf_path, sources.columns(key, config))))
    setattr(config, key.replace("hf", "grain", 1), value)


def convert(files: Sequence[pathlib.Path], key: str, file_type: str, columns: sources.Columns) -> pathlib.Path:
  """The parquet file with the rows of these files, in their order; it is written unless the cache has it.

  Args:
    key: names the files in errors.
    file_type: the loader of `datasets` that cuts the files into rows: text, json, csv or arrow.
    columns: those to keep.

  Raises:
    ConfigError: as `prepare`.
  """
  states = _states(files)
  described = json.dumps([_LAYOUT, file_type, columns.names, columns.tokenize, states])
  path = sources.cache_folder() / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.parquet"
  if not _is_complete(path):
    with _new_file(path) as part:
      _write(part, files, key, file_type, columns)
      if _states(files) != states:
        raise ConfigError(f"{key}: a file was written to while it was read; start again when its writer has ended.")
  _warn_of_blank_rows(json.loads(pq.read_metadata(path).metadata[_BLANK]), key)
  return path


def _is_complete(path: pathlib.Path) -> bool:
  try:
    return _BLANK in (pq.read_metadata(path).metadata or {})
  except (pa.ArrowException, OSError):
    return False


def _states(files: Sequence[pathlib.Path]) -> list[tuple[str, int, int]]:
  """Path, size, and time of the last change."""
  return [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@contextlib.contextmanager
def _new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file of another name in the same folder, which is renamed to `path` when it is complete, or else removed.

  Raises:
    ConfigError: it cannot be written.
  """
  part = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(suffix=".part", dir=path.parent)
    os.close(descriptor)
    part = pathlib.Path(name)
    yield part
    part.rename(path)
  except OSError as error:
    raise ConfigError(
      f"{path.parent}: converted text cannot be written there ({error.strerror or brief(error)}); set the environment "
      "variable XDG_CACHE_HOME to a folder with space, which files can be written to."
    ) from error
  finally:
    if part:
      part.unlink(missing_ok=True)


def _write(
  part: pathlib.Path, files: Sequence[pathlib.Path], key: str, file_type: str, columns: sources.Columns
) -> None:
  """Writes the rows, and the numbers of blank rows and of rows for each file. Raises ConfigError and OSError."""
  blank, total = {}, sum(file.stat().st_size for file in files)
  with (
    data_faults.quiet(),
    _Rows(part) as rows,
    tqdm.tqdm(
      total=total, desc="converting text", unit="B", unit_scale=True, delay=1, file=console.stderr()
    ) as progress,
  ):
    for file in files:
      number = blank_number = 0
      for table in _read(file, key, file_type, columns):
        rows.write(table, f"{key}={file}: rows {number + 1} to {number + table.num_rows}")
        number += table.num_rows
        blank_number += _blank_rows(table)
        progress.update(min(table.nbytes, total - progress.n))  # nearly the bytes of plain text
      blank[str(file)] = (blank_number, number)
    if not any(number for _, number in blank.values()):
      raise ConfigError(f"{key}: the files hold no rows; write them again.")
    rows.describe({_BLANK: json.dumps(blank)})


def _read(file: pathlib.Path, key: str, file_type: str, columns: sources.Columns) -> Iterator[pa.Table]:
  """The columns of a file. Raises ConfigError, which names the first fault."""
  first = 1
  try:
    for table in data_faults.tables(file, file_type):
      if fault := data_faults.in_table(table, columns, first):
        raise ConfigError(f"{key}={file}: {fault}")
      yield table.select(list(columns.names))
      first += table.num_rows
  except ConfigError:
    raise
  except Exception as error:  # of several libraries behind `datasets`
    fault = data_faults.find(file, file_type, columns) or f"the file cannot be read ({brief(error)}); write it again."
    raise ConfigError(f"{key}={file}: {fault}") from error


class _Rows:
  """Writes tables to a parquet file, in row groups of about `_ROW_GROUP_BYTES`."""

  def __init__(self, path: pathlib.Path):
    self._path, self._writer, self._tables = path, None, []

  def write(self, table: pa.Table, name: str) -> None:
    """Raises ConfigError where the columns have other types than those of the first table."""
    if self._writer is None:
      self._writer = pq.ParquetWriter(self._path, table.schema.remove_metadata(), compression="zstd")
    schema = self._writer.schema
    try:
      self._tables.append(table.replace_schema_metadata().select(schema.names).cast(schema))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
      raise ConfigError(
        f"{name} have other types than the rows before them ({brief(error)}); make them alike."
      ) from error
    if sum(table.nbytes for table in self._tables) >= _ROW_GROUP_BYTES:
      self._flush()

  def describe(self, metadata: dict) -> None:
    self._writer.add_key_value_metadata(metadata)

  def _flush(self) -> None:
    if self._tables:
      self._writer.write_table(pa.concat_tables(self._tables))
      self._tables = []

  def __enter__(self) -> "_Rows":
    return self

  def __exit__(self, kind, *_) -> None:
    if self._writer is not None:
      if kind is None:
        self._flush()
      self._writer.close()


def _blank_rows(table: pa.Table) -> int:
  """The number of rows whose texts are all blank; 0 where a column holds no text."""
  if not all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in table.schema.types):
    return 0
  blank = [pc.equal(pc.utf8_trim_whitespace(column), "") for column in table.columns]
  return pc.sum(functools.reduce(pc.and_, blank)).as_py() or 0


def _warn_of_blank_rows(numbers: dict[str, tuple[int, int]], key: str) -> None:
  mostly = [f"{file} ({blank} of {rows} rows)" for file, (blank, rows) in numbers.items() if 2 * blank > rows]
  if mostly:
    others = f", and so do {len(mostly) - 1} other files" if mostly[1:] else ""
    _logger.warning("%s: %s holds mostly blank rows, from which nothing is learnt%s.", key, mostly[0], others)
