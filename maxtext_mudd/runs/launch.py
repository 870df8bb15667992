"""Runs a stock MaxText entry point with MUDD connections installed; what the launchers share."""

from collections.abc import Callable, Sequence
import gc
import importlib
import logging
import pathlib
import signal
import sys
from typing import Any, NoReturn
import warnings

from absl import app
from absl import logging as absl_logging
import omegaconf
import yaml

from maxtext_mudd import plugin, versions
from maxtext_mudd.config import errors
from maxtext_mudd.runs import console, early, ends, usage


def launch(entry_point: str, check: Callable | None = None, check_early: Callable | None = None) -> None:
  """Runs the `main` of a stock MaxText module as its own script does.

  An unknown MaxText, a configuration that cannot work, and a checkpoint that cannot be restored end the process with
  one sentence on stderr and status 2; nothing has been written then. So does a step that does not fit the device, which
  only its compiler, or its first run, can tell. A run that saved and stopped because of a SIGTERM ends with 143, for
  what starts it again, and a run whose data ended before its steps were done with 3; MaxText's own script ends with 0.
  `--help` and `--list` are answered, and mistakes in keys and files, without importing JAX.

  Args:
    entry_point: name of the module.
    check: called with the configuration as soon as it is read; raises ConfigError for what cannot work.
    check_early: `check_settings` of `early.check`.
  """
  if len(sys.argv) < 2:
    exit_with(f"name a configuration file first, as in: {sys.argv[0]} yaml/mudd_tiny.yml run_name=mine (see --help)")
  if text := usage.answer(entry_point.rpartition(".")[2], sys.argv[1:]):
    print(text)
    return
  try:
    early.check(sys.argv, check_early)
    of_epochs = ends.asks_for_epochs(sys.argv)
  except (errors.ConfigError, versions.UnknownMaxText) as error:
    exit_with(str(error))
  seen = []
  watch = ends.Watch()
  absl_logging.get_absl_logger().addHandler(watch)

  def read(config):
    seen.append(config)
    # `watch` reads what MaxText logs as information; the console is brief anyway.
    absl_logging.set_verbosity(max(absl_logging.get_verbosity(), absl_logging.INFO))
    _devices().check_mesh(config)
    if check:
      check(config)
    console.configured(config)

  try:
    plugin.install(plugin.Reading(check=read, on_error=lambda error: exit_with(str(error))))
  except versions.UnknownMaxText as error:
    exit_with(str(error))
  try:
    app.run(importlib.import_module(entry_point).main)
  except SystemExit as ended:  # as every run does that ends by itself
    if watch.terminated and not ended.code:
      sys.exit(128 + signal.SIGTERM)
    if end := ends.of_training_data(watch.error, of_epochs):
      exit_with(end.sentence, end.status)
    raise
  except (MemoryError, PermissionError):
    raise
  except KeyboardInterrupt:
    newest = _newest_checkpoint(seen[-1]) if seen else None
    exit_with(f"interrupted; the same command resumes from {newest}." if newest else "interrupted.")
  except errors.ConfigError as error:
    exit_with(str(error))
  except Exception as error:
    if errors.failed_in(error, "load_state_if_possible"):
      exit_with(_unreadable_checkpoint(seen[-1], error))
    if errors.failed_in(error, "validate_completed_steps"):
      folder = pathlib.Path(seen[-1].checkpoint_dir)
      exit_with(f"{folder}: this run has done its steps={seen[-1].steps}; set steps higher to go on.")
    if end := ends.of_evaluation_data(error):
      exit_with(end.sentence, end.status)
    if seen and (sentence := _devices().out_of_memory(error, seen[-1])):
      exit_with(sentence)
    raise
  finally:
    absl_logging.get_absl_logger().removeHandler(watch)
    watch.error = None  # its frames hold the data iterators
    # MaxText's data iterators clean up when collected, and cannot any more once the interpreter shuts down.
    gc.collect()


def keys(arguments: Sequence[str]) -> dict[str, Any]:
  """Of key=value arguments, read as MaxText reads them. Raises ConfigError."""
  for argument in arguments:
    if "=" not in argument[1:]:
      raise errors.ConfigError(f"{argument} is not key=value, as scan_layers=true is.")
    try:
      omegaconf.OmegaConf.from_dotlist([argument])
    except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException) as error:
      raise errors.ConfigError(
        f"{argument} is not valid YAML behind the =; quote it ({errors.brief(error)})."
      ) from error
  return omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.from_dotlist(list(arguments)))


def exit_with(sentence: str, status: int = 2) -> NoReturn:
  """Ends the process with one sentence on stderr; status 2 is that of every mistake of a user."""
  console.refuse(f"maxtext-mudd: {sentence}")
  # Threads, coroutines and data iterators that are still ending have nothing more to say.
  logging.disable()
  warnings.simplefilter("ignore")
  sys.unraisablehook = lambda _: None
  sys.exit(status)


def _devices():
  """The module, which imports MaxText's: not before that is known to be the right one."""
  from maxtext_mudd.config import devices

  return devices


def _newest_checkpoint(config) -> pathlib.Path | None:
  """Of a run that writes checkpoints to a local folder."""
  folder = pathlib.Path(config.checkpoint_dir or "none")
  steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []
  return folder / str(max(steps)) if steps else None


def _unreadable_checkpoint(config, error: Exception) -> str:
  """Orbax raises the same errors for damage and for a model of another shape, so the sentence names both."""
  cause = errors.brief(error)
  explicit = config.load_full_state_path or config.load_parameters_path
  if explicit:
    return (
      f"{explicit}: this checkpoint cannot be restored and is left as it is; it is damaged, or of a model with other "
      f"keys than this configuration ({cause})."
    )
  newest = _newest_checkpoint(config) or config.checkpoint_dir
  return (
    f"{newest}: the newest checkpoint cannot be restored and is left as it is; use the keys that the run was started "
    f"with, or, if it is damaged, move it away to resume from the one before it ({cause})."
  )
