"""The position of a run in its training data: which checkpoints hold it, and how to restore it in an iterator."""

from typing import Any

from absl import logging
from etils import epath

# Dataset types with which a resumed run reads on where it stopped, in MaxText 0.2.5: Grain's iterator is in the
# checkpoint, olmo_grain counts steps, and synthetic data have no position.
_RESUMED_TYPES = ("grain", "olmo_grain", "synthetic")


def warn_on_resume(config) -> None:
  """Warns if a run will resume from a checkpoint while its training data start again from their first row."""
  folder = epath.Path(config.checkpoint_dir) if config.enable_checkpointing and config.checkpoint_dir else None
  steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder and folder.exists() else []
  if not steps:
    return
  newest, dataset_type = max(steps), config.dataset_type.value
  if dataset_type not in _RESUMED_TYPES:
    reason = f"dataset_type={dataset_type} saves no position in the data; dataset_type=grain does"
  elif dataset_type == "grain" and not (folder / str(newest) / "iter").exists():
    reason = f"{folder / str(newest)} holds no position in the data; checkpoints that dataset_type=grain writes do"
  else:
    return
  logging.warning(
    "This run resumes at step %d, and its training data start again from their first row: %s.", newest + 1, reason
  )


def iterator_after_step(iterator: Any, manager: Any, config, start: int, done: int) -> Any:
  """A new iterator over the data of `iterator`, at the position where the run was after `done` steps.

  The old iterator has the wrong position. After a fault in the data it is inside a batch, so a run that resumes from it
  would skip the rows before the fault. After the end of the data, Grain's worker processes have ended for good. This
  function restores the position of the newest checkpoint, and reads the batches since then again. This takes less time
  than training on them took.

  Args:
    iterator: the training data's iterator, after it failed or ended.
    manager: MaxText's checkpoint manager.
    start: the number of steps that were done when this process started to read.
    done: the number of steps that are done now, each of which read one batch.

  Returns:
    The new iterator, or `iterator` itself if checkpoints do not hold its position, or if a step does not read exactly
    one batch of it.

  Raises:
    Exception: whatever the reader of the data raises if they cannot be read again.
  """
  from maxtext.common import checkpointing, grain_utility
  from maxtext.input_pipeline import multihost_dataloading

  dataloader = getattr(iterator, "dataloader", None)
  reads_one_batch_a_step = dataloader is not None and not config.enable_rampup_batch_size
  is_elastic = isinstance(dataloader, grain_utility.ElasticIterator)
  if config.dataset_type.value != "grain" or not reads_one_batch_a_step or is_elastic:
    return iterator
  new_iterator = multihost_dataloading.MultiHostDataLoadIterator(
    dataloader, iterator.global_mesh, iterator.generate_padding_batch, iterator.expansion_loading_factor_for_grain
  )
  saved_steps = [
    step
    for step in checkpointing.all_steps(manager)
    if start - 1 <= step < done and (manager.directory / str(step) / "iter").exists()
  ]
  if saved_steps:
    step = max(saved_steps)
    restored = grain_utility.for_restore(manager, step, new_iterator, config.expansion_factor_real_data)
    manager.load_checkpointables(step, {"iter": restored})
    start = step + 1
  if done > start:
    logging.info("Reading the %d batches since the newest checkpoint again, to save the run's position.", done - start)
  for _ in range(start, done):
    next(new_iterator)
  return new_iterator
