"""The console of the launchers. By default it is brief, and all output of the process goes to a log file.

A brief console shows the lines of `Progress`, each warning once, errors, and the texts given to `show` and `refuse`.
The process' standard output and error go to RUN/log.txt, including those of C++ code and of child processes.

The path of this file and the value of `log_console` are known when MaxText's configuration has been read. Until then,
output is held in temporary files if the command line shows that the console will be brief. Otherwise it is shown. A job
of several processes has MaxText's own console.

A launcher runs inside `with Console():`, and `launch` calls `start` when it has read the configuration.
"""

from collections.abc import Iterator
import contextlib
import faulthandler
import inspect
import io
import logging
import os
import pathlib
import re
import sys
import tempfile
import threading
import traceback
from typing import BinaryIO, TextIO

import tqdm

from maxtext_mudd.runs import early_check, end_of_data, library_warnings
from maxtext_mudd.runs.log_file import LogFile
from maxtext_mudd.runs.progress import Progress

# Lines of the log that the console shows although they do not pass through Python's logging: errors that C++ code logs,
# and sentences that this package prints to stderr.
_SHOWN_LINE = re.compile(
  rb"^(?:[EF]\d{4} [\d:.]+ +\d+ \S+\.(?:cc|h|cpp):\d+\] (?P<cpp_error>.*)|(?P<sentence>maxtext-mudd: .*))$", re.M
)


def show(text: str) -> None:
  """Prints a result of a launcher to the real standard output, even while output goes to the log."""
  if _active:
    _active.show(text)
  else:
    print(text)


def stderr() -> TextIO:
  """The real standard error, for progress that is not a line of training."""
  return _active.err if _active else sys.stderr


def refuse(sentence: str) -> None:
  """Prints the sentence with which the process ends to the real standard error.

  The log is dropped if the process did no training step.
  """
  if _active:
    _active.refuse(sentence)
  else:
    print(sentence, file=sys.stderr)


def start(config) -> None:
  """Starts the active console, if there is one, as `Console.start` does.

  Raises:
    ConfigError: the log file cannot be written.
  """
  if _active:
    _active.start(config)


