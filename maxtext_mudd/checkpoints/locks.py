"""Files that one process at a time holds, and folders that one process at a time works in."""

from collections.abc import Callable
import contextlib
import errno
import fcntl
import os
import pathlib
import shutil

from maxtext_mudd.config.errors import ConfigError

_LOCK = ".lock"
_ATTEMPTS = 100  # each fails where a holder removes the file, or its folder, in the same moment


@contextlib.contextmanager
def alone(workshop: pathlib.Path, target: pathlib.Path):
  """Makes a folder, or empties one that a killed process left; it is gone at the end.

  Args:
    target: what is made there, for messages.

  Raises:
    ConfigError: a living process works in it.
    OSError: it cannot be made.
  """
  file = workshop / _LOCK
  lock = take(file, lambda _: f"{target} is being written by another process; wait for it, or name another folder.")
  try:
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


def take(file: pathlib.Path, refusal: Callable[[str], str]) -> int:
  """Locks a file, which is created in a folder that is created, if they do not exist.

  The kernel frees the lock when its process ends, however it ends. On a file system without locks nobody is refused.

  Args:
    refusal: from the text of the file, which its holder may have written, to the sentence for who is refused.

  Returns:
    A descriptor of the file, which holds the lock until it is closed; not for writing where the file is another
    user's, who alone may write it.

  Raises:
    ConfigError: a living process holds it.
    OSError: the file cannot be opened, or is a link to a folder that does not exist.
  """
  for _ in range(_ATTEMPTS):
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
      lock = _open(file)
    except FileNotFoundError:  # its holder has just removed the folder
      continue
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      text = os.pread(lock, 4096, 0).decode(errors="replace")
      os.close(lock)
      raise ConfigError(refusal(text)) from error
    except OSError:  # a file system without locks
      pass
    if _is(file, lock):
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


def _is(file: pathlib.Path, lock: int) -> bool:
  """Whether it is still the file that is locked."""
  try:
    return os.path.samestat(os.stat(file), os.fstat(lock))
  except FileNotFoundError:
    return False
