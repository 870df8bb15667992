"""Warnings and lines of libraries that good runs print by the dozen, and that ask nothing of anybody."""

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
  # Orbax asks itself for this: every parameter that it restores for MaxText gets a TensorStore context of its own.
  r"ParamInfo\(name='.*'\) created with ts_context=None",
  # Orbax looks for metadata in STEP/items first; MaxText's checkpoints have it in STEP.
  r"Metadata file does not exist: .*/items/_CHECKPOINT_METADATA",
  # Folders beside `items` that are no checkpoints of arrays, and that Orbax is not asked to read: STEP/iter, the state
  # of the training data, and what `convert` puts there.
  r"Failed to get metadata for checkpointable: (?:iter|tokenizer|remote_code) due to incompatible handler",
  r"Failed to resolve handler for checkpointable: '(?:tokenizer|remote_code)'",
  # Nothing is written there but by training, which shows where its log is.
  r"base_output_directory is not provided; Using local directory called maxtext_output",
  # Deprecations in calls of MaxText 0.2.5, which pins the versions of Orbax and Grain that still take them.
  r"The transformations API will eventually be replaced by an upgraded design",
  r"Specifying dataset_type upon checkpointer creation is deprecated",
  # MaxEngine donates a prompt's KV cache, which is smaller than the cache of all prompts that it is copied into.
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
  """Whether a warning, with or without its place in the source before it, is one of the known ones."""
  return bool(_WARNING.search(message))


@contextlib.contextmanager
def hidden() -> Iterator[None]:
  """A context in which known warnings and lines do not reach the console, and all others do."""

  class Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
      return not is_known(record.getMessage())

  logger, known = absl_logging.get_absl_logger(), Filter()  # through which Orbax and MaxText log
  logger.addFilter(known)
  try:
    with warnings.catch_warnings(), contextlib.redirect_stdout(_WithoutLines(sys.stdout)) as stdout:
      for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
      yield
      stdout.flush()
  finally:
    logger.removeFilter(known)


class _WithoutLines(io.TextIOBase):
  """A text stream that passes whole lines on to another stream, except the known ones."""

  def __init__(self, stream: TextIO):
    self._stream, self._begun = stream, ""

  def writable(self) -> bool:
    return True

  def isatty(self) -> bool:
    return self._stream.isatty()

  def fileno(self) -> int:
    return self._stream.fileno()

  def write(self, text: str) -> int:
    *lines, self._begun = (self._begun + text).split("\n")
    self._stream.writelines(f"{line}\n" for line in lines if not _LINE.match(line))
    return len(text)

  def flush(self) -> None:
    if self._begun and not self._stream.closed:
      self._stream.write(self._begun)
      self._begun = ""
    if not self._stream.closed:
      self._stream.flush()
