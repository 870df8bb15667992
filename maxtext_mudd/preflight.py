"""What a training run reads and writes, looked at before anything is compiled or written."""

import glob
import os
import pathlib

from maxtext_mudd.errors import ConfigError

REMOTE = ("gs://", "hf://", "s3://")


def check_training(config) -> None:
  """Raises ConfigError for a local corpus that is missing or empty, and for an output folder that takes no files."""
  dataset_type = config.dataset_type.value
  if dataset_type in ("grain", "hf"):
    for key in (f"{dataset_type}_train_files", f"{dataset_type}_eval_files"):
      if getattr(config, key) and (key.endswith("train_files") or config.eval_interval > 0):
        _check_files(key, getattr(config, key))
  _check_output(config.base_output_directory)


def _check_files(key: str, value: str | list) -> None:
  for entry in value if isinstance(value, list) else str(value).split(";"):
    pattern = str(entry).split(",")[0]  # a weight may follow
    if pattern.startswith(REMOTE):
      continue
    files = [pathlib.Path(name) for name in _matches(pattern)]
    if not files:
      raise ConfigError(f"{key}={pattern}: no such file; `make corpus` builds the default corpus.")
    empty = next((file for file in files if file.is_file() and _is_empty(file)), None)
    if empty:
      raise ConfigError(f"{key}={empty}: the file holds no text; `make corpus` builds the default corpus.")


def _matches(pattern: str) -> list[str]:
  # Megatron maps are named without the .bin and .idx that both halves end in.
  return glob.glob(pattern) or glob.glob(f"{pattern}.bin") or glob.glob(f"{pattern}*")


def _is_empty(file: pathlib.Path) -> bool:
  if file.suffix == ".parquet" and file.stat().st_size:
    import pyarrow.parquet  # heavy, and needed for this format only

    try:
      return pyarrow.parquet.read_metadata(file).num_rows == 0
    except pyarrow.ArrowInvalid:
      raise ConfigError(f"{file} is not a complete parquet file; build it again with `make corpus`.") from None
  return file.stat().st_size == 0


def _check_output(folder: str) -> None:
  if not folder or folder.startswith(REMOTE):
    return
  existing = pathlib.Path(folder).absolute()
  while not existing.exists():
    existing = existing.parent
  if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
    raise ConfigError(f"base_output_directory={folder}: {existing} is not a folder that files can be written to.")
