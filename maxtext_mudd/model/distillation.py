"""Makes MaxText's distillation work with Tunix 0.1.7, the newest on a package index."""

import itertools

from tunix.sft import checkpoint_manager


def with_released_tunix(stock):
  """Makes a `MaxTextCheckpointManager` that works with Tunix 0.1.7.

  MaxText 0.2.5 calls functions of a later Tunix, which is on no package index: with 0.1.7 it fails with "no attribute
  '_checkpointer'". This class calls those of 0.1.7. They save no position in the training data, so a resumed run starts
  again at their first row.

  Args:
    stock: MaxText's class.

  Returns:
    The new class, or `stock` if Tunix has what it calls.
  """
  tunix = checkpoint_manager.CheckpointManager
  if hasattr(tunix, "_save_checkpointables"):
    return stock

  class StudentCheckpointManager(stock):
    def save(self, step, model, optimizer=None, *args, **kwargs):
      if self.student_config.learn_to_init_mode:
        optimizer = None
      return tunix.save(self, step, getattr(model, "student_model", model), optimizer, *args, **kwargs)

    def maybe_restore(self, model, optimizer=None, restore_only_lora_params=False):
      student = getattr(model, "student_model", model)
      return tunix.maybe_restore(self, student, optimizer, restore_only_lora_params=restore_only_lora_params)

    def restore_iterator(self):
      return None

    def wait_until_finished(self):
      if self._checkpoint_manager is not None:
        self._checkpoint_manager.wait_until_finished()

    def close(self):
      tunix.close(self)

  return StudentCheckpointManager


def with_all_steps(stock):
  """Makes a `MaxTextDistillationTrainer` that stops after the last step.

  MaxText tells Tunix that it counts the steps itself, and then does not: its trainer goes on until the data end.

  Args:
    stock: MaxText's class.
  """

  class DistillationTrainer(stock):
    def train(self, train_ds, *args, **kwargs):
      steps = max(self.config.max_steps - self.train_steps, 0)
      batches = steps * self.config.get_with_default("gradient_accumulation_steps", 1)
      return super().train(itertools.islice(train_ds, batches), *args, **kwargs)

  return DistillationTrainer
