"""What a training run reads and writes, looked at before anything is compiled or written."""

import os
import pathlib

from maxtext.configs import pyconfig
from maxtext.input_pipeline import input_pipeline_interface
from maxtext.utils import maxtext_utils
import pyarrow as pa
import pyarrow.parquet as pq

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import data_faults, first_batch, sources, text_files, token_maps


def check_training(config) -> None:
  """Raises ConfigError for local data that are not named or are not there, an output folder that takes no files, and a
  checkpoint that the run cannot start from."""
  check_files(config)
  _check_output(config.base_output_directory)
  if 0 < config.trainable_position_size < config.max_target_length:
    raise ConfigError(
      f"trainable_position_size={config.trainable_position_size} is less than max_target_length="
      f"{config.max_target_length}; make it at least as large."
    )
  _check_start(config)


def try_data(config) -> None:
  """Raises ConfigError for data that cannot be read, or give no first batch.

  Converts local text for Grain, and sets the keys of `config` that name the converted files: `runs/text_files.py`.
  """
  text_files.prepare(config)
  first_batch.check(config)


def check_files(config) -> None:
  """Raises ConfigError for local data files that are not named, do not exist, or are of another format."""
  sources.check(config)
  for key, value in sources.data_files(config):
    for pattern, _ in sources.entries(key, value) if value else ():
      if sources.REMOTE not in pattern:
        _check_files(key, pattern, config)


def _check_start(config) -> None:
  """The checkpoint that a new run starts from; MaxText would look at it when it has made the run's folders."""
  if any(entry.name.isdigit() for entry in _entries(config.checkpoint_dir)):
    return  # the run goes on from its own
  for key in ("load_parameters_path", "load_full_state_path"):
    path = getattr(config, key)
    if path and sources.REMOTE not in path and not os.path.isdir(path):
      raise ConfigError(f"{key}={path}: there is no such folder; name a checkpoint, as OUTPUT/RUN/checkpoints/STEP.")
  path = config.load_parameters_path
  if path and sources.REMOTE not in path and config.mudd:
    from maxtext_mudd.checkpoints import parameters

    parameters.check_path(str(parameters.items_folder(path)), pyconfig.HyperParameters(config))


def _entries(folder: str) -> list[os.DirEntry]:
  return list(os.scandir(folder)) if folder and os.path.isdir(folder) else []


def _check_files(key: str, pattern: str, config) -> None:
  files = sources.matches(key, pattern, config)
  if sources.file_type(key, config) == "mmap":
    for fault in filter(None, (token_maps.fault(str(file.with_suffix(""))) for file in files)):
      raise ConfigError(f"{key}={pattern}: {fault}")
    return
  for file in files:
    _check_file(key, file, config)
  _check_workers(key, len(files), config)


def _check_file(key: str, file: pathlib.Path, config) -> None:
  if not file.is_file():
    raise ConfigError(f"{key}={file} is not a file; name files, or a pattern that matches files.")
  if not file.stat().st_size:
    raise ConfigError(f"{key}={file}: the file holds no text; write it again.")
  if config.dataset_type == "grain" and sources.file_type(key, config) == "parquet":
    _check_parquet(key, file, sources.columns(key, config))


def _check_parquet(key: str, file: pathlib.Path, columns: sources.Columns) -> None:
  try:
    with pq.ParquetFile(file) as table:
      schema, rows = table.schema_arrow, table.metadata.num_rows
  except pa.ArrowInvalid:
    raise ConfigError(f"{key}={file} is not a complete parquet file; write it again.") from None
  if not rows:
    raise ConfigError(f"{key}={file}: the file holds no text; write it again.")
  if fault := data_faults.in_schema(schema, columns):
    raise ConfigError(f"{key}={file}: {fault}")


def _check_workers(key: str, files: int, config) -> None:
  """Grain's workers share no file where MaxText reads files from the first row to the last. Raises ConfigError."""
  workers_key = "grain_worker_count_eval" if "eval" in key else "grain_worker_count"
  workers = getattr(config, workers_key)
  if config.dataset_type != "grain" or config.grain_file_type not in ("parquet", "tfrecord") or workers <= 1:
    return
  if not first_batch.can_be_tried(config):
    return  # what reads the data is known later
  named = f"{files} file(s) in {key}"
  if sources.file_type(key, config) != config.grain_file_type:
    files, named = 1, f"the one file that {key} is converted to"  # by `text_files`
  most = max(files // _readers(key, config), 1)
  if workers > most:
    raise ConfigError(
      f"{workers_key}={workers} with {named}: each worker of a host reads whole files; set it to {most} or less."
    )


def _readers(key: str, config) -> int:
  """Among how many readers MaxText divides the files of a key: the processes that load data, or several for each."""
  parameters = pyconfig.HyperParameters(config)
  mesh = maxtext_utils.get_mesh_from_config(parameters)
  if "eval" in key:
    batch_sizes = parameters.global_batch_size_to_load_eval, parameters.global_batch_size_to_eval_on
  else:
    batch_sizes = parameters.global_batch_size_to_load, parameters.global_batch_size_to_train_on
  processes = input_pipeline_interface.get_process_loading_real_data(
    parameters.data_sharding, *batch_sizes, parameters.max_target_length, mesh
  )
  factor = parameters.expansion_factor_real_data
  return len(processes) * (int(1 / factor) if "train" in key and 0 < factor < 1 else 1)


def _check_output(folder: str) -> None:
  if not folder or sources.REMOTE in folder:
    return
  existing = pathlib.Path(folder).absolute()
  while not existing.exists():
    existing = existing.parent
  if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
    raise ConfigError(f"base_output_directory={folder}: {existing} is not a folder that files can be written to.")
