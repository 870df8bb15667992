"""The file with the results of an evaluation, by the harness's own writer: whole, or none."""

from collections.abc import Callable, Iterator
import contextlib
import json
import logging
import pathlib
import tempfile
from typing import Any

from maxtext_mudd.config.errors import ConfigError, brief


def check(path: pathlib.Path) -> None:
  """Raises ConfigError for a file that could not be written: its permissions do not tell, nor a full disk."""
  try:
    with _stage(path) as stage:
      (stage / "results.json").write_text("{}")
  except OSError as error:
    raise _unwritable(path, brief(error)) from error


def write(
  path: pathlib.Path, tracker, results: dict[str, Any], samples: dict[str, Any], last_check: Callable[[], None]
) -> None:
  """Writes it.

  Args:
    tracker: an `EvaluationTracker` of the harness, which has seen the evaluation.
    results, samples: as the harness gives them.
    last_check: called before the file gets its name; there is none where this raises.

  Raises:
    ConfigError: it cannot be written.
  """
  try:
    with _stage(path) as stage:
      # The harness puts a date into the name, and tells its log alone what goes wrong.
      tracker.output_path = str(stage / "results.json")
      with _told(logging.getLogger(type(tracker).__module__)) as said:
        tracker.save_results_aggregated(results, samples)
      made = next(stage.iterdir(), None)
      if made is None or not _is_json(made):
        raise _unwritable(path, (said or ["the harness does not say why"])[-1])
      last_check()
      made.rename(path)
  except OSError as error:
    raise _unwritable(path, brief(error)) from error


@contextlib.contextmanager
def _stage(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder beside a file, for what is to become it."""
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as stage:
    yield pathlib.Path(stage)


def _unwritable(path: pathlib.Path, cause: str) -> ConfigError:
  return ConfigError(f"--output={path} cannot be written ({cause}); name a file that can be.")


def _is_json(path: pathlib.Path) -> bool:
  try:
    json.loads(path.read_bytes())
  except ValueError:
    return False
  return True


@contextlib.contextmanager
def _told(logger: logging.Logger) -> Iterator[list[str]]:
  """What is logged meanwhile, which goes nowhere else."""
  said, level = [], logger.level

  def note(record: logging.LogRecord) -> bool:
    said.append(record.getMessage())
    return False

  logger.setLevel(logging.INFO)
  logger.addFilter(note)
  try:
    yield said
  finally:
    logger.removeFilter(note)
    logger.setLevel(level)
