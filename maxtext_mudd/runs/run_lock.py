"""The lock of a training run on the folder that it writes."""

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
  """A context in which a training run may take its folder, which it leaves at the end.

  The kernel holds the lock for the process (flock), so a run that was killed does not block the next one. The text of
  the file, which names process and host, is for messages alone. Nobody is refused where there are no such locks: in
  remote output (gs://), and on file systems without them, such as some network file systems.
  """

  def __init__(self):
    self._file: pathlib.Path | None = None
    self._lock: int | None = None
    self._created: list[pathlib.Path] = []  # folders, the innermost first

  def take(self, config) -> None:
    """Takes the folder of a run for all processes of the job. Does nothing the second time.

    Raises:
      ConfigError: another run writes to it, or it cannot be written.
    """
    import jax

    if self._lock is not None or jax.process_index() or "://" in config.checkpoint_dir:
      return
    folder = pathlib.Path(config.checkpoint_dir).absolute().parent
    self._created = [path for path in (folder, *folder.parents) if not path.exists()]
    self._file = folder / NAME
    try:
      self._lock = locks.take(self._file, lambda text: _refusal(folder, text))
      holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.datetime.now().isoformat(" ", "seconds"),
      }
      if fcntl.fcntl(self._lock, fcntl.F_GETFL) & os.O_RDWR:  # else the file is another user's
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, json.dumps(holder).encode(), 0)
    except OSError as error:
      raise ConfigError(
        f"{self._file} cannot be written ({error.strerror}); name another folder for the run."
      ) from error

  def __exit__(self, *_) -> None:
    if self._lock is None:
      return
    with contextlib.suppress(PermissionError):  # the file of another user, in a folder like /tmp
      self._file.unlink(missing_ok=True)
    os.close(self._lock)
    self._lock = None
    with contextlib.suppress(OSError):  # a folder that the run has written to
      for path in self._created:
        path.rmdir()


def _refusal(folder: pathlib.Path, text: str) -> str:
  try:
    holder = json.loads(text)
    who = f"process {holder['process']} on {holder['host']} since {holder['started']}"
  except (ValueError, KeyError, TypeError):  # its holder has not written it yet
    who = "another process"
  return f"{folder} is being written by {who}; wait for its end, or give this run another run_name."
