"""Ends a training run whose data ended or cannot be read: saves a checkpoint, and chooses the sentence and exit status.

MaxText 0.2.5 turns every exception of the training data's iterator into a StopTraining, writes "Training stopped: ..."
to its log, and exits with status 0 without a checkpoint. An exception of the evaluation data's iterator ends MaxText
with a traceback. MaxText has no hook for either case. The state, the checkpoint manager and the iterators are local
variables of its function `training_loop_iteration`, to which callers have no access. The traceback of the exception
holds the frame of this function. This module reads the variables from the frame. No other module does so.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import logging
import os
import pathlib
import sys
import traceback
from typing import Any

from absl import logging as absl_logging

from maxtext_mudd.config import errors
from maxtext_mudd.config import files as config_files
from maxtext_mudd.runs import hosts

DATA_ENDED = 3  # exit status of a run whose data ended before its steps were done
_STOPPED = "Training stopped: "
_TUNIX_STOPPED = "Exception in load_next_train_batch: "
_DISTILLED = "Distillation Complete."
_DATA_REASONS = ("You may have run out of training data.", "`next(self.data_iterator)` failed")


class StopRecorder(logging.Handler):
  """A log handler that records why MaxText stopped a run before its last step. Only MaxText's log has the reason.

  Attributes:
    terminated: whether MaxText saved a checkpoint and stopped because of a SIGTERM.
    error: the exception that MaxText was handling when it stopped.
    is_of_tunix: whether a trainer of Tunix stopped, which takes every exception of the data for their end.
  """

  def __init__(self):
    super().__init__()
    self.terminated = self.is_of_tunix = False
    self.error: BaseException | None = None

  def emit(self, record: logging.LogRecord) -> None:
    message = record.getMessage()
    if message.startswith(_STOPPED):
      self.terminated = message.startswith(f"{_STOPPED}Job received termination signal")
      self.error = sys.exception()  # MaxText writes this line in the except clause
    elif message.startswith(_TUNIX_STOPPED):
      self.is_of_tunix, self.error = True, sys.exception()
    elif message == _DISTILLED:  # also when the data ended before the last step
      self.is_of_tunix = True


def is_other_stop(message: str) -> bool:
  """Whether a line of MaxText's log says that training stops for a reason that this module does not explain."""
  return message.startswith(_STOPPED) and not message.removeprefix(_STOPPED).startswith(_DATA_REASONS)


@dataclasses.dataclass(frozen=True)
class RunEnd:
  """How a run ends.

  Attributes:
    sentence: what is printed to standard error.
    status: the exit status of the process.
  """

  sentence: str
  status: int


def sets_num_epoch(argv: Sequence[str]) -> bool:
  """Whether the user set `num_epoch`: by an argument, an environment variable, or a configuration file that is not one
  of MaxText's.

  Raises:
    ConfigError: as for `config_files.values`.
  """
  arguments = [argument for argument in argv if not argument.startswith("-")]  # drops Abseil's flags
  return "M_NUM_EPOCH" in os.environ or "num_epoch" in config_files.values(arguments)


def handle_training_data_error(error: BaseException | None, num_epoch_is_set: bool) -> RunEnd | None:
  """Saves the last step of a run whose training data ended or cannot be read.

  All hosts save together, as in every save of MaxText. If the data of one host end or fail at another step than the
  data of the other hosts, this host saves nothing. The other hosts wait for it in their next step, until it ends and
  JAX ends the job. If MaxText records goodput, the time of this save is not counted, because MaxText has already
  recorded the end of the job.

  Args:
    error: the exception that MaxText was handling when it stopped.
    num_epoch_is_set: the answer of `sets_num_epoch`.

  Returns:
    The end of the run, or None if something else stopped it.
  """
  variables = _loop_variables(error)
  if variables is None or not errors.failed_in(error, "load_next_batch_pre_sharding"):
    return None
  run = _StoppedRun.from_variables(variables, done=variables["step"])
  cause = error.__context__
  if not isinstance(cause, StopIteration):
    return _end_unreadable(run, cause)
  if run.config.dataset_type.value == "grain" and run.config.grain_worker_count:
    # A worker whose data ended saves the state "nothing left to read". A resumed run would restore this state, and read
    # nothing, even with a higher num_epoch.
    run = run.with_position_of_last_step()
  checkpoint, is_saved = run.save()
  if run.done > run.start:
    progress = f"the data ended after {run.done} of steps={run.config.steps}"
  else:
    steps_left = f"the {run.config.steps - run.done} steps left of steps={run.config.steps}"
    progress = f"the data have ended, and none of {steps_left} were done"
  if not is_saved:
    return RunEnd(f"{progress}; {checkpoint}.", 2)
  if num_epoch_is_set:
    return RunEnd(f"{progress}, as num_epoch={run.config.num_epoch} asks; {checkpoint}.", 0)
  return RunEnd(f"{progress}; {checkpoint}; {run.remedy()}.", DATA_ENDED)


def handle_evaluation_data_error(error: Exception) -> RunEnd | None:
  """Saves the last step of a run whose evaluation data cannot be read. Returns None if `error` has another cause."""
  variables = _loop_variables(error)
  if variables is None or variables["eval_data_iterator"] is None:
    return None
  if not any(frame.f_locals.get("self") is variables["eval_data_iterator"] for frame in _loop_frames(error)):
    return None
  return _end_unreadable(_StoppedRun.from_variables(variables, done=variables["step"] + 1), error)


