"""Takes the first batch of a training run from MaxText's data iterators before anything is compiled."""

import contextlib
import itertools

from maxtext.configs import pyconfig
from maxtext.input_pipeline import input_pipeline_interface, multihost_dataloading
from maxtext.utils import maxtext_utils
import numpy as np

from maxtext_mudd.config.changed import changed
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.inference import tokens
from maxtext_mudd.runs import data_faults, data_settings

_TOKENS = ("inputs", "targets", "prompt_ids", "chosen_ids", "rejected_ids")  # the arrays of tokens in a batch


def check(config) -> None:
  """Reads the tokenizer, a batch for training and, if the run evaluates, a batch for evaluation.

  Each host reads its part of the batch, as in the run. The time depends on the data:

    small local files                           10 to 40 ms, and 0.3 s more if `datasets` has to be imported
    a window of 10,000 lines to shuffle         0.4 s
    a Megatron pair of 20 million documents     0.2 to 1.5 s, because MaxText sums their sizes
    files of the hub                            the time to download their first rows

  Args:
    config: MuddConfig of a training run.

  Raises:
    ConfigError: the tokenizer or the data cannot be read, there is no batch, or a token is not below `vocab_size`.
  """
  tokens.check_training(config)
  if not is_readable_here(config):
    return
  # Grain's worker processes are turned off: they take seconds to start, and read the same files.
  without_workers = {"grain_worker_count": 0, "grain_worker_count_eval": 0}
  iterators = ()
  try:
    with data_faults.quiet():
      if config.use_dpo:  # MaxText's pipeline then reads attributes of `dpo`, which is a dictionary in HyperParameters
        parameters = config.model_copy(update=without_workers)
      else:
        parameters = changed(pyconfig.HyperParameters(config), **without_workers)
      mesh = maxtext_utils.get_mesh_from_config(parameters)
      iterators = input_pipeline_interface.create_data_iterator(parameters, mesh)
      batches = [_first_batch(iterator) for iterator in iterators]
  except Exception as error:  # each library that reads data raises its own
    raise ConfigError(data_faults.explain(config, error)) from error
  finally:
    for host_iterator in (x for iterator in iterators for x in _host_iterators(iterator)):
      # MaxText's `close` reads `_parent` of Grain's iterators, and Grain asserts that there is a parent.
      with contextlib.suppress(AssertionError):
        host_iterator.close()
  for split, batch in zip(("train", "eval"), batches):
    if batch is not None:
      _check_batch(batch, split, config)


def is_readable_here(config) -> bool:
  """Whether this process can read a batch now.

  The answer is False for synthetic data, which need no check, for data that other processes read next to the devices
  (Pathways), and for elastic runs, whose mesh is not known yet.
  """
  return not (
    config.dataset_type == "synthetic"
    or config.colocated_python_data_input
    or config.elastic_enabled
    or config.subslice_shape
  )


def _first_batch(iterator) -> dict[str, np.ndarray] | None:
  """This host's part of the first batch; empty if the data do not fill a batch, None if this host reads no data."""
  host_iterators = _host_iterators(iterator)
  return next(host_iterators[0].local_iterator, {}) if host_iterators else None


def _host_iterators(iterator) -> list[multihost_dataloading.MultiHostDataLoadIterator]:
  """The iterators that read data on this host. If there are several, MaxText takes batches from them in turn."""
  iterators = iterator if isinstance(iterator, list) else [iterator]
  return [x for x in iterators if isinstance(x, multihost_dataloading.MultiHostDataLoadIterator)]


def _check_batch(batch: dict[str, np.ndarray], split: str, config) -> None:
  data = data_settings.describe(split, config)
  if not batch:
    key = "per_device_batch_size" if split == "train" else "eval_per_device_batch_size"
    raise ConfigError(
      f"{data} {_described_rows(split, config)}, which fill no batch of {key}={getattr(config, key):g} for each "
      "device; use a smaller batch, more data or, for training, a higher num_epoch."
    )
  largest = max((int(np.max(batch[key])) for key in _TOKENS if key in batch), default=0)
  if largest >= config.vocab_size:
    raise ConfigError(
      f"{data} holds token {largest} in its first batch, and the model has vocab_size={config.vocab_size}; set it to "
      f"{largest + 1} or more, or name data of another tokenizer."
    )


def _described_rows(split: str, config) -> str:
  """A clause with the number of rows, if they are in local files whose rows can be counted quickly."""
  for key, value in data_settings.file_keys(config):
    if split in key and (file_type := data_settings.file_type(key, config)) in data_settings.LOCAL_FORMATS:
      files = data_settings.local_files(key, value, config)
      tables = itertools.chain.from_iterable(data_faults.tables(file, file_type) for file in files)
      return f"holds {sum(table.num_rows for table in tables)} row(s)"
  return "holds too few rows"
