"""The place of a run in its training data: which checkpoints hold it, and how to find it again."""

from typing import Any

from absl import logging
from etils import epath

# What MaxText 0.2.5 resumes at its place: Grain's iterator is in the checkpoint, and olmo_grain counts steps; synthetic
# data have no place.
_KEPT = ("grain", "olmo_grain", "synthetic")


def warn_on_resume(config) -> None:
  """Warns where a run will resume from a checkpoint while its data start again from their first row."""
  folder = epath.Path(config.checkpoint_dir) if config.enable_checkpointing and config.checkpoint_dir else None
  steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder and folder.exists() else []
  if not steps:
    return
  newest, dataset_type = max(steps), config.dataset_type.value
  if dataset_type not in _KEPT:
    reason = f"dataset_type={dataset_type} keeps no place in them; dataset_type=grain does"
  elif dataset_type == "grain" and not (folder / str(newest) / "iter").exists():
    reason = f"{folder / str(newest)} holds no place in them; those that dataset_type=grain writes do"
  else:
    return
  logging.warning(
    "This run resumes at step %d, and its training data start again from their first row: %s.", newest + 1, reason
  )


def after(iterator: Any, manager: Any, config, start: int, done: int) -> Any:
  """An iterator like `iterator`, at the place where the run was after `done` steps.

  An iterator whose data cannot be read stays within the batch that it was reading: a run that continued from there
  would skip the rows before the fault. Worker processes whose data ended stay ended. So the batches since the newest
  checkpoint are read again, which takes a part of the time that training on them took.

  Args:
    iterator: the training data's iterator, after it failed or ended.
    manager: MaxText's checkpoint manager.
    start: steps that were done when this process started to read.
    done: steps that have been done, each with one batch.

  Returns:
    `iterator` itself if checkpoints do not hold its place, or if a step does not read one batch of it.

  Raises:
    Exception: the data cannot be read again, whatever reading them raises.
  """
  from maxtext.common import checkpointing, grain_utility
  from maxtext.input_pipeline import multihost_dataloading

  source = getattr(iterator, "dataloader", None)
  one_per_step = source is not None and not config.enable_rampup_batch_size
  if config.dataset_type.value != "grain" or not one_per_step or isinstance(source, grain_utility.ElasticIterator):
    return iterator
  again = multihost_dataloading.MultiHostDataLoadIterator(
    source, iterator.global_mesh, iterator.generate_padding_batch, iterator.expansion_loading_factor_for_grain
  )
  saved = [
    step
    for step in checkpointing.all_steps(manager)
    if start - 1 <= step < done and (manager.directory / str(step) / "iter").exists()
  ]
  if saved:
    place = grain_utility.for_restore(manager, max(saved), again, config.expansion_factor_real_data)
    manager.load_checkpointables(max(saved), {"iter": place})
    start = max(saved) + 1
  if done > start:
    logging.info("Reading the %d batches since the newest checkpoint again, for the place of the run.", done - start)
  for _ in range(start, done):
    next(again)
  return again
