"""Checks what a training run reads and writes, before anything is compiled or written.

`check_training` looks at data files, the output folder and the start checkpoint. `try_data` then reads a first batch.
"""

import os
import pathlib

from maxtext.configs import pyconfig
from maxtext.input_pipeline import input_pipeline_interface
from maxtext.utils import maxtext_utils
import pyarrow as pa
import pyarrow.parquet as pq

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import data_faults, data_settings, first_batch, megatron_files, text_files


def check_training(config) -> None:
  """Raises ConfigError for what `check_inputs` refuses, and for a checkpoint that the run cannot start from."""
  check_inputs(config)
  _check_start_checkpoint(config)


def check_inputs(config) -> None:
  """Raises ConfigError for local data files that are not named or do not exist, and an output folder that cannot be
  written to."""
  check_files(config)
  _check_output_folder(config.base_output_directory)
  if 0 < config.trainable_position_size < config.max_target_length:
    raise ConfigError(
      f"trainable_position_size={config.trainable_position_size} is less than max_target_length="
      f"{config.max_target_length}; make it at least as large."
    )


def try_data(config) -> None:
  """Reads a first batch, after `text_files.prepare` has converted local text and set the keys of `config` for it.

  Raises:
    ConfigError: the data cannot be read, or give no first batch.
  """
  text_files.prepare(config)
  first_batch.check(config)


def check_files(config) -> None:
  """Raises ConfigError for local data files that are not named, do not exist, or are of another format."""
  data_settings.check(config)
  for key, value in data_settings.file_keys(config):
    for pattern, _ in data_settings.patterns(key, value) if value else ():
      if not data_settings.is_remote(pattern):
        _check_pattern(key, pattern, config)


def _check_start_checkpoint(config) -> None:
  """Checks the checkpoint that a new run starts from. MaxText would read it after it has created the run's folders."""
  if _has_own_checkpoint(config.checkpoint_dir):
    return  # the run resumes from its newest checkpoint, and reads no start checkpoint
  for key in ("load_parameters_path", "load_full_state_path"):
    path = getattr(config, key)
    if path and not data_settings.is_remote(path) and not os.path.isdir(path):
      raise ConfigError(
        f"{key}={path}: there is no such folder; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP."
      )
  path = config.load_parameters_path
  if path and not data_settings.is_remote(path) and config.mudd:
    from maxtext_mudd.checkpoints import parameters

    parameters.check_path(str(parameters.items_folder(path)), pyconfig.HyperParameters(config))


def _has_own_checkpoint(folder: str) -> bool:
  return bool(folder) and os.path.isdir(folder) and any(name.isdigit() for name in os.listdir(folder))


def _check_pattern(key: str, pattern: str, config) -> None:
  files = data_settings.matches(key, pattern, config)
  if data_settings.file_type(key, config) == "mmap":
    for fault in filter(None, (megatron_files.fault(str(file.with_suffix(""))) for file in files)):
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
  if config.dataset_type == "grain" and data_settings.file_type(key, config) == "parquet":
    _check_parquet(key, file, data_settings.columns(key, config))


def _check_parquet(key: str, file: pathlib.Path, columns: data_settings.Columns) -> None:
  try:
    with pq.ParquetFile(file) as parquet:
      schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
  except pa.ArrowInvalid:
    raise ConfigError(f"{key}={file} is not a complete parquet file; write it again.") from None
  if not rows:
    raise ConfigError(f"{key}={file}: the file holds no text; write it again.")
  if fault := data_faults.fault_in_schema(schema, columns):
    raise ConfigError(f"{key}={file}: {fault}")


def _check_workers(key: str, files: int, config) -> None:
  """Raises ConfigError if Grain has more workers than files: MaxText gives each worker whole Parquet or TFRecord files.

  Args:
    files: the number of files that `key` names.
  """
  workers_key = "grain_worker_count_eval" if "eval" in key else "grain_worker_count"
  workers = getattr(config, workers_key)
  if config.dataset_type != "grain" or config.grain_file_type not in ("parquet", "tfrecord") or workers <= 1:
    return
  if not first_batch.is_readable_here(config):
    return  # how many processes read the data is not known yet
  described_files = f"{files} file(s) in {key}"
  if data_settings.file_type(key, config) != config.grain_file_type:
    files, described_files = 1, f"the one file that {key} is converted to"  # by `text_files`
  most = max(files // _reader_count(key, config), 1)
  if workers > most:
    raise ConfigError(
      f"{workers_key}={workers} with {described_files}: each worker of a host reads whole files; set it to {most} or "
      "less."
    )


def _reader_count(key: str, config) -> int:
  """The number of readers that MaxText divides the files of a key among: the processes that load data, or a multiple
  of them."""
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


def _check_output_folder(folder: str) -> None:
  if not folder or data_settings.is_remote(folder):
    return
  nearest = pathlib.Path(folder).absolute()
  while not nearest.exists():
    nearest = nearest.parent
  if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
    raise ConfigError(
      f"base_output_directory={folder}: {nearest} is not a folder that files can be written to; name another folder."
    )
