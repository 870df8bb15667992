"""Writes a folder under a temporary name, and renames it when it is complete."""

import atexit
from collections.abc import Iterator
import contextlib
import os
import pathlib
import threading

from maxtext_mudd.checkpoints import locks
from maxtext_mudd.checkpoints.interrupts import Interrupts
from maxtext_mudd.config.errors import ConfigError

SECONDS_TO_STOP = 60  # how long an interrupt waits for Orbax's threads


@contextlib.contextmanager
def staged(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A context that yields a temporary folder, and renames it to `target` if the body succeeds.

  The temporary folder is in `.NAME.partial` beside the target. Orbax puts its own temporary folders there, too. If the
  body fails or is interrupted, `.NAME.partial` is deleted, and so are the parents of `target` that were created here.

  Raises:
    ConfigError: the target exists, cannot be written, or is being written by another process.
  """
  if os.path.lexists(target):
    raise ConfigError(f"{target} exists already; name a folder that does not.")
  partial = target.with_name(f".{target.name}.partial")
  threads_before = threading.enumerate()
  new_parents = [parent for parent in target.parents if not parent.exists()]

  def remove_new_parents():
    for parent in new_parents:
      with contextlib.suppress(OSError):  # not empty, or does not exist
        parent.rmdir()

  def remove_at_exit():
    if partial.exists():
      with contextlib.suppress(ConfigError, OSError), locks.exclusive_folder(partial, target):
        pass
    remove_new_parents()

  try:
    with Interrupts() as interrupts, locks.exclusive_folder(partial, target):
      try:
        stage = partial / "staged"
        stage.mkdir()
        yield stage
        interrupts.ignore_further()
        stage.rename(target)
      except KeyboardInterrupt:
        atexit.register(remove_at_exit)  # for files that threads write after the wait below
        for thread in threading.enumerate():  # Orbax's threads cannot be stopped; without the folder they would fail
          if thread not in threads_before and not thread.daemon:
            thread.join(SECONDS_TO_STOP)
        raise
  except OSError as error:
    raise ConfigError(_failure(error, target, partial)) from error
  finally:
    remove_new_parents()


def _failure(error: OSError, target: pathlib.Path, partial: pathlib.Path) -> str:
  """The sentence about the file that could not be written or read. It is the target, unless the error names a file
  elsewhere."""
  file, reason = pathlib.Path(str(error.filename or target)), error.strerror or error
  if file in (target, partial, *target.parents) or file.is_relative_to(partial):
    return f"{target} cannot be written ({reason}); name a folder that can be written."
  return f"{file} cannot be read ({reason}); make it readable, or copy it again."
