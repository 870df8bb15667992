"""Converts a model between folders of Hugging Face, the authors' JAX code and MaxText, a run between layer layouts, or
a trained plain model to one with depth connections.

    python3 -m maxtext_mudd.convert from-hf --hf-dir D --maxtext-dir M key=value ...
    python3 -m maxtext_mudd.convert to-hf --maxtext-dir M --hf-dir D [--released]
    python3 -m maxtext_mudd.convert re-export --from D --to NEW
    python3 -m maxtext_mudd.convert from-fork --fork-dir D --maxtext-dir M key=value ...
    python3 -m maxtext_mudd.convert from-run --checkpoint runs/a/checkpoints/999 --maxtext-dir M yaml/mudd_tiny.yml ...
    python3 -m maxtext_mudd.convert to-peft --checkpoint runs/b/checkpoints/9 --peft-dir P yaml/mudd_tiny.yml \
      lora.lora_alpha=16
    python3 -m maxtext_mudd.convert upcycle --checkpoint runs/a/checkpoints/999 --maxtext-dir M yaml/mudd_tiny.yml \
      mudd_ffn_reallocation=false
    python3 -m maxtext_mudd.convert layout --from runs/a --to runs/b yaml/mudd_tiny.yml scan_layers=true \
      mudd_ffn_groups=2

from-hf    reads a Hugging Face folder of MUDDFormer or MUDDPythia, or one that to-hf wrote. It writes a checkpoint of
           the parameters, M/items, and the configuration that describes it, M/model.yml.
to-hf      writes such a folder M as a Hugging Face folder, with the code that transformers needs to load it.
re-export  reads what from-hf reads, such as a published folder, and writes what to-hf writes.
from-fork  reads a model of the authors' JAX code, which is a fork of MaxText: params.safetensors, whose names are flax
           paths, or an Orbax folder. It writes the same files as from-hf.
from-run   reads a checkpoint of a training run, with the configuration that the run was started with. It writes the
           same files as from-hf, so that to-hf can read them. It merges an adapter (LoRA) into its model, which
           load_parameters_path names.
to-peft    writes such an adapter as a folder that PEFT loads onto the model that to-hf wrote.
upcycle    puts depth connections into a trained model of stock MaxText, without changing its logits. It reads a
           checkpoint of a training run or a folder of parameters, and a configuration of the new model. With
           --maxtext-dir it writes the same files as from-hf. With --run it writes a run, which keeps the optimizer's
           moments, the step and the position in the data; training with run_name=RUN resumes it.
layout     copies the latest checkpoint of a run to a new run with another layout of layers: single, scanned, or in the
           stages of a pipeline, as the configuration says. Training with run_name=b and this configuration resumes the
           new run.

Every command works on any machine, whatever devices the run is for.
"""

import argparse
from collections.abc import Callable, Mapping
import functools
import math
import pathlib
import sys

from maxtext_mudd import plugin
from maxtext_mudd.checkpoints.interrupts import Interrupts
from maxtext_mudd.config import files as config_files
from maxtext_mudd.config import versions
from maxtext_mudd.config.errors import ConfigError, reachable
from maxtext_mudd.connections.keys import raise_first
from maxtext_mudd.runs import early_check, launch

# The options that name a folder, by the attribute of the parsed arguments.
_FOLDER_OPTIONS = {
  "source": "--from",
  "target": "--to",
  "hf_dir": "--hf-dir",
  "fork_dir": "--fork-dir",
  "checkpoint": "--checkpoint",
  "maxtext_dir": "--maxtext-dir",
  "peft_dir": "--peft-dir",
  "run": "--run",
}


# MaxText 0.2.5 takes the parameters in a folder of one of these names for a tree of another form, and finds none.
_RESERVED_NAMES = ("model", "model_params")