def handle_tunix_data_error(
  error: BaseException | None, num_epoch_is_set: bool, config: Any, newest_checkpoint: pathlib.Path | None
) -> RunEnd | None:
  """The end of a run of MaxText's trainers for fine-tuning whose training data ended or cannot be read.

  Tunix has saved the last step by then. It also asks for data after the last step, which is no fault.

  Args:
    error: the exception of the data's iterator; None if its end made no exception.
    num_epoch_is_set: the answer of `sets_num_epoch`.
    config: MaxText's configuration.
    newest_checkpoint: the newest checkpoint of the run.

  Returns:
    The end of the run, or None if all its steps are done.
  """
  done = int(newest_checkpoint.name) if newest_checkpoint else 0
  if done >= config.steps:
    return None
  checkpoint = f"the checkpoint of the last step is {newest_checkpoint}" if done else "no step was done"
  cause = error and (error.__context__ or error)
  if cause and not isinstance(cause, StopIteration):
    from maxtext_mudd.runs import data_faults  # imports MaxText

    fault = data_faults.explain(config, cause).rstrip(".")
    return RunEnd(f"{fault}; {done} of steps={config.steps} were done; {checkpoint}.", 2)
  progress = f"the data ended after {done} of steps={config.steps}"
  if num_epoch_is_set:
    return RunEnd(f"{progress}, as num_epoch={config.num_epoch} asks; {checkpoint}.", 0)
  remedy = f"set num_epoch above {config.num_epoch} or name more files, or set steps={done} for a run that ends here"
  return RunEnd(f"{progress}; {checkpoint}; {remedy}.", DATA_ENDED)


@dataclasses.dataclass(frozen=True)
class _StoppedRun:
  """A run after its last step.

  Attributes:
    config: MaxText's configuration.
    manager: MaxText's checkpoint manager, or None if checkpointing is off.
    state: the training state after the last step.
    iterator: the training data's iterator.
    start: the number of steps that were done when this process started.
    done: the number of steps that are done now.
  """

  config: Any
  manager: Any
  state: Any
  iterator: Any
  start: int
  done: int

  @classmethod
  def from_variables(cls, variables: Mapping[str, Any], done: int) -> "_StoppedRun":
    """Takes the attributes from the local variables of MaxText's `training_loop_iteration`."""
    return cls(
      config=variables["config"],
      manager=variables["checkpoint_manager"],
      state=variables["state"],
      iterator=variables["data_iterator"],
      start=variables["start_step"],
      done=done,
    )

  def save(self) -> tuple[str, bool]:
    """Writes a checkpoint of the last step, unless there is one.

    Returns:
      A clause that says where the newest checkpoint is; and whether the last step is saved or needs no checkpoint.
    """
    from maxtext.common import checkpointing

    if self.manager is None:
      return "nothing was saved, because enable_checkpointing=False", True
    folder, step = self.config.checkpoint_dir.rstrip("/"), self.done - 1
    if not hosts.wait_for_all(f"save-{step}"):
      newest = checkpointing.latest_step(self.manager)
      return f"nothing was saved after {folder}/{newest}, because other hosts still have data", False
    try:
      checkpointing.wait_until_finished(self.manager)
      if self.done > self.start and step not in checkpointing.all_steps(self.manager):
        checkpointing.save_checkpoint(self.manager, step, self.state, self.config, self.iterator, force=True)
        checkpointing.wait_until_finished(self.manager)
    except Exception as error:  # every file system raises its own
      return f"{folder}/{step}: the checkpoint of the last step cannot be written ({errors.brief(error)})", False
    newest = checkpointing.latest_step(self.manager)
    if newest is None:
      return "there is no checkpoint, because no step was done", True
    if newest != step:
      return f"{folder}/{step}: the checkpoint of the last step was not written; the newest is {newest}", False
    return f"the checkpoint of the last step is {folder}/{newest}", True

  def with_position_of_last_step(self) -> "_StoppedRun":
    """This run with an iterator that has read the batches of the done steps and no more.

    Returns the run unchanged if its batches cannot be read again.
    """
    from maxtext_mudd.runs import data_position  # imports MaxText

    if self.manager is None or self.done == self.start or not hosts.wait_for_all(f"read-{self.done}"):
      return self
    try:
      iterator = data_position.iterator_after_step(self.iterator, self.manager, self.config, self.start, self.done)
    except Exception:  # every reader of data raises its own; the data are broken, and the old iterator has to do
      return self
    return dataclasses.replace(self, iterator=iterator)

  def remedy(self) -> str:
    """A clause that says how to continue a run whose data have ended."""
    keys = f"num_epoch above {self.config.num_epoch}"
    if self.manager is None:
      keys += " and enable_checkpointing=True"
    elif (
      self.config.dataset_type.value != "grain"
    ):  # Grain saves the number of the file it reads, which more files may change
      keys += " or more files"
    return f"to continue, start it again with {keys}, or set steps={self.done} for a run that ends here"


def _end_unreadable(run: _StoppedRun, error: BaseException) -> RunEnd:
  """Saves the last step of a run whose data cannot be read because of `error`."""
  from maxtext_mudd.runs import data_faults  # imports MaxText

  fault = data_faults.explain(run.config, error).rstrip(".")
  # Saving can take long or end the process, so every host logs the fault first.
  absl_logging.error("%s; saving the last step ...", fault)
  checkpoint, _ = run.with_position_of_last_step().save()
  return RunEnd(f"{fault}; {run.done} of steps={run.config.steps} were done; {checkpoint}.", 2)


def _loop_variables(error: BaseException | None) -> Mapping[str, Any] | None:
  """The local variables of MaxText's `training_loop_iteration`; None if the error did not pass through it."""
  frames = _loop_frames(error)
  return frames[0].f_locals if frames else None


def _loop_frames(error: BaseException | None) -> list:
  """The frames that the error passed through, from that of MaxText's `training_loop_iteration` on."""
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)] if error else []
  names = [frame.f_code.co_name for frame in frames]
  return frames[names.index("training_loop_iteration") :] if "training_loop_iteration" in names else []
