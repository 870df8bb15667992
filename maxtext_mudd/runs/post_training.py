"""Checks a run of MaxText's trainers for fine-tuning, before anything is compiled or written."""

from collections.abc import Iterator, Sequence
import os
import pathlib
import re

from maxtext.configs import pyconfig

from maxtext_mudd import connections
from maxtext_mudd.checkpoints import adapters, model_config, orbax_folder, parameters
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import data_settings


def settings(config, name: str) -> Iterator[tuple[bool, str]]:
  """Yields pairs: whether a setting is unusable with a method of `post_train.METHODS`, and the sentence for it."""
  for key, method in (("use_sft", "sft"), ("use_dpo", "dpo")):
    value = getattr(config, key)
    yield (
      name == method and not value,
      f"{key}=False: {method} needs its own keys; name post_train/{method}.yml after the model's file, or set "
      f"{key}=True.",
    )
    yield value and name in ("sft", "dpo") and name != method, f"{key}=True does not work with {name}; set {key}=False."
  adapter = config.lora
  yield (
    adapter.enable_lora and name != "sft",
    f"lora.enable_lora=True does not work with {name}: MaxText adds no adapters to the model there; set it to False.",
  )
  yield (
    adapter.enable_lora and not adapter.lora_restore_path and (adapter.lora_rank < 1 or adapter.lora_alpha <= 0),
    f"lora.lora_rank={adapter.lora_rank} and lora.lora_alpha={adapter.lora_alpha:g} make no adapter; set both above 0.",
  )
  yield (
    adapter.enable_lora and config.mudd and config.scan_layers,
    "lora.enable_lora=True with scan_layers=True: scanned layers with connections take no adapters; set "
    "scan_layers=False.",
  )
  yield (
    adapter.enable_lora and config.mudd and config.depth_connection != connections.DEFAULT,
    f"lora.enable_lora=True with depth_connection={config.depth_connection}: models with connections of this family "
    "take no adapters; set lora.enable_lora=False.",
  )
  yield (
    config.optimizer_memory_host_offload,
    f"optimizer_memory_host_offload=True does not work with {name}, whose trainer keeps the optimizer's state on the "
    "devices; set it to False.",
  )
  tiles = config.num_vocab_tiling
  yield name == "dpo" and tiles > 1, f"num_vocab_tiling={tiles} does not work with dpo; set it to 1."
  for split in data_settings.splits(config):
    key = f"{split}_data_columns"
    columns = list(getattr(config, key))
    yield (
      name == "dpo" and len(columns) not in (2, 3),
      f"{key}={columns}: dpo reads [prompt,chosen,rejected], or [chosen,rejected] that begin with the same prompt; set "
      "it to columns with these contents.",
    )
  yield (
    name == "distill" and config.eval_interval > 0,
    f"eval_interval={config.eval_interval} does not work with distill: MaxText reads the evaluation data once, so "
    "later evaluations would find none; set it to -1, and run maxtext_mudd.evaluate on the checkpoints.",
  )


def check_start(config) -> None:
  """Checks the checkpoint that a run starts from, and sets `load_parameters_path` to the folder that MaxText reads.

  Raises:
    ConfigError: there is no checkpoint, it is not of the model, or the run has done its steps.
  """
  if config.load_full_state_path:
    raise ConfigError(
      f"load_full_state_path={config.load_full_state_path}: fine-tuning starts from parameters only; name the "
      "checkpoint by load_parameters_path, which also accepts a checkpoint of a run."
    )
  path = config.load_parameters_path
  if not path:
    raise ConfigError(
      "load_parameters_path='' names no model to fine-tune; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP."
    )
  if not data_settings.is_remote(path):
    if not os.path.isdir(path):
      raise ConfigError(
        f"load_parameters_path={path}: there is no such folder; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP."
      )
    path = os.path.abspath(str(parameters.items_folder(path)))
    parameters.check_path(path, pyconfig.HyperParameters(config))
    config.load_parameters_path = path
  if config.lora.enable_lora:
    _check_adapter(config)
  _check_steps(config)


