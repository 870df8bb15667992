"""File locks. One process at a time can hold a lock, or work in a temporary folder."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import os
import pathlib
import shutil

from maxtext_mudd.config.errors import ConfigError

_LOCK = ".lock"
_ATTEMPTS = 100  # an attempt fails if the holder of the lock removes the file or its folder at the same moment


@contextlib.contextmanager
def exclusive_folder(folder: pathlib.Path, target: pathlib.Path) -> Iterator[None]:
  """Holds an empty temporary folder, which is created or emptied at the start and deleted at the end.

  A folder that a killed process left behind is emptied.

  Args:
    target: the file or folder that the caller writes by means of the temporary folder, for messages.

  Raises:
    ConfigError: a living process holds the folder.
    OSError: the folder cannot be created.
  """
  file = folder / _LOCK
  lock = take(file, lambda _: f"{target} is being written by another process; wait for it, or name another folder.")
  try:
    try:
      for path in folder.iterdir():
        if path != file:
          _remove(path)
      yield
    finally:
      shutil.rmtree(folder, ignore_errors=True)
  finally:
    os.close(lock)
  with contextlib.suppress(OSError):  # network file systems keep a deleted file until it is closed
    folder.rmdir()


def take(file: pathlib.Path, refusal: Callable[[str], str]) -> int:
  """Locks a file; creates it and its folder if they do not exist.

  The operating system frees the lock when the process ends for any reason. On a file system without locks, every
  process gets the lock.

  Args:
    refusal: returns the error sentence for the text of the file, which the holder of the lock may have written.

  Returns:
    A file descriptor that holds the lock until it is closed. It is read-only if the file belongs to another user.

  Raises:
    ConfigError: a living process holds the lock.
    OSError: the file cannot be opened, or is a link into a folder that does not exist.
  """
  for _ in range(_ATTEMPTS):
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
      lock = _open(file)
    except FileNotFoundError:  # the holder has just removed the folder
      continue
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      text = os.pread(lock, 4096, 0).decode(errors="replace")
      os.close(lock)
      raise ConfigError(refusal(text)) from error
    except OSError:  # the file system has no locks
      pass
    if _is_open_as(file, lock):
      return lock
    os.close(lock)
  raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))


def _open(file: pathlib.Path) -> int:
  try:
    return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
  except PermissionError as denied:
    try:
      return os.open(file, os.O_RDONLY)
    except OSError:
      raise denied from None


def _remove(path: pathlib.Path) -> None:
  shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_open_as(file: pathlib.Path, descriptor: int) -> bool:
  """Whether the path still leads to the file that is open, which another process may have replaced."""
  try:
    return os.path.samestat(os.stat(file), os.fstat(descriptor))
  except FileNotFoundError:
    return False
