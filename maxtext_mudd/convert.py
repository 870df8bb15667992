"""Converts checkpoints.

    python3 -m maxtext_mudd.convert from-hf --hf-dir D --maxtext-dir M key=value ...
    python3 -m maxtext_mudd.convert to-hf --maxtext-dir M --hf-dir D
    python3 -m maxtext_mudd.convert from-fork --fork-dir D --maxtext-dir M key=value ...
    python3 -m maxtext_mudd.convert from-run --checkpoint runs/a/checkpoints/999 --maxtext-dir M yaml/mudd_tiny.yml ...
    python3 -m maxtext_mudd.convert layout --from runs/a --to runs/b yaml/mudd_tiny.yml scan_layers=true key=value ...

from-hf: a Hugging Face folder of MUDDFormer or MUDDPythia into a folder with a checkpoint of parameters, M/items, and
the YAML that describes it, M/model.yml. to-hf: the way back. from-fork: the same of a model of the authors' JAX code:
params.safetensors with flax paths for names, or an Orbax folder. from-run: the same of a checkpoint of a training run,
with the configuration that it was started with; to-hf takes it from there.
layout: the latest checkpoint of a run, from single layers to scanned ones or back, as the configuration says; the new
run goes on by `run_name=b` with this configuration. Any one machine will do, whatever devices the run is for.
"""

import argparse
import functools
import pathlib
import sys

from maxtext_mudd import plugin, versions
from maxtext_mudd.config.errors import ConfigError, reachable
from maxtext_mudd.interrupts import Interrupts
from maxtext_mudd.runs import early, launch

_FOLDERS = {
  "source": "--from",
  "target": "--to",
  "hf_dir": "--hf-dir",
  "fork_dir": "--fork-dir",
  "checkpoint": "--checkpoint",
  "maxtext_dir": "--maxtext-dir",
}


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python3 -m maxtext_mudd.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(dest="command", required=True)
  from_hf = commands.add_parser("from-hf", help="from a Hugging Face folder")
  from_hf.add_argument("--hf-dir", required=True, metavar="D", help="folder with config.json and .safetensors files")
  from_hf.add_argument("--maxtext-dir", required=True, metavar="M", help="folder to make")
  from_hf.add_argument("overrides", nargs="*", metavar="key=value", help="as scan_layers=true")
  from_hf.set_defaults(run=_from_hf)
  to_hf = commands.add_parser("to-hf", help="to a Hugging Face folder")
  to_hf.add_argument("--maxtext-dir", required=True, metavar="M", help="folder that from-hf or from-run made")
  to_hf.add_argument("--hf-dir", required=True, metavar="D", help="folder to make")
  to_hf.set_defaults(run=_to_hf)
  from_fork = commands.add_parser("from-fork", help="from a folder of the authors' JAX code")
  from_fork.add_argument(
    "--fork-dir", required=True, metavar="D", help="folder with params.safetensors or an Orbax tree"
  )
  from_fork.add_argument("--maxtext-dir", required=True, metavar="M", help="folder to make")
  from_fork.add_argument("overrides", nargs="*", metavar="key=value", help="as scan_layers=true")
  from_fork.set_defaults(run=_from_fork)
  from_run = commands.add_parser("from-run", help="from a checkpoint of a training run")
  from_run.add_argument("--checkpoint", required=True, metavar="C", help="OUTPUT/RUN/checkpoints/STEP")
  from_run.add_argument("--maxtext-dir", required=True, metavar="M", help="folder to make")
  from_run.add_argument("config", metavar="CONFIG.yml", help="what the run was started with")
  from_run.add_argument("overrides", nargs="*", metavar="key=value")
  from_run.set_defaults(run=_from_run)
  layout = commands.add_parser("layout", help="between single and scanned layers (scan_layers)")
  layout.add_argument("--from", dest="source", required=True, metavar="RUN", help="folder of the run to convert")
  layout.add_argument("--to", dest="target", required=True, metavar="RUN", help="folder of the new run")
  layout.add_argument("--step", type=int, help="which checkpoint; the latest if not told")
  layout.add_argument("config", metavar="CONFIG.yml")
  layout.add_argument("overrides", nargs="*", metavar="key=value")
  layout.set_defaults(run=_layout)
  args = parser.parse_args(argv)
  interrupts, installed = Interrupts(), False

  def refuse(error):
    interrupts.check()  # which libraries make other errors of
    launch.exit_with(str(error))

  try:
    with interrupts, reachable():  # interrupts: SIGTERM, too, so that nothing half-made is left
      _check_folders(args)
      _check_keys(args)
      plugin.install(plugin.Reading(on_error=refuse))  # before MaxText says it in a banner of its own
      installed = True
      print(args.run(args))
  except (ConfigError, versions.UnknownMaxText) as error:
    launch.exit_with(str(error))
  except KeyboardInterrupt:
    launch.exit_with("interrupted; nothing was made.")
  finally:
    if installed:  # what was interrupted while it was imported cannot be imported again
      plugin.install(plugin.Reading())


