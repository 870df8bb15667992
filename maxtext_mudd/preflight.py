"""What a training run reads and writes, looked at before anything is compiled or written."""

from collections.abc import Iterator
import glob
import os
import pathlib
import re

import pyarrow as pa
import pyarrow.parquet as pq

from maxtext_mudd.errors import ConfigError

REMOTE = "://"
LOCAL_LOADERS = ("arrow", "csv", "json", "parquet", "text")  # of `datasets`; any other hf_path names a hub's files


def check_training(config) -> None:
  """Raises ConfigError for a local corpus that is not named or cannot be read, and for an output folder that takes no
  files."""
  for key, value in data_files(config):
    if value:
      _check_files(key, value, config)
    elif key.startswith("hf"):  # of grain, MaxText says it itself
      raise ConfigError(f"{key}='' names no data; set it to files, or to a pattern that matches files.")
  _check_output(config.base_output_directory)
  if 0 < config.trainable_position_size < config.max_target_length:
    raise ConfigError(
      f"trainable_position_size={config.trainable_position_size} is less than max_target_length="
      f"{config.max_target_length}; make it at least as large."
    )
  _check_start(config)


def _check_start(config) -> None:
  """The checkpoint that a new run starts from; MaxText would look at it when it has made the run's folders."""
  if any(entry.name.isdigit() for entry in _entries(config.checkpoint_dir)):
    return  # the run goes on from its own
  for key in ("load_parameters_path", "load_full_state_path"):
    path = getattr(config, key)
    if path and REMOTE not in path and not os.path.isdir(path):
      raise ConfigError(f"{key}={path}: there is no such folder; name a checkpoint, as OUTPUT/RUN/checkpoints/STEP.")
  path = config.load_parameters_path
  if path and REMOTE not in path and config.mudd:
    from maxtext.configs import pyconfig

    from maxtext_mudd.checkpoints import parameters

    parameters.check_path(str(parameters.items(path)), pyconfig.HyperParameters(config))


def _entries(folder: str) -> list[os.DirEntry]:
  return list(os.scandir(folder)) if folder and os.path.isdir(folder) else []


def data_files(config) -> Iterator[tuple[str, str | list]]:
  """The keys that name files of text or tokens for this configuration to read, with their values."""
  dataset_type = config.dataset_type.value
  reads_local_files = {
    "grain": config.grain_file_type != "mmap_npy",  # names folders, index files and blends of them
    "hf": config.hf_path in LOCAL_LOADERS,
  }
  if reads_local_files.get(dataset_type):
    for split in ("train", "eval") if config.eval_interval > 0 else ("train",):
      key = f"{dataset_type}_{split}_files"
      yield key, getattr(config, key)


def entries(value: str | list) -> list[str]:
  """The patterns, each with a weight or without, that such a key holds."""
  return list(map(str, value if isinstance(value, list) else str(value).split(";")))


def _check_files(key: str, value: str | list, config) -> None:
  for entry in entries(value):
    pattern, *weight = entry.split(",")
    if REMOTE in pattern:
      continue
    if weight and not re.fullmatch(r"[0-9.eE+-]+", weight[0]):
      raise ConfigError(f"{key}={entry}: {weight[0]!r} is not a weight; write pattern,number.")
    path = os.path.expanduser(pattern)
    if key.startswith("grain") and config.grain_file_type == "mmap":
      files = _check_pair(key, path)
    else:
      files = glob.glob(path, recursive=True)
    if not files:
      raise ConfigError(f"{key}={pattern}: no such file; yaml/README.md says where data comes from.")
    for file in map(pathlib.Path, files):
      _check_file(key, file, config)


def _check_pair(key: str, path: str) -> list[str]:
  """Megatron's .bin and .idx, named without their endings."""
  bins = glob.glob(f"{path}.bin", recursive=True)
  indices = [f"{name.removesuffix('.bin')}.idx" for name in bins]
  for index in indices:
    if not os.path.isfile(index):
      raise ConfigError(f"{key}={path}: {index} is missing; a .bin file is read with its .idx file.")
  return bins + indices


def _check_file(key: str, file: pathlib.Path, config) -> None:
  if not file.is_file():
    raise ConfigError(f"{key}={file} is not a file; name files, or a pattern that matches files.")
  if not file.stat().st_size:
    raise ConfigError(f"{key}={file}: the file holds no text; write it again.")
  if key.startswith("grain") and config.grain_file_type == "parquet":
    columns = config.train_data_columns if "train" in key else config.eval_data_columns
    _check_parquet(key, file, columns)


def _check_parquet(key: str, file: pathlib.Path, columns: list[str]) -> None:
  try:
    schema, rows = pq.read_schema(file), pq.read_metadata(file).num_rows
  except pa.ArrowInvalid:
    raise ConfigError(f"{key}={file} is not a complete parquet file; write it again.") from None
  if not rows:
    raise ConfigError(f"{key}={file}: the file holds no text; write it again.")
  for column in columns:
    if column not in schema.names:
      raise ConfigError(f"{key}={file} has no column {column!r}; it has {', '.join(schema.names)}.")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_list(kind)):
      raise ConfigError(f"{key}={file}: column {column!r} holds {kind}; text or token lists are needed.")


def _check_output(folder: str) -> None:
  if not folder or REMOTE in folder:
    return
  existing = pathlib.Path(folder).absolute()
  while not existing.exists():
    existing = existing.parent
  if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
    raise ConfigError(f"base_output_directory={folder}: {existing} is not a folder that files can be written to.")
