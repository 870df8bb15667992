"""Writes the results of an evaluation with the harness's own writer. An incomplete file never has the final name.

`check` tests before the evaluation that the file can be written, and `write` writes it afterwards.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import logging
import pathlib
import tempfile
from typing import Any

from maxtext_mudd.config.errors import ConfigError, brief


def check(path: pathlib.Path) -> None:
  """Raises ConfigError if the file cannot be written.

  It writes a temporary file, because permissions alone do not show, for example, that the disk is full.
  """
  try:
    with _temporary_folder(path) as folder:
      (folder / "results.json").write_text("{}")
  except OSError as error:
    raise _unwritable(path, brief(error)) from error


def write(
  path: pathlib.Path, tracker, results: dict[str, Any], samples: dict[str, Any], last_check: Callable[[], None]
) -> None:
  """Writes the file.

  Args:
    path: the file to write.
    tracker: the `EvaluationTracker` of the harness that followed the evaluation.
    results: what the harness returned, without its samples.
    samples: the samples of the results.
    last_check: called when the file is complete and before it gets its name. If it raises, there is no file.

  Raises:
    ConfigError: the file cannot be written.
  """
  try:
    with _temporary_folder(path) as folder:
      # The harness adds a date to this name. It raises no error, but logs what goes wrong.
      tracker.output_path = str(folder / "results.json")
      with _captured(logging.getLogger(type(tracker).__module__)) as messages:
        tracker.save_results_aggregated(results, samples)
      file = next(folder.iterdir(), None)
      if file is None or not _is_json(file):
        raise _unwritable(path, (messages or ["the harness does not say why"])[-1])
      last_check()
      file.rename(path)
  except OSError as error:
    raise _unwritable(path, brief(error)) from error


@contextlib.contextmanager
def _temporary_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary folder on the same disk as `path`, so that a file in it can be renamed to `path`."""
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
    yield pathlib.Path(folder)


def _unwritable(path: pathlib.Path, cause: str) -> ConfigError:
  return ConfigError(f"--output={path} cannot be written ({cause}); name a file that can be written.")


def _is_json(path: pathlib.Path) -> bool:
  try:
    json.loads(path.read_bytes())
  except ValueError:
    return False
  return True


@contextlib.contextmanager
def _captured(logger: logging.Logger) -> Iterator[list[str]]:
  """A context in which messages of the logger go to the yielded list and nowhere else."""
  messages, level = [], logger.level

  def capture(record: logging.LogRecord) -> bool:
    messages.append(record.getMessage())
    return False

  logger.setLevel(logging.INFO)
  logger.addFilter(capture)
  try:
    yield messages
  finally:
    logger.removeFilter(capture)
    logger.setLevel(level)
