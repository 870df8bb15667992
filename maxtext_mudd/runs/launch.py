"""Runs the `main` of a stock MaxText module with MUDD connections, and ends every known failure in one sentence.

`launch` is what `train`, `train_compile`, `post_train` and `decode` call. `exit_with` and `read_overrides` serve all
commands.
"""

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

from maxtext_mudd import plugin
from maxtext_mudd.config import errors, versions
from maxtext_mudd.runs import console, early_check, end_of_data, usage


def launch(
  entry_point: str, check: Callable | None = None, check_early: Callable | None = None, command: str = ""
) -> None:
  """Runs the `main` of a stock MaxText module, as the module does when it is run as a script.

  `--help`, `--list`, and mistakes in keys and files are handled without importing JAX. The process exits with one of
  these statuses. With 2 and 3 it prints one sentence to stderr:

    0    The command succeeded. A training run did all its steps, or its data ended and `num_epoch` is set.
    2    The version of MaxText is unknown, the configuration cannot work, or a checkpoint cannot be restored. In these
         cases nothing has been written. Or a step does not fit the device, as its compiler or its first step shows.
    3    The training data ended before the steps of the run were done.
    143  The run saved a checkpoint and stopped because of a SIGTERM. The status tells the sender of the signal, such as
         Kubernetes, to start the run again. MaxText's own script exits with 0.

  Args:
    entry_point: the name of the module.
    check: called with the configuration as soon as it is read; raises ConfigError if it cannot work.
    check_early: the argument `check_settings` of `early_check.check`.
    command: a key of `usage.COMMANDS`; default: the last part of `entry_point`.
  """
  if len(sys.argv) < 2:
    exit_with(f"name a configuration file first, as in: {sys.argv[0]} yaml/mudd_tiny.yml run_name=mine (see --help)")
  if text := usage.answer(command or entry_point.rpartition(".")[2], sys.argv[1:]):
    print(text)
    return
  configs = []  # the configurations that MaxText reads
  try:
    early_check.check(sys.argv, check_early)
    num_epoch_is_set = end_of_data.sets_num_epoch(sys.argv)
    _install_plugin(check, configs)
  except (errors.ConfigError, versions.UnknownMaxText) as error:
    exit_with(str(error))
  stop = end_of_data.StopRecorder()
  absl_logging.get_absl_logger().addHandler(stop)
  try:
    app.run(importlib.import_module(entry_point).main)
  except SystemExit as exiting:  # `app.run` raises it at the end of every run, also of a good one
    if stop.terminated and not exiting.code:
      sys.exit(128 + signal.SIGTERM)
    if end := _end_of_data(stop, num_epoch_is_set, configs):
      exit_with(end.sentence, end.status)
    raise
  except (MemoryError, PermissionError):
    raise
  except KeyboardInterrupt:
    newest = _newest_checkpoint(configs[-1]) if configs else None
    exit_with(f"interrupted; the same command resumes from {newest}." if newest else "interrupted.")
  except Exception as error:
    if end := _explained_end(error, configs):
      exit_with(end.sentence, end.status)
    raise
  finally:
    absl_logging.get_absl_logger().removeHandler(stop)
    stop.error = None  # its frames hold the data iterators
    # MaxText's data iterators clean up when they are garbage-collected, which fails once the interpreter shuts down.
    gc.collect()


def _install_plugin(check: Callable | None, configs: list) -> None:
  """Installs the plugin so that each configuration that MaxText reads is checked and appended to `configs`."""

  def check_config(config):
    configs.append(config)
    # `end_of_data.StopRecorder` needs messages of this level. A brief console shows few of these messages.
    absl_logging.set_verbosity(max(absl_logging.get_verbosity(), absl_logging.INFO))
    _devices().check_mesh(config)
    if check:
      check(config)
    console.start(config)

  plugin.install(plugin.Reading(check=check_config, on_error=lambda error: exit_with(str(error))))


def _end_of_data(stop: end_of_data.StopRecorder, num_epoch_is_set: bool, configs: list) -> end_of_data.RunEnd | None:
  """The end of a run whose training data ended or cannot be read; None if something else ended it."""
  if stop.is_of_tunix:
    return end_of_data.handle_tunix_data_error(stop.error, num_epoch_is_set, configs[0], _newest_checkpoint(configs[0]))
  return end_of_data.handle_training_data_error(stop.error, num_epoch_is_set)


def _explained_end(error: Exception, configs: list) -> end_of_data.RunEnd | None:
  """The end of a run because of an exception; None if this package cannot explain the exception."""
  if isinstance(error, errors.ConfigError):
    return end_of_data.RunEnd(str(error), 2)
  if errors.failed_in(error, "load_state_if_possible"):
    return end_of_data.RunEnd(_unreadable_checkpoint(configs[-1], error), 2)
  if errors.failed_in(error, "_verify_lora_parameters"):
    pattern = configs[-1].lora.lora_module_path
    return end_of_data.RunEnd(f"lora.lora_module_path={pattern} is the path of no layer that takes an adapter.", 2)
  if errors.failed_in(error, "validate_completed_steps"):
    folder = pathlib.Path(configs[-1].checkpoint_dir)
    return end_of_data.RunEnd(
      f"{folder}: this run has done its steps={configs[-1].steps}; set steps higher to continue it.", 2
    )
  if end := end_of_data.handle_evaluation_data_error(error):
    return end
  sentence = _devices().out_of_memory(error, configs[-1]) if configs else None
  return end_of_data.RunEnd(sentence, 2) if sentence else None


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
  """The keys and values of key=value arguments, parsed as MaxText parses them.

  Raises:
    ConfigError: an argument is not key=value, or its value is not valid YAML.
  """
  for argument in arguments:
    if "=" not in argument[1:]:
      raise errors.ConfigError(f"{argument} is not key=value; write it like scan_layers=true.")
    try:
      omegaconf.OmegaConf.from_dotlist([argument])
    except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException) as error:
      raise errors.ConfigError(
        f"{argument} is not valid YAML after the =; quote it ({errors.brief(error)})."
      ) from error
  return omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.from_dotlist(list(arguments)))


def exit_with(sentence: str, status: int = 2) -> NoReturn:
  """Ends the process with one sentence on stderr. Every mistake of a user ends with status 2."""
  console.refuse(f"maxtext-mudd: {sentence}")
  # Messages that threads, coroutines and data iterators print while they end would not help the user.
  logging.disable()
  warnings.simplefilter("ignore")
  sys.unraisablehook = lambda _: None
  sys.exit(status)


def _devices():
  """The module `config.devices`. It imports MaxText, so it is imported after the version of MaxText is checked."""
  from maxtext_mudd.config import devices

  return devices


def _newest_checkpoint(config) -> pathlib.Path | None:
  """The newest checkpoint of a run that writes checkpoints to a local folder."""
  folder = pathlib.Path(config.checkpoint_dir or "none")
  steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []
  return folder / str(max(steps)) if steps else None


def _unreadable_checkpoint(config, error: Exception) -> str:
  """The sentence for a checkpoint that cannot be restored.

  It names two causes, because Orbax raises the same errors for damage and for a model of another shape.
  """
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