def main(argv: list[str]) -> None:
  """Runs the command. Mistakes of the user end the process with one sentence and status 2."""
  args = _parser().parse_args(argv)
  interrupts, is_installed = Interrupts(), False

  def refuse(error):
    interrupts.check()  # a library may have raised this error because of the interrupt
    launch.exit_with(str(error))

  try:
    with interrupts, reachable():  # `interrupts` also handles SIGTERM, so that no incomplete file stays
      _check_folders(args)
      _check_keys(args)
      plugin.install(plugin.Reading(on_error=refuse))  # exits before MaxText prints the error in a banner
      is_installed = True
      print(args.convert(args))
  except (ConfigError, versions.UnknownMaxText) as error:
    launch.exit_with(str(error))
  except KeyboardInterrupt:
    launch.exit_with("interrupted; nothing was written.")
  finally:
    if is_installed:  # otherwise an import may have been interrupted, and repeating it would fail
      plugin.install(plugin.Reading())


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python3 -m maxtext_mudd.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(dest="command", required=True)
  from_hf = commands.add_parser("from-hf", help="from a Hugging Face folder")
  from_hf.add_argument("--hf-dir", required=True, metavar="D", help="folder with config.json and .safetensors files")
  from_hf.add_argument("--maxtext-dir", required=True, metavar="M", help="folder to create")
  from_hf.add_argument("overrides", nargs="*", metavar="key=value", help="MaxText's keys, such as scan_layers=true")
  from_hf.set_defaults(convert=_from_hf)
  to_hf = commands.add_parser("to-hf", help="to a Hugging Face folder")
  to_hf.add_argument("--maxtext-dir", required=True, metavar="M", help="folder that from-hf or from-run created")
  to_hf.add_argument("--hf-dir", required=True, metavar="D", help="folder to create")
  to_hf.add_argument("--released", action="store_true", help="in the format of the authors' PyTorch code")
  to_hf.set_defaults(convert=_to_hf)
  re_export = commands.add_parser("re-export", help="from a Hugging Face folder to one with this project's code")
  re_export.add_argument("--from", dest="source", required=True, metavar="D", help="folder that from-hf reads")
  re_export.add_argument("--to", dest="target", required=True, metavar="NEW", help="folder to create")
  re_export.set_defaults(convert=_re_export)
  from_fork = commands.add_parser("from-fork", help="from a folder of the authors' JAX code")
  from_fork.add_argument(
    "--fork-dir", required=True, metavar="D", help="folder with params.safetensors or an Orbax tree"
  )
  from_fork.add_argument("--maxtext-dir", required=True, metavar="M", help="folder to create")
  from_fork.add_argument("overrides", nargs="*", metavar="key=value", help="MaxText's keys, such as scan_layers=true")
  from_fork.set_defaults(convert=_from_fork)
  from_run = commands.add_parser("from-run", help="from a checkpoint of a training run")
  from_run.add_argument("--checkpoint", required=True, metavar="C", help="OUTPUT/RUN/checkpoints/STEP")
  from_run.add_argument("--maxtext-dir", required=True, metavar="M", help="folder to create")
  from_run.add_argument("config", metavar="CONFIG.yml", help="the configuration that the run was started with")
  from_run.add_argument("overrides", nargs="*", metavar="key=value")
  from_run.set_defaults(convert=_from_run)
  to_peft = commands.add_parser("to-peft", help="from a checkpoint of an adapter (LoRA) to a folder of PEFT")
  to_peft.add_argument("--checkpoint", required=True, metavar="C", help="OUTPUT/RUN/checkpoints/STEP")
  to_peft.add_argument("--peft-dir", required=True, metavar="P", help="folder to create")
  to_peft.add_argument("--hf-dir", metavar="D", help="folder of the model that to-hf created, which PEFT will load")
  to_peft.add_argument("config", metavar="CONFIG.yml", help="the configuration that the run was started with")
  to_peft.add_argument("overrides", nargs="*", metavar="key=value", help="lora.lora_alpha=... and others of the run")
  to_peft.set_defaults(convert=_to_peft)
  upcycle = commands.add_parser("upcycle", help="from a plain model to one with depth connections")
  upcycle.add_argument(
    "--checkpoint", required=True, metavar="C", help="OUTPUT/RUN/checkpoints/STEP, or a folder of parameters"
  )
  target = upcycle.add_mutually_exclusive_group(required=True)
  target.add_argument("--maxtext-dir", metavar="M", help="folder to create, with the parameters")
  target.add_argument("--run", metavar="RUN", help="folder of a run to create, with the optimizer's moments, too")
  upcycle.add_argument("config", metavar="CONFIG.yml", help="the configuration of the new model")
  upcycle.add_argument("overrides", nargs="*", metavar="key=value")
  upcycle.set_defaults(convert=_upcycle)
  layout = commands.add_parser("layout", help="between layouts of layers: single, scanned, of pipelines")
  layout.add_argument("--from", dest="source", required=True, metavar="RUN", help="folder of the run to convert")
  layout.add_argument("--to", dest="target", required=True, metavar="RUN", help="folder of the new run")
  layout.add_argument("--step", type=int, help="the checkpoint to convert; default: the latest")
  layout.add_argument("config", metavar="CONFIG.yml")
  layout.add_argument("overrides", nargs="*", metavar="key=value")
  layout.set_defaults(convert=_layout)
  return parser


