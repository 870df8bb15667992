"""How a training run ends when its data do: with a checkpoint of the last step, one sentence and a status.

MaxText 0.2.5 turns every exception of the training data's iterator into a StopTraining, writes "Training stopped: ..."
to its log, and ends with status 0 without a checkpoint. An exception of the evaluation data's iterator ends it with a
traceback. It has no hook for either, and the state, the checkpoint manager and the iterators are local variables of
its function `training_loop_iteration`, which no caller gets. The traceback of the exception holds that function's
frame, so this module reads them from there, and no other module does.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import logging
import os
import sys
import traceback
from typing import Any

from absl import logging as absl_logging

from maxtext_mudd.config import errors
from maxtext_mudd.config import files as config_files
from maxtext_mudd.runs import hosts

DATA_ENDED = 3  # status of a run whose data ended before its steps were done
_STOPPED = "Training stopped: "
_OF_DATA = ("You may have run out of training data.", "`next(self.data_iterator)` failed")


class Watch(logging.Handler):
  """Remembers why MaxText stopped a run before its last step, which only MaxText's log says.

  Attributes:
    terminated: whether MaxText saved a checkpoint and stopped because of a SIGTERM.
    error: the exception that MaxText handled when it stopped.
  """

  def __init__(self):
    super().__init__()
    self.terminated = False
    self.error: BaseException | None = None

  def emit(self, record: logging.LogRecord) -> None:
    message = record.getMessage()
    if message.startswith(_STOPPED):
      self.terminated = message.startswith(f"{_STOPPED}Job received termination signal")
      self.error = sys.exception()  # MaxText writes this line in the except clause


def is_unexplained_stop(message: str) -> bool:
  """Whether MaxText's log says here why it stops training, and no sentence of this module will."""
  return message.startswith(_STOPPED) and not message.removeprefix(_STOPPED).startswith(_OF_DATA)


@dataclasses.dataclass(frozen=True)
class End:
  """The sentence that is printed when a run ends, and the status of its process."""

  sentence: str
  status: int


def asks_for_epochs(argv: Sequence[str]) -> bool:
  """Whether `num_epoch` is set by an argument, by a variable of the environment, or by a configuration file that is not
  one of MaxText's.

  Raises:
    ConfigError: as `config_files.values`.
  """
  arguments = [argument for argument in argv if not argument.startswith("-")]  # less flags of Abseil
  return "M_NUM_EPOCH" in os.environ or "num_epoch" in config_files.values(arguments)


def of_training_data(error: BaseException | None, of_epochs: bool) -> End | None:
  """Saves the last step of a run whose training data ended, or cannot be read.

  All hosts save together, as in every save of MaxText. A host whose data end, or fail, at another step than those of
  the others saves nothing: they wait for it in their next step, until it ends and JAX ends the job.
  Goodput, where it is recorded, does not count the time of this save: MaxText has recorded the end of the job before.

  Args:
    error: what MaxText handled when it stopped.
    of_epochs: whether a number of epochs was asked for.

  Returns:
    None if something else stopped the run.
  """
  variables = _variables(error)
  if variables is None or not errors.failed_in(error, "load_next_batch_pre_sharding"):
    return None
  run = _Run.from_variables(variables, done=variables["step"])
  cause = error.__context__
  if not isinstance(cause, StopIteration):
    return _unreadable(run, cause)
  if run.config.dataset_type.value == "grain" and run.config.grain_worker_count:
    # The state of ended workers says that there is nothing to read, whatever num_epoch is when the run continues.
    run = run.with_place_of_last_step()
  where, is_saved = run.save()
  if run.done > run.start:
    what = f"the data ended after {run.done} of steps={run.config.steps}"
  else:
    what = f"the data have ended, and none of the {run.config.steps - run.done} steps left of steps={run.config.steps}"
    what = f"{what} were done"
  if not is_saved:
    return End(f"{what}; {where}.", 2)
  if of_epochs:
    return End(f"{what}, as num_epoch={run.config.num_epoch} asks; {where}.", 0)
  return End(f"{what}; {where}; {run.remedy()}.", DATA_ENDED)


