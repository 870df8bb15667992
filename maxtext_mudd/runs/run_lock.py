"""Locks the folder of a training run, so that no second run writes to it at the same time."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket

from maxtext_mudd.checkpoints import locks
from maxtext_mudd.config.errors import ConfigError

NAME = "run.lock"  # in OUTPUT/RUN


class RunLock(contextlib.AbstractContextManager):
  """A context in which a training run can lock its folder by `take`. The end of the context releases the lock.

  The operating system holds the lock for the process (flock), so a run that was killed does not block the next one. The
  text of the file names the process and the host, for messages only. Remote output (gs://) and some network file
  systems have no locks. There no run is refused.
  """

  def __init__(self):
    self._file: pathlib.Path | None = None
    self._lock: int | None = None
    self._created_folders: list[pathlib.Path] = []  # the innermost first

  def take(self, config) -> None:
    """Locks the folder of a run for all processes of the job. Does nothing if it is called again.

    Raises:
      ConfigError: another run writes to the folder, or the lock file cannot be written.
    """
    import jax

    if self._lock is not None or jax.process_index() or "://" in config.checkpoint_dir:
      return
    folder = pathlib.Path(config.checkpoint_dir).absolute().parent
    self._created_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    self._file = folder / NAME
    try:
      self._lock = locks.take(self._file, lambda text: _refusal(folder, text))
      holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.datetime.now().isoformat(" ", "seconds"),
      }
      if fcntl.fcntl(self._lock, fcntl.F_GETFL) & os.O_RDWR:  # otherwise the file is another user's and read-only
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, json.dumps(holder).encode(), 0)
    except OSError as error:
      raise ConfigError(
        f"{self._file} cannot be written ({error.strerror}); name another folder for the run."
      ) from error

  def __exit__(self, *_) -> None:
    if self._lock is None:
      return
    with contextlib.suppress(PermissionError):  # in a folder like /tmp, the file can be another user's
      self._file.unlink(missing_ok=True)
    os.close(self._lock)
    self._lock = None
    with contextlib.suppress(OSError):  # folders that are not empty stay
      for path in self._created_folders:
        path.rmdir()


def _refusal(folder: pathlib.Path, text: str) -> str:
  """The sentence for a folder that is locked. `text` is that of the lock file."""
  try:
    holder = json.loads(text)
    writer = f"process {holder['process']} on {holder['host']} since {holder['started']}"
  except (ValueError, KeyError, TypeError):  # the holder of the lock has not written the text yet
    writer = "another process"
  return f"{folder} is being written by {writer}; wait for its end, or give this run another run_name."
