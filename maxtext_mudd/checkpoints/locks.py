"""Folders that one process at a time works in."""

import contextlib
import fcntl
import os
import pathlib
import shutil

from maxtext_mudd.errors import ConfigError

_LOCK = ".lock"


@contextlib.contextmanager
def alone(workshop: pathlib.Path, target: pathlib.Path):
  """Makes a folder, or empties one that a killed process left; it is gone at the end.

  Args:
    target: what is made there, for messages.

  Raises:
    ConfigError: a living process works in it.
    OSError: it cannot be made.
  """
  file, done = workshop / _LOCK, False
  while not done:
    workshop.mkdir(parents=True, exist_ok=True)
    try:
      lock = os.open(file, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:  # its holder has just removed the folder
      continue
    try:
      _hold(lock, target)
      if done := _is(file, lock):
        try:
          for path in workshop.iterdir():
            if path != file:
              _remove(path)
          yield
        finally:
          shutil.rmtree(workshop, ignore_errors=True)
    finally:
      os.close(lock)
    with contextlib.suppress(OSError):  # network file systems keep a file until it is closed
      workshop.rmdir()


def _remove(path: pathlib.Path) -> None:
  shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _hold(lock: int, target: pathlib.Path) -> None:
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise ConfigError(f"{target} is being written by another process; wait for it, or name another folder.") from error
  except OSError:  # a file system without locks
    pass


def _is(file: pathlib.Path, lock: int) -> bool:
  """Whether it is still the file that is locked."""
  try:
    return os.path.samestat(os.stat(file), os.fstat(lock))
  except FileNotFoundError:
    return False