def _check_folders(args: argparse.Namespace) -> None:
  """Raises ConfigError for folders that are empty names or not local, and for a target that MaxText could not load."""
  for attribute, option in _FOLDER_OPTIONS.items():
    folder = getattr(args, attribute, None)
    if folder == "":
      raise ConfigError(f"{option} '' names no folder; name one.")
    if folder and "://" in folder:
      raise ConfigError(f"{folder} is not a local folder; copy it first.")
  if args.command != "to-hf" and getattr(args, "maxtext_dir", None):
    name = pathlib.Path(args.maxtext_dir).absolute().name
    if name in _RESERVED_NAMES:
      raise ConfigError(
        f"--maxtext-dir {args.maxtext_dir}: MaxText cannot load parameters from a folder that is called {name}; choose "
        "another name."
      )


def _check_keys(args: argparse.Namespace) -> None:
  """Checks configuration files and keys before MaxText is imported. Raises ConfigError."""
  overrides = getattr(args, "overrides", [])
  if args.command != "layout":  # `layout` takes further configuration files among its overrides
    early_check.check_keys(launch.read_overrides(overrides))
  if hasattr(args, "config"):
    early_check.check(["", args.config, *overrides])


# Each of the following functions runs one command, and returns the line that is printed at its end.


def _from_hf(args: argparse.Namespace) -> str:
  from maxtext_mudd.checkpoints import source_check
  from maxtext_mudd.checkpoints.hugging_face import models

  source_check.check(pathlib.Path(args.hf_dir), "from-hf")
  return _to_maxtext(models.from_hf, args.hf_dir, args)


def _from_fork(args: argparse.Namespace) -> str:
  from maxtext_mudd.checkpoints import source_check
  from maxtext_mudd.checkpoints.authors_jax import models

  source_check.check(pathlib.Path(args.fork_dir), "from-fork")
  return _to_maxtext(models.from_fork, args.fork_dir, args)


def _from_run(args: argparse.Namespace) -> str:
  from maxtext_mudd.checkpoints import run, source_check

  source_check.check(pathlib.Path(args.checkpoint), "from-run")
  return _to_maxtext(functools.partial(run.from_run, config_file=args.config), args.checkpoint, args)


def _to_peft(args: argparse.Namespace) -> str:
  from maxtext.configs import pyconfig

  from maxtext_mudd.checkpoints import adapters, model_config, source_check

  source_check.check(pathlib.Path(args.checkpoint), "from-run")
  target, keys = pathlib.Path(args.peft_dir).absolute(), launch.read_overrides(args.overrides)
  config = pyconfig.initialize(["", args.config], **{**keys, **model_config.local_keys()})
  adapters.to_peft(pathlib.Path(args.checkpoint).absolute(), target, config, args.hf_dir or "")
  return f"{target}: loads with peft.PeftModel.from_pretrained, onto the model that to-hf made"


def _to_maxtext(convert: Callable, source: str, args: argparse.Namespace) -> str:
  from maxtext_mudd.checkpoints import model_folder

  target = pathlib.Path(args.maxtext_dir).absolute()
  convert(pathlib.Path(source).absolute(), target, overrides=launch.read_overrides(args.overrides))
  path = target / model_folder.ITEMS
  if model_folder.is_model_folder(target):
    return f"{target}: {model_folder.CONFIG} describes the model, load_parameters_path={path} has its parameters"
  return f"{target}: load_parameters_path={path} has the parameters; set it beside the keys of this command"