def _check_folders(args) -> None:
  for name, option in _FOLDERS.items():
    folder = getattr(args, name, None)
    if folder == "":
      raise ConfigError(f"{option} '' names no folder; name one.")
    if folder and "://" in folder:
      raise ConfigError(f"{folder} is not a local folder; copy it first.")


def _check_keys(args) -> None:
  """Before MaxText is imported. Raises ConfigError."""
  overrides = getattr(args, "overrides", [])
  if args.command != "layout":  # which takes further files, too
    early.check_keys(launch.keys(overrides))
  if hasattr(args, "config"):
    early.check(["", args.config, *overrides])


def _from_hf(args) -> str:
  from maxtext_mudd.checkpoints import source_check
  from maxtext_mudd.checkpoints.hugging_face import models as hf

  source_check.check(pathlib.Path(args.hf_dir), "from-hf")
  return _imported(hf.from_hf, args.hf_dir, args)


def _from_fork(args) -> str:
  from maxtext_mudd.checkpoints import source_check
  from maxtext_mudd.checkpoints.authors_jax import models as fork

  source_check.check(pathlib.Path(args.fork_dir), "from-fork")
  return _imported(fork.from_fork, args.fork_dir, args)


def _imported(convert, source: str, args) -> str:
  from maxtext_mudd.checkpoints import model_folder

  target = pathlib.Path(args.maxtext_dir).absolute()
  convert(pathlib.Path(source).absolute(), target, overrides=launch.keys(args.overrides))
  path = target / model_folder.ITEMS
  return f"{target}: {model_folder.CONFIG} describes the model, load_parameters_path={path} has its parameters"


def _from_run(args) -> str:
  from maxtext_mudd.checkpoints import run, source_check

  source_check.check(pathlib.Path(args.checkpoint), "from-run")
  return _imported(functools.partial(run.from_run, config_file=args.config), args.checkpoint, args)


def _to_hf(args) -> str:
  from maxtext_mudd.checkpoints.hugging_face import models as hf

  target = pathlib.Path(args.hf_dir).absolute()
  hf.to_hf(pathlib.Path(args.maxtext_dir).absolute(), target)
  once = "" if any(target.glob("*.py")) else ", once the authors' configuration_*.py and modeling_*.py are copied there"
  return f"{target}: loads with trust_remote_code{once}"


def _layout(args) -> str:
  import jax
  from maxtext.configs import pyconfig

  from maxtext_mudd.checkpoints import model_config
  from maxtext_mudd.checkpoints import train_state as relayout

  jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as MaxText's trainer does
  source, target = (pathlib.Path(x).absolute() for x in (args.source, args.target))
  named = {"run_name": target.name, "base_output_directory": target.parent, "enable_checkpointing": True}
  fixed = model_config.local_keys() | {"log_config": True} | named
  fixed = [f"{key}={x}" for key, x in fixed.items()]
  config = pyconfig.initialize(["", args.config, *args.overrides, *fixed])
  step = relayout.convert(config, source, target, args.step)
  return f"{target}: checkpoint of step {step}, to be gone on with by run_name={target.name}"


if __name__ == "__main__":
  main(sys.argv[1:])
