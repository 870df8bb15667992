"""Takes the first batch of a training run from MaxText's data iterators before anything is compiled."""

import contextlib
import itertools

from maxtext.configs import pyconfig
from maxtext.input_pipeline import input_pipeline_interface, multihost_dataloading
from maxtext.utils import maxtext_utils
import numpy as np

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.inference import tokens
from maxtext_mudd.runs import data_faults, sources


def check(config) -> None:
  """Reads the tokenizer and one batch for training and, if there is an evaluation, one for it.

  Takes 10 to 40 ms for small local files and 0.3 s more where `datasets` has to be imported; 0.4 s for a window of
  10,000 lines to shuffle; 0.2 to 1.5 s for Megatron maps of 20 million documents, whose sizes MaxText sums; and for a
  hub's files what their first rows take. Each host reads its part, as in the run. A host that cannot read it ends
  with the sentence, and JAX's coordinator ends the others.

  Args:
    config: MuddConfig of a training run.

  Raises:
    ConfigError: the tokenizer or the data cannot be read, there is no batch, or a token is not below `vocab_size`.
  """
  tokens.check_training(config)
  if not can_be_tried(config):
    return
  # In this process: workers take seconds to start, and read the same files.
  config = config.model_copy(update={"grain_worker_count": 0, "grain_worker_count_eval": 0})
  iterators = ()
  try:
    with data_faults.quiet():
      parameters = pyconfig.HyperParameters(config)
      mesh = maxtext_utils.get_mesh_from_config(parameters)
      iterators = input_pipeline_interface.create_data_iterator(parameters, mesh)
      batches = [_first(iterator) for iterator in iterators]
  except Exception as error:  # of all libraries that read data
    raise ConfigError(data_faults.explain(config, error)) from error
  finally:
    for part in (part for iterator in iterators for part in _parts(iterator)):
      # MaxText's close looks at `_parent` of Grain's iterators, which asserts that there is one.
      with contextlib.suppress(AssertionError):
        part.close()
  for split, batch in zip(("train", "eval"), batches):
    if batch is not None:
      _check_batch(batch, split, config)


def can_be_tried(config) -> bool:
  """Whether this process can take a batch. Synthetic data needs no trial; data that other processes read, as beside the
  devices of Pathways, has none here; and the mesh of an elastic run is known only later."""
  return not (
    config.dataset_type == "synthetic"
    or config.colocated_python_data_input
    or config.elastic_enabled
    or config.subslice_shape
  )


def _first(iterator) -> dict[str, np.ndarray] | None:
  """This host's part of the first batch, empty if there is none; None where this host reads no data."""
  parts = _parts(iterator)
  return next(parts[0].local_iterator, {}) if parts else None


def _parts(iterator) -> list[multihost_dataloading.MultiHostDataLoadIterator]:
  """What reads data on this host: nothing, one iterator, or several, of which MaxText takes batches in turn."""
  iterators = iterator if isinstance(iterator, list) else [iterator]
  return [x for x in iterators if isinstance(x, multihost_dataloading.MultiHostDataLoadIterator)]


def _check_batch(batch: dict[str, np.ndarray], split: str, config) -> None:
  name = sources.named(split, config)
  if not batch:
    size = f"per_device_batch_size={config.per_device_batch_size:g}"
    raise ConfigError(
      f"{name} {_rows(split, config)}, which fill no batch of {size} for each device; use a smaller one, more data or, "
      "for training, a higher num_epoch."
    )
  largest = max((int(np.max(batch[key])) for key in ("inputs", "targets") if key in batch), default=0)
  if largest >= config.vocab_size:
    raise ConfigError(
      f"{name} holds token {largest} in its first batch, and the model has vocab_size={config.vocab_size}; set it to "
      f"{largest + 1} or more, or name data of another tokenizer."
    )


def _rows(split: str, config) -> str:
  """How many rows there are, where that can be counted in a moment."""
  for key, value in sources.data_files(config):
    if split in key and (file_type := sources.file_type(key, config)) in sources.LOCAL_LOADERS:
      files = sources.local_files(key, value, config)
      tables = itertools.chain.from_iterable(data_faults.tables(file, file_type) for file in files)
      return f"holds {sum(table.num_rows for table in tables)} row(s)"
  return "holds too few rows"