def _to_hf(args: argparse.Namespace) -> str:
  from maxtext_mudd.checkpoints.hugging_face import models

  target = pathlib.Path(args.hf_dir).absolute()
  models.to_hf(pathlib.Path(args.maxtext_dir).absolute(), target, args.released)
  if any(target.glob("*.py")):
    return _loads(target)
  return f"{_loads(target)}, once the authors' configuration_*.py and modeling_*.py are copied there"


def _re_export(args: argparse.Namespace) -> str:
  from maxtext_mudd.checkpoints import source_check
  from maxtext_mudd.checkpoints.hugging_face import models

  source, target = pathlib.Path(args.source).absolute(), pathlib.Path(args.target).absolute()
  source_check.check(source, "from-hf")
  models.re_export(source, target)
  return _loads(target)


def _loads(target: pathlib.Path) -> str:
  return f"{target}: loads with trust_remote_code"


def _upcycle(args: argparse.Namespace) -> str:
  from maxtext_mudd.checkpoints import source_check, upcycle

  source_check.check(pathlib.Path(args.checkpoint), "upcycle")
  if (stages := _stages(config_files.values(["", args.config, *args.overrides]))) > 1:
    raise ConfigError(
      f"a pipeline of {stages} stages: upcycle writes single or scanned layers; leave its keys out, and move the new "
      "run by maxtext_mudd.convert layout."
    )
  if args.run is None:
    return _to_maxtext(functools.partial(upcycle.to_model_folder, config_file=args.config), args.checkpoint, args)
  target = pathlib.Path(args.run).absolute()
  config = _run_config(args, target)
  return _resumes(target, upcycle.to_run(pathlib.Path(args.checkpoint).absolute(), target, config))


def _layout(args: argparse.Namespace) -> str:
  from maxtext_mudd.checkpoints import train_state

  source, target = pathlib.Path(args.source).absolute(), pathlib.Path(args.target).absolute()
  config = _with_pipeline(_run_config(args, target), args)
  return _resumes(target, train_state.convert(config, source, target, args.step))


def _stages(given: Mapping) -> int:
  """The number of stages of a pipeline that keys ask for. Raises ConfigError for what is no number."""
  parallelism = {key: given.get(key, 1) for key in ("ici_pipeline_parallelism", "dcn_pipeline_parallelism")}
  for key, number in parallelism.items():
    if not isinstance(number, int) or number < 1:
      raise ConfigError(f"{key}={number} is not a number of stages; set it to one, or to 1 for no pipeline.")
  return math.prod(parallelism.values())


def _with_pipeline(config, args: argparse.Namespace):
  """The configuration with the pipeline that the arguments ask for, which needs no devices here.

  Raises:
    ConfigError: the model does not work with such a pipeline.
  """
  from maxtext_mudd.checkpoints import layout
  from maxtext_mudd.config import depth_connection

  given = config_files.values(["", args.config, *args.overrides])
  stages = _stages(given)
  if stages == 1:
    return config
  layers, length = config.num_decoder_layers, given.get("num_layers_per_pipeline_stage", 1)
  if layers != stages * length:
    fits = f"set it to {layers // stages}" if layers % stages == 0 else f"use a divisor of {layers} as number of stages"
    raise ConfigError(
      f"num_layers_per_pipeline_stage={length}: {stages} stages have {stages * length} layers, not {layers}; {fits}."
    )
  config = layout.with_stages(config, stages, scans=bool(given.get("scan_layers_per_stage", False)))
  try:
    raise_first(depth_connection.of_pipeline(config))
  except ValueError as error:
    raise ConfigError(str(error)) from None
  return config


def _run_config(args: argparse.Namespace, target: pathlib.Path):
  """The configuration of the new run `target`."""
  import jax
  from maxtext.configs import pyconfig

  from maxtext_mudd.checkpoints import model_config

  jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as MaxText's trainer does
  new_run = {"run_name": target.name, "base_output_directory": target.parent, "enable_checkpointing": True}
  keys = model_config.local_keys() | {"log_config": True} | new_run
  return pyconfig.initialize(["", args.config, *args.overrides, *(f"{key}={value}" for key, value in keys.items())])


def _resumes(target: pathlib.Path, step: int) -> str:
  return f"{target}: checkpoint of step {step}; run_name={target.name} resumes from it"


if __name__ == "__main__":
  main(sys.argv[1:])