class Console:
  """A context in which a launcher runs. Only one can be active at a time.

  Attributes:
    writes_log: whether the run has a folder for log.txt. If not, output that is not shown is dropped when the run ends
      without an error.
    err: the real standard error.
  """

  def __init__(self, writes_log: bool = True, holds_output: bool | None = None, first_step: int = 0):
    """
    Args:
      writes_log: whether the run has a folder for log.txt.
      first_step: the argument of `Progress`.
      holds_output: whether to hold all output until the configuration is read. Default: whether the command line of
        this process shows that the console will be brief (`early_check.shows_brief_console`).
    """
    self.writes_log = writes_log
    self._first_step = first_step
    self._holds_output = early_check.shows_brief_console(sys.argv) if holds_output is None else holds_output
    self._lock = threading.RLock()
    self._handler = _Handler(self)
    self._is_brief: bool | None = None  # None until the configuration is read
    self._progress: Progress | None = None
    self._bar: tqdm.tqdm | None = None
    self._log: LogFile | None = None
    self._early_records: list[logging.LogRecord] = []  # logged before the configuration is read
    self._shown: set[str] = set()  # messages that were shown and are not shown again
    self._refused = False

  def __enter__(self) -> "Console":
    global _active
    self._restore = contextlib.ExitStack()
    self._held_output: list[BinaryIO] = []  # the temporary files of standard output and error until there is a log
    self._out, self.err = sys.stdout, sys.stderr
    if self._holds_output:
      self._redirect()
    _active = self
    return self

  def _redirect(self) -> bool:
    """Sends standard output and error to temporary files.

    Returns:
      False, and nothing is changed, if no temporary file can be written.
    """
    try:
      files = [self._restore.enter_context(tempfile.TemporaryFile()) for _ in range(2)]  # noqa: SIM115
    except OSError:
      self._restore.close()
      return False
    self._held_output = files
    self._out = self._restore.enter_context(_independent_stream(sys.stdout, 1))
    self.err = self._restore.enter_context(_independent_stream(sys.stderr, 2))
    for fd, file in zip((1, 2), files):
      self._restore.callback(os.close, real_fd := os.dup(fd))
      self._restore.callback(os.dup2, real_fd, fd)
      os.dup2(file.fileno(), fd)
    self._real_err_fd = real_fd  # after the loop, that of standard error
    for redirect, fd in ((contextlib.redirect_stdout, 1), (contextlib.redirect_stderr, 2)):
      stream = open(fd, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
      self._restore.enter_context(redirect(stream))
      self._restore.callback(stream.flush)
    logging.getLogger().addHandler(self._handler)
    self._restore.callback(logging.getLogger().removeHandler, self._handler)
    self._restore.callback(setattr, sys, "breakpointhook", sys.breakpointhook)
    sys.breakpointhook = self._debug
    return True

  def start(self, config) -> None:
    """Starts the kind of console that `log_console` asks for. Later calls change nothing.

    Raises:
      ConfigError: the log file cannot be written.
    """
    if self._is_brief is not None:
      return
    import jax  # imported already, because reading the configuration needs it

    is_remote = self.writes_log and "://" in config.base_output_directory
    if config.log_console == "full" or is_remote or jax.process_count() > 1:
      self._show_all()
      return
    if not self._held_output and not self._redirect():
      self._print(
        "warning: no folder for temporary files can be written to, so the console shows everything, and there is no "
        "log.txt; set the environment variable TMPDIR to a folder that can.",
        self.err,
      )
      self._show_all()
      return
    self._log = LogFile(pathlib.Path(config.checkpoint_dir).parent if self.writes_log else None, self._held_output)
    self._is_brief = True
    self._restore.enter_context(self._errors_on_console())
    if self.writes_log:
      self._progress = Progress(config, first_step=self._first_step)
      self.show(f"training {config.run_name} for {config.steps} steps; the full log is {self._log.path}")
      self.show("reading data, building the model and compiling ...")
    for record in self._early_records:
      self.handle(record)

  @contextlib.contextmanager
  def _errors_on_console(self) -> Iterator[None]:
    """A context in which Python's warnings, errors of threads and fatal signals reach the real standard error."""
    hook = threading.excepthook

    def show_thread_error(arguments) -> None:
      threading.__excepthook__(arguments)  # prints to the log
      self._print("".join(traceback.format_exception(*arguments[:3])).rstrip(), self.err)

    threading.excepthook = show_thread_error
    logging.captureWarnings(True)
    faulthandler.enable(self._real_err_fd)  # Abseil has enabled it for file descriptor 2, which is the log now
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
    self._shown.add(sentence)
    if self._held_output:
      print(sentence, file=sys.stderr)  # goes to the log
    self._print(sentence, self.err)

  def handle(self, record: logging.LogRecord) -> None:
    """Shows a log record, or the line of `Progress` for it, if the console shows records of its kind."""
    with self._lock:
      if not self._log:
        self._early_records.append(record)
        return
      message = record.getMessage()
      self._log.open_in_folder()
      self._show_logged_lines()
      if record.levelno >= logging.WARNING:
        self._show_warning(record, message)
      elif end_of_data.is_other_stop(message):
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
    if library_warnings.is_known(message):
      return
    if record.name == "py.warnings":
      message = message.rstrip().rsplit("\n  ", 1)[0]  # drops the line of source code
    if record.exc_info:
      message += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
    if message not in self._shown:
      self._shown.add(message)
      self._print(f"{record.levelname.lower()}: {message}", self.err)

  def _show_logged_lines(self) -> None:
    """Shows the new lines of the log file that match `_SHOWN_LINE`."""
    for line in _SHOWN_LINE.finditer(self._log.read_new_lines()):
      text = (line["cpp_error"] or line["sentence"]).decode(errors="replace")
      if text not in self._shown:
        self._shown.add(text)
        self._print(f"error: {text}" if line["cpp_error"] else text, self.err)

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
      self._bar.update(self._progress.done - self._bar.n)  # draws at most ten times a second

  def _print(self, text: str, stream: TextIO) -> None:
    with self._lock, contextlib.suppress(OSError):  # the process that reads the pipe may have ended
      if self._bar:
        self._bar.clear()
      print(text, file=stream, flush=True)
      if self._bar:
        self._bar.refresh()

  def _show_all(self) -> None:
    """Prints the output held back so far, and ends the redirection."""
    global _active
    _active = None
    self._is_brief = False
    for file, stream, redirected in zip(self._held_output, (self._out, self.err), (sys.stdout, sys.stderr)):
      redirected.flush()
      file.seek(0)
      stream.write(file.read().decode(errors="backslashreplace"))
      stream.flush()
    self._restore.close()

  def _debug(self, *arguments, **options):
    """Called by `breakpoint()`: ends the log or prints the held output, and restores the console for the debugger."""
    global _active
    with self._lock:
      if self._is_brief:
        self._finish(None, is_good=not self.writes_log)
        _active = None
        self._is_brief = False
        self._restore.close()
      else:
        self._show_all()
    if sys.breakpointhook is not sys.__breakpointhook__ or os.environ.get("PYTHONBREAKPOINT"):
      return sys.breakpointhook(*arguments, **options)
    import pdb

    # pdb.set_trace would stop in this method.
    return pdb.Pdb().set_trace(inspect.currentframe().f_back)

  def __exit__(self, _, error: BaseException | None, __) -> None:
    global _active
    is_good = error is None or (isinstance(error, SystemExit) and not error.code)
    is_crash = not is_good and not isinstance(error, SystemExit | KeyboardInterrupt)
    if self._is_brief:
      self._finish(error if is_crash else None, is_good)
    elif self._is_brief is None and not self._refused:
      self._show_all()
    _active = None
    self._restore.close()

  def _finish(self, crash: BaseException | None, is_good: bool) -> None:
    """Shows the last lines, and closes the log or drops it."""
    if self._bar:
      self._bar.close()
      self._bar = None
    if crash:
      traceback.print_exception(crash)  # to the log; Python prints the exception to the console later
    self._show_logged_lines()
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


@contextlib.contextmanager
def _independent_stream(stream: TextIO, fd: int) -> Iterator[TextIO]:
  """A stream to the same file as `stream`, which stays there when the process' descriptor `fd` is redirected."""
  stream.flush()
  try:
    is_process_stream = stream.fileno() == fd
  except io.UnsupportedOperation:  # in tests
    is_process_stream = False
  if not is_process_stream:
    yield stream
    return
  with open(os.dup(fd), "w", encoding=stream.encoding, errors=stream.errors) as copy:
    yield copy


_active: Console | None = None