def _check_adapter(config) -> None:
  """Checks which layers get adapters, and sets `lora.lora_restore_path` to the folder that MaxText reads.

  Raises:
    ConfigError: no layer gets one, or one that takes none, or the adapter to start from is not of these layers.
  """
  pattern = config.lora.lora_module_path
  if not pattern:
    return  # MaxText chooses one by `model_name`
  try:
    matches = re.compile(pattern).fullmatch
  except re.error as error:
    raise ConfigError(f"lora.lora_module_path={pattern} is not a regular expression ({error}); correct it.") from error
  names = [name.rpartition("/") for name in model_config.parameter_shapes(pyconfig.HyperParameters(config))]
  matched = {f"{layer}/{parameter}" for layer, _, parameter in names if matches(layer)}
  of_connections = sorted(name for name in matched if "connection" in name.split("/"))
  if config.mudd and of_connections:
    raise ConfigError(
      f"lora.lora_module_path={pattern}: {of_connections[0]} is a parameter of connections, which take no adapters in "
      "MaxText; write a pattern of other layers."
    )
  kernels = {name for name in matched if name.endswith("/kernel")}
  if not kernels:
    raise ConfigError(
      f"lora.lora_module_path={pattern} is the path of no layer that takes an adapter; write a pattern of paths such "
      "as decoder/layers_0/self_attention/query."
    )
  path = config.lora.lora_restore_path
  if path and not data_settings.is_remote(path):
    config.lora.lora_restore_path = _adapter_folder(path, kernels, config.lora.lora_rank)


def _adapter_folder(path: str, kernels: set[str], rank: int) -> str:
  """The folder with the parameters of an adapter.

  Args:
    path: OUTPUT/RUN/checkpoints/STEP, or the folder in it.
    kernels: the paths of the parameters that get an adapter.
    rank: that of the adapters.

  Raises:
    ConfigError: there is no adapter, or it has other kernels or another rank.
  """
  key = f"lora.lora_restore_path={path}"
  folder = os.path.abspath(str(parameters.items_folder(path)))
  saved = adapters.of(orbax_folder.parameters(pathlib.Path(folder))) if os.path.isdir(folder) else {}
  if not saved:
    raise ConfigError(f"{key} has no adapter; name a checkpoint of a run with lora.enable_lora=True.")
  if different := sorted(kernels ^ saved.keys()):
    has = "has an" if different[0] in saved else "has no"
    raise ConfigError(f"{key} {has} adapter of {different[0]}; set lora.lora_module_path as it was in training.")
  if other_ranks := {a.shape[-1] for a, _ in saved.values()} - {rank}:
    raise ConfigError(f"lora.lora_rank={rank}: {path} has an adapter of rank {min(other_ranks)}; set that.")
  return folder


def check_distillation(config, earlier: Sequence) -> None:
  """Checks one of the three configurations that MaxText's distillation reads: the common one, the student's and the
  teacher's. Sets `load_parameters_path` as `check_start` does.

  Args:
    earlier: the configurations before this one.

  Raises:
    ConfigError: the teacher has no checkpoint or does not fit the student, or a checkpoint is not of its model.
  """
  if not earlier:
    if config.offline_data_dir:
      raise ConfigError(
        f"offline_data_dir={config.offline_data_dir}: saved predictions of a teacher are not supported; leave it "
        "empty, and name the teacher by teacher_overrides."
      )
    if not config.teacher_overrides.get("load_parameters_path"):
      raise ConfigError(
        "teacher_overrides has no load_parameters_path, so there is no teacher; write teacher_overrides: "
        "{load_parameters_path: OUTPUT/RUN/checkpoints/STEP, ...} in the model's file."
      )
    if config.load_parameters_path and not config.student_overrides:
      check_start(config)  # the student has this configuration, and MaxText writes files before it reads that
    else:
      _check_steps(config)
    return
  if len(earlier) == 2:
    student = earlier[-1]
    for key in ("vocab_size", "per_device_batch_size", "max_target_length", "gradient_accumulation_steps"):
      values = getattr(student, key), getattr(config, key)
      if values[0] != values[1]:
        raise ConfigError(
          f"{key}={values[0]} of the student and {key}={values[1]} of the teacher differ; MaxText reads the teacher's "
          "keys from the model's file and teacher_overrides alone, so write the same there."
        )
  if config.load_parameters_path:  # a student may start from random parameters
    check_start(config)


def _check_steps(config) -> None:
  """Raises ConfigError for a run that has done its steps."""
  folder = config.checkpoint_dir
  is_local = folder and not data_settings.is_remote(folder) and os.path.isdir(folder)
  done = max((int(entry) for entry in os.listdir(folder) if entry.isdigit()), default=0) if is_local else 0
  if done >= config.steps:
    raise ConfigError(f"{folder}: this run has done its steps={config.steps}; set steps higher to continue it.")
