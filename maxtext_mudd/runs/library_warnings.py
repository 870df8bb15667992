"""Hides warnings and lines that libraries print dozens of times in runs without errors and that need no action."""

from collections.abc import Iterator
import contextlib
import io
import logging
import re
import sys
from typing import TextIO
import warnings

from absl import logging as absl_logging

_WARNINGS = (
  # Orbax causes this warning itself: it creates a TensorStore context for every parameter that it restores for MaxText.
  r"ParamInfo\(name='.*'\) created with ts_context=None",
  # Orbax looks for metadata in STEP/items first; MaxText's checkpoints have it in STEP.
  r"Metadata file does not exist: .*/(?:items|model_params)/_CHECKPOINT_METADATA",
  # Folders beside `items` that hold no arrays and that Orbax need not read: STEP/iter is the state of the training
  # data, and `maxtext_mudd.convert` writes the other two.
  r"Failed to get metadata for checkpointable: (?:iter|tokenizer|remote_code) due to incompatible handler",
  r"Failed to resolve handler for checkpointable: '(?:tokenizer|remote_code)'",
  # Only training writes to the folder maxtext_output, and it prints the path of its log.
  r"base_output_directory is not provided; Using local directory called maxtext_output",
  # Deprecations in calls of MaxText 0.2.5, which pins versions of Orbax and Grain that still accept these calls.
  r"The transformations API will eventually be replaced by an upgraded design",
  r"Specifying dataset_type upon checkpointer creation is deprecated",
  r"PackAndBatchOperation is deprecated",
  # MaxEngine donates the KV cache of a prompt, which is smaller than the cache of all prompts into which it is copied.
  r"Some donated buffers were not usable",
)
_LINES = (
  # Optional packages of Google Cloud and JetStream, which MaxText replaces by stubs.
  r"\[NO-OP\] \w+: dependency missing",
  r"Resharding given NNX params$",
)
_WARNING = re.compile("|".join(_WARNINGS))
_LINE = re.compile("|".join(_LINES))


def is_known(message: str) -> bool:
  """Whether a message is one of the known warnings. A position in the source code may precede it."""
  return bool(_WARNING.search(message))


@contextlib.contextmanager
def hidden() -> Iterator[None]:
  """A context in which the known warnings and lines do not reach the console. All others do."""

  class Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
      return not is_known(record.getMessage())

  logger, known_warnings = absl_logging.get_absl_logger(), Filter()  # Orbax and MaxText log through Abseil
  logger.addFilter(known_warnings)
  try:
    with warnings.catch_warnings(), contextlib.redirect_stdout(_WithoutKnownLines(sys.stdout)) as stdout:
      for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
      yield
      stdout.flush()
  finally:
    logger.removeFilter(known_warnings)


class _WithoutKnownLines(io.TextIOBase):
  """A text stream that passes complete lines on to another stream, except the known ones."""

  def __init__(self, stream: TextIO):
    self._stream = stream
    self._incomplete_line = ""

  def writable(self) -> bool:
    return True

  def isatty(self) -> bool:
    return self._stream.isatty()

  def fileno(self) -> int:
    return self._stream.fileno()

  def write(self, text: str) -> int:
    *lines, self._incomplete_line = (self._incomplete_line + text).split("\n")
    self._stream.writelines(f"{line}\n" for line in lines if not _LINE.match(line))
    return len(text)

  def flush(self) -> None:
    if self._incomplete_line and not self._stream.closed:
      self._stream.write(self._incomplete_line)
      self._incomplete_line = ""
    if not self._stream.closed:
      self._stream.flush()
