"""What the launchers show on the console, and the log file that gets everything else.

A brief console shows lines of `Progress`, warnings once each, errors, and what is given to `show` and `refuse`. The
process' standard output and error, C++ and child processes included, are RUN/log.txt. Until the configuration is read,
which alone says for certain where that is and what `log_console` is, they are temporary files, if the command line
shows that the console will be brief; else they stay what they are until then. A process that is one of several has
MaxText's own console.
"""

from collections.abc import Iterator, Sequence
import contextlib
import datetime
import faulthandler
import inspect
import io
import logging
import os
import pathlib
import re
import shlex
import sys
import tempfile
import threading
import traceback
from typing import BinaryIO, TextIO

import tqdm

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import early, ends, noise
from maxtext_mudd.runs.progress import Progress

# Errors that C++ code logs, and sentences that this package prints to stderr; neither passes through Python's logging.
_TO_SHOW = re.compile(
  rb"^(?:[EF]\d{4} [\d:.]+ +\d+ \S+\.(?:cc|h|cpp):\d+\] (?P<native>.*)|(?P<sentence>maxtext-mudd: .*))$", re.M
)
_REMOTE = "://"


def show(text: str) -> None:
  """Prints a result of a launcher to the real standard output."""
  if _active:
    _active.show(text)
  else:
    print(text)


def stderr() -> TextIO:
  """The real standard error, for progress of a launcher that is not training."""
  return _active.err if _active else sys.stderr


def refuse(sentence: str) -> None:
  """Prints to the real standard error with what sentence the process ends. Its log is dropped if it did no step."""
  if _active:
    _active.refuse(sentence)
  else:
    print(sentence, file=sys.stderr)


def configured(config) -> None:
  """Lets the console of a launcher begin, where there is one.

  Raises:
    ConfigError: the log file cannot be written.
  """
  if _active:
    _active.configured(config)