def of_evaluation_data(error: Exception) -> End | None:
  """Saves the last step of a run whose evaluation data cannot be read; None if `error` is another one."""
  variables = _variables(error)
  if variables is None or variables["eval_data_iterator"] is None:
    return None
  if not any(frame.f_locals.get("self") is variables["eval_data_iterator"] for frame in _frames(error)):
    return None
  return _unreadable(_Run.from_variables(variables, done=variables["step"] + 1), error)


@dataclasses.dataclass(frozen=True)
class _Run:
  """A run after its last step.

  Attributes:
    config: MaxText's configuration.
    manager: MaxText's checkpoint manager, or None if checkpointing is off.
    state: the training state after the last step.
    iterator: the training data's iterator.
    start: steps that were done when this process started.
    done: steps that are done now.
  """

  config: Any
  manager: Any
  state: Any
  iterator: Any
  start: int
  done: int

  @classmethod
  def from_variables(cls, variables: Mapping[str, Any], done: int) -> "_Run":
    names = {"config": "config", "manager": "checkpoint_manager", "state": "state", "iterator": "data_iterator"}
    return cls(**{field: variables[name] for field, name in names.items()}, start=variables["start_step"], done=done)

  def save(self) -> tuple[str, bool]:
    """Writes a checkpoint of the last step, unless there is one.

    Returns:
      A clause that says where it is, and whether it could be written where it was needed.
    """
    from maxtext.common import checkpointing

    if self.manager is None:
      return "nothing was saved, because enable_checkpointing=False", True
    folder, step = self.config.checkpoint_dir.rstrip("/"), self.done - 1
    if not hosts.meet(f"save-{step}"):
      return (
        f"nothing was saved after {folder}/{checkpointing.latest_step(self.manager)}, for other hosts have data",
        False,
      )
    try:
      checkpointing.wait_until_finished(self.manager)
      if self.done > self.start and step not in checkpointing.all_steps(self.manager):
        checkpointing.save_checkpoint(self.manager, step, self.state, self.config, self.iterator, force=True)
        checkpointing.wait_until_finished(self.manager)
    except Exception as error:  # of any file system
      return f"{folder}/{step}: the checkpoint of the last step cannot be written ({errors.brief(error)})", False
    newest = checkpointing.latest_step(self.manager)
    if newest is None:
      return "there is no checkpoint, because no step was done", True
    if newest != step:
      return f"{folder}/{step}: the checkpoint of the last step was not written; the newest is {newest}", False
    return f"the checkpoint of the last step is {folder}/{newest}", True

  def with_place_of_last_step(self) -> "_Run":
    """The run with an iterator that has read the batches of its steps and no more, where they can be read again."""
    from maxtext_mudd.runs import data_place  # imports what MaxText does

    if self.manager is None or self.done == self.start or not hosts.meet(f"read-{self.done}"):
      return self
    try:
      iterator = data_place.after(self.iterator, self.manager, self.config, self.start, self.done)
    except Exception:  # of any reader: the data are broken, and the iterator as it is serves
      return self
    return dataclasses.replace(self, iterator=iterator)

  def remedy(self) -> str:
    """A clause that says what continues a run whose data have ended."""
    keys = f"num_epoch above {self.config.num_epoch}"
    if self.manager is None:
      keys += " and enable_checkpointing=True"
    elif self.config.dataset_type.value != "grain":  # whose place is a number, not a name, of a file
      keys += " or more files"
    return f"to continue, start it again with {keys}, or set steps={self.done} for a run that ends here"


def _unreadable(run: _Run, error: BaseException) -> End:
  from maxtext_mudd.runs import data_faults  # imports MaxText

  what = data_faults.explain(run.config, error).rstrip(".")
  absl_logging.error("%s; saving the last step ...", what)  # while all hosts can still say something
  where, _ = run.with_place_of_last_step().save()
  return End(f"{what}; {run.done} of steps={run.config.steps} were done; {where}.", 2)


def _variables(error: BaseException | None) -> Mapping[str, Any] | None:
  frames = _frames(error)
  return frames[0].f_locals if frames else None


def _frames(error: BaseException | None) -> list:
  """The frames that the error passed through, from that of MaxText's `training_loop_iteration` on."""
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)] if error else []
  names = [frame.f_code.co_name for frame in frames]
  return frames[names.index("training_loop_iteration") :] if "training_loop_iteration" in names else []
