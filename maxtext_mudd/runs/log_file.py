"""RUN/log.txt, the file that gets the standard output and error of a launcher whose console is brief."""

from collections.abc import Sequence
import datetime
import os
import pathlib
import shlex
import sys
import tempfile
from typing import BinaryIO

from maxtext_mudd.config.errors import ConfigError


class LogFile:
  """The file that the process' standard output and error go to. It is a temporary file until the run's folder exists.

  Attributes:
    path: where the log is, or will be as soon as the run's folder exists.
    is_temporary: whether the log is outside the run's folder. If it still is after `close`, `path` is the temporary
      file.
  """

  def __init__(self, folder: pathlib.Path | None, held_output: Sequence[BinaryIO]):
    """Redirects standard output and error to the log, which begins with the command and the output held so far.

    Args:
      folder: the run's folder, or None for a launcher without one.
      held_output: the files with the output held so far.

    Raises:
      ConfigError: the run's folder exists and the log cannot be written there.
    """
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    descriptor, self._temporary_path = tempfile.mkstemp(prefix="maxtext-mudd-", suffix=".txt")
    self._folder, self.is_temporary = folder, True
    self.path = folder / "log.txt" if folder else pathlib.Path(self._temporary_path)
    self._holds_this_process_only = False
    self._bytes_read = 0
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    os.write(descriptor, f"==== {now} {shlex.join(sys.argv)}\n".encode())
    for file in held_output:
      file.seek(0)
      os.write(descriptor, file.read())
    _redirect_output(descriptor)
    if folder and folder.is_dir():
      self._holds_this_process_only = not self.path.exists()
      try:
        self._move_to_folder()
      except ConfigError:
        os.unlink(self._temporary_path)
        raise

  def open_in_folder(self, create: bool = False) -> None:
    """Moves the temporary log into the run's folder, if that exists by now or `create` is true."""
    if not (self._folder and self.is_temporary):
      return
    if create:
      self._folder.mkdir(parents=True, exist_ok=True)
    if self._folder.is_dir():
      self._move_to_folder()

  def _move_to_folder(self) -> None:
    try:
      descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
      raise ConfigError(
        f"{self.path}: the log of the run cannot be written ({error.strerror}); remove it, or set log_console=full."
      ) from error
    self._bytes_read += os.fstat(descriptor).st_size
    os.write(descriptor, pathlib.Path(self._temporary_path).read_bytes())
    _redirect_output(descriptor)
    self.is_temporary = False
    os.unlink(self._temporary_path)

  def read_new_lines(self) -> bytes:
    """The complete lines that were logged since the last call."""
    with open(self._temporary_path if self.is_temporary else self.path, "rb") as file:
      file.seek(self._bytes_read)
      new = file.read()
    complete = new[: new.rfind(b"\n") + 1]
    self._bytes_read += len(complete)
    return complete

  def close(self, drop: bool) -> None:
    """Ends the log. `drop` removes the file, unless it also has the log of an earlier process."""
    if self.is_temporary:
      self.path = pathlib.Path(self._temporary_path)
      if drop:
        os.unlink(self.path)
    elif drop and self._holds_this_process_only:
      os.unlink(self.path)


def _redirect_output(descriptor: int) -> None:
  """Sends the process' standard output and error to an open file, and closes the given descriptor."""
  os.dup2(descriptor, 1)
  os.dup2(descriptor, 2)
  os.close(descriptor)