class Console:
  """A context in which a launcher runs; at most one at a time.

  Attributes:
    writes_log: whether the run has a folder for log.txt; if not, what is not shown is dropped at a good end.
    err: the real standard error.
  """

  def __init__(self, writes_log: bool = True, holds_back: bool | None = None):
    """Takes `writes_log`, and whether to hold back all output until the configuration is read; by default, if
    `early.may_hold_back` says so of this process' command line."""
    self.writes_log = writes_log
    self._holds_back = early.may_hold_back(sys.argv) if holds_back is None else holds_back
    self._lock = threading.RLock()
    self._handler = _Handler(self)
    self._is_brief: bool | None = None  # None until the configuration is read
    self._progress: Progress | None = None
    self._bar: tqdm.tqdm | None = None
    self._log: _Log | None = None
    self._early: list[logging.LogRecord] = []  # before the configuration is read
    self._seen: set[str] = set()
    self._refused = False

  def __enter__(self) -> "Console":
    global _active
    self._restore = contextlib.ExitStack()
    self._held: list[BinaryIO] = []  # where standard output and error go until there is a log
    self._out, self.err = sys.stdout, sys.stderr
    if self._holds_back:
      self._redirect()
    _active = self
    return self

  def _redirect(self) -> bool:
    """Sends standard output and error to temporary files; False, and nothing is changed, if none can be written."""
    try:
      held = [self._restore.enter_context(tempfile.TemporaryFile()) for _ in range(2)]  # noqa: SIM115
    except OSError:
      self._restore.close()
      return False
    self._held = held
    self._out = self._restore.enter_context(_real(sys.stdout, 1))
    self.err = self._restore.enter_context(_real(sys.stderr, 2))
    for fd, file in zip((1, 2), held):
      self._restore.callback(os.close, saved := os.dup(fd))
      self._restore.callback(os.dup2, saved, fd)
      os.dup2(file.fileno(), fd)
    self._real_fd = saved
    for redirect, fd in ((contextlib.redirect_stdout, 1), (contextlib.redirect_stderr, 2)):
      stream = open(fd, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
      self._restore.enter_context(redirect(stream))
      self._restore.callback(stream.flush)
    logging.getLogger().addHandler(self._handler)
    self._restore.callback(logging.getLogger().removeHandler, self._handler)
    self._restore.callback(setattr, sys, "breakpointhook", sys.breakpointhook)
    sys.breakpointhook = self._debug
    return True

  def configured(self, config) -> None:
    """Begins what `log_console` asks for. Later calls change nothing.

    Raises:
      ConfigError: the log file cannot be written.
    """
    if self._is_brief is not None:
      return
    import jax  # by which the configuration has been read

    is_remote = self.writes_log and _REMOTE in config.base_output_directory
    if config.log_console == "full" or is_remote or jax.process_count() > 1:
      self._show_all()
      return
    if not self._held and not self._redirect():
      self._print(
        "warning: no folder for temporary files can be written, so the console shows everything, and there is no "
        "log.txt; set the environment variable TMPDIR to one that can.",
        self.err,
      )
      self._show_all()
      return
    self._log = _Log(pathlib.Path(config.checkpoint_dir).parent if self.writes_log else None, self._held)
    self._is_brief = True
    self._restore.enter_context(self._shown_errors())
    if self.writes_log:
      self._progress = Progress(config)
      self.show(f"training {config.run_name} for {config.steps} steps; the full log is {self._log.path}")
      self.show("reading data, building the model and compiling ...")
    for record in self._early:
      self.handle(record)

  @contextlib.contextmanager
  def _shown_errors(self) -> Iterator[None]:
    """A context in which warnings of Python, errors of threads and fatal signals reach the real standard error."""
    hook = threading.excepthook

    def show(arguments) -> None:
      threading.__excepthook__(arguments)  # to the log
      self._print("".join(traceback.format_exception(*arguments[:3])).rstrip(), self.err)

    threading.excepthook = show
    logging.captureWarnings(True)
    faulthandler.enable(self._real_fd)  # absl has enabled it for file descriptor 2
    try:
      yield
    finally:
      faulthandler.enable(sys.__stderr__)
      logging.captureWarnings(False)
      threading.excepthook = hook

  def show(self, text: str) -> None:
    self._print(text, self._out)

  def refuse(self, sentence: str) -> None:
    self._refused = True
    self._seen.add(sentence)
    if self._held:
      print(sentence, file=sys.stderr)  # to the log
    self._print(sentence, self.err)

  def handle(self, record: logging.LogRecord) -> None:
    """Shows what is to be shown of a log record."""
    with self._lock:
      if not self._log:
        self._early.append(record)
        return
      message = record.getMessage()
      self._log.open_in_folder()
      self._show_what_was_logged()
      if record.levelno >= logging.WARNING:
        self._show_warning(record, message)
      elif ends.is_unexplained_stop(message):
        self._print(message, self.err)
      elif self._progress:
        self._advance(message)

  def _advance(self, message: str) -> None:
    line = self._progress.line(message)
    if self._progress.done:
      self._log.open_in_folder(create=True)
    if line:
      self.show(line)
    if self._progress.done:
      self._show_bar()

  def _show_warning(self, record: logging.LogRecord, message: str) -> None:
    if noise.is_known(message):
      return
    if record.name == "py.warnings":
      message = message.rstrip().rsplit("\n  ", 1)[0]  # less the line of source
    if record.exc_info:
      message += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
    if message not in self._seen:
      self._seen.add(message)
      self._print(f"{record.levelname.lower()}: {message}", self.err)

  def _show_what_was_logged(self) -> None:
    for line in _TO_SHOW.finditer(self._log.news()):
      text = (line["native"] or line["sentence"]).decode(errors="replace")
      if text not in self._seen:
        self._seen.add(text)
        self._print(f"error: {text}" if line["native"] else text, self.err)

  def _show_bar(self) -> None:
    if not self._bar and self._out.isatty():
      self._bar = tqdm.tqdm(
        total=self._progress.steps,
        initial=self._progress.done,
        file=self._out,
        unit="step",
        leave=False,
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
      )
    if self._bar:
      self._bar.set_postfix_str(self._progress.status, refresh=False)
      self._bar.update(self._progress.done - self._bar.n)  # draws ten times a second at most

  def _print(self, text: str, stream: TextIO) -> None:
    with self._lock, contextlib.suppress(OSError):  # nobody may read any more
      if self._bar:
        self._bar.clear()
      print(text, file=stream, flush=True)
      if self._bar:
        self._bar.refresh()

  def _show_all(self) -> None:
    """Prints what was held back, and ends the redirection."""
    global _active
    _active = None
    self._is_brief = False
    for held, stream, redirected in zip(self._held, (self._out, self.err), (sys.stdout, sys.stderr)):
      redirected.flush()
      held.seek(0)
      stream.write(held.read().decode(errors="backslashreplace"))
      stream.flush()
    self._restore.close()

  def _debug(self, *arguments, **options):
    """What `breakpoint()` calls: gives a debugger the real console, and ends the log, or prints what was held back."""
    global _active
    with self._lock:
      if self._is_brief:
        self._end(None, is_good=not self.writes_log)
        _active = None
        self._is_brief = False
        self._restore.close()
      else:
        self._show_all()
    if sys.breakpointhook is not sys.__breakpointhook__ or os.environ.get("PYTHONBREAKPOINT"):
      return sys.breakpointhook(*arguments, **options)
    import pdb

    return pdb.Pdb().set_trace(inspect.currentframe().f_back)  # pdb.set_trace would stop in this method

  def __exit__(self, kind, error: BaseException | None, _) -> None:
    global _active
    is_good = error is None or (isinstance(error, SystemExit) and not error.code)
    is_crash = not is_good and not isinstance(error, SystemExit | KeyboardInterrupt)
    if self._is_brief:
      self._end(error if is_crash else None, is_good)
    elif self._is_brief is None and not self._refused:
      self._show_all()
    _active = None
    self._restore.close()

  def _end(self, crash: BaseException | None, is_good: bool) -> None:
    if self._bar:
      self._bar.close()
      self._bar = None
    if crash:
      traceback.print_exception(crash)  # to the log; Python prints it to the console
    self._show_what_was_logged()
    if is_good and self._progress and (line := self._progress.end()):
      self.show(line)
    has_trained = self._progress is not None and self._progress.done is not None
    self._log.close(drop=(self._refused and not has_trained) or (is_good and not self.writes_log))
    if crash and self._log.is_temporary:
      self._print(f"maxtext-mudd: the log of this run is {self._log.path}.", self.err)


class _Handler(logging.Handler):
  """Hands every log record to a console."""

  def __init__(self, console: Console):
    super().__init__()
    self._console = console

  def emit(self, record: logging.LogRecord) -> None:
    try:
      self._console.handle(record)
    except Exception:
      self.handleError(record)  # prints to the log


class _Log:
  """The file behind standard output and error.

  Attributes:
    path: where it is, or will be as soon as the run's folder exists.
    is_temporary: whether it is not in the run's folder; `path` is the temporary file then, once the log is closed.
  """

  def __init__(self, folder: pathlib.Path | None, held: Sequence[BinaryIO]):
    """Takes the place of the files `held`, whose contents come first.

    Raises:
      ConfigError: the log file of a run that has a folder cannot be written.
    """
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    fd, self._temporary = tempfile.mkstemp(prefix="maxtext-mudd-", suffix=".txt")
    self._folder, self.is_temporary = folder, True
    self.path = folder / "log.txt" if folder else pathlib.Path(self._temporary)
    self._is_first = False  # there was no log of an earlier process
    self._read = 0
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    os.write(fd, f"==== {now} {shlex.join(sys.argv)}\n".encode())
    for file in held:
      file.seek(0)
      os.write(fd, file.read())
    self._take_over(fd)
    if folder and folder.is_dir():
      self._is_first = not self.path.exists()
      try:
        self._move()
      except ConfigError:
        os.unlink(self._temporary)
        raise

  def _take_over(self, fd: int) -> None:
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)

  def open_in_folder(self, create: bool = False) -> None:
    """Moves the temporary log into the run's folder, if there is one by now."""
    if not (self._folder and self.is_temporary):
      return
    if create:
      self._folder.mkdir(parents=True, exist_ok=True)
    if self._folder.is_dir():
      self._move()

  def _move(self) -> None:
    try:
      fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
      raise ConfigError(
        f"{self.path}: the log of the run cannot be written ({error.strerror}); remove it, or set log_console=full."
      ) from error
    self._read += os.fstat(fd).st_size
    os.write(fd, pathlib.Path(self._temporary).read_bytes())
    self._take_over(fd)
    self.is_temporary = False
    os.unlink(self._temporary)

  def news(self) -> bytes:
    """What was logged since the last call, up to the last complete line."""
    with open(self._temporary if self.is_temporary else self.path, "rb") as file:
      file.seek(self._read)
      lines = file.read()
    lines = lines[: lines.rfind(b"\n") + 1]
    self._read += len(lines)
    return lines

  def close(self, drop: bool) -> None:
    """Removes the file if it is to be dropped and holds the log of this process alone."""
    if self.is_temporary:
      self.path = pathlib.Path(self._temporary)
      if drop:
        os.unlink(self.path)
    elif drop and self._is_first:
      os.unlink(self.path)


@contextlib.contextmanager
def _real(stream: TextIO, fd: int) -> Iterator[TextIO]:
  """A stream to where `stream` goes now, whatever becomes of the process' descriptor `fd`."""
  stream.flush()
  try:
    is_process_stream = stream.fileno() == fd
  except io.UnsupportedOperation:  # in tests
    is_process_stream = False
  if not is_process_stream:
    yield stream
    return
  with open(os.dup(fd), "w", encoding=stream.encoding, errors=stream.errors) as own:
    yield own


_active: Console | None = None
