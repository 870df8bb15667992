"""Converts checkpoints.

    python3 -m maxtext_mudd.convert layout --from runs/a --to runs/b yaml/mudd_tiny.yml scan_layers=true key=value ...

layout: the latest checkpoint of a run, from single layers to scanned ones or back, as the configuration says; the new
run goes on by `run_name=b` with this configuration. Any one machine will do, whatever devices the run is for.
"""

import argparse
import pathlib
import re
import sys

from maxtext_mudd import launch, plugin, versions
from maxtext_mudd.errors import ConfigError


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog="python3 -m maxtext_mudd.convert", description=__doc__.split("\n")[0])
  commands = parser.add_subparsers(dest="command", required=True)
  layout = commands.add_parser("layout", help="between single and scanned layers (scan_layers)")
  layout.add_argument("--from", dest="source", required=True, metavar="RUN", help="folder of the run to convert")
  layout.add_argument("--to", dest="target", required=True, metavar="RUN", help="folder of the new run")
  layout.add_argument("--step", type=int, help="which checkpoint; the latest if not told")
  layout.add_argument("config", metavar="CONFIG.yml")
  layout.add_argument("overrides", nargs="*", metavar="key=value")
  args = parser.parse_args(argv)
  try:
    step = _layout(args)
  except (ConfigError, versions.UnknownMaxText) as error:
    launch.exit_with(str(error))
  print(f"{args.target}: checkpoint of step {step}, to be gone on with by run_name={pathlib.Path(args.target).name}")


def _layout(args) -> int:
  for folder in (args.source, args.target):
    if "://" in folder:
      raise ConfigError(f"{folder} is not a local folder; copy the run first.")
  plugin.install()
  import jax
  from maxtext.configs import pyconfig

  from maxtext_mudd.checkpoints import relayout

  jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as MaxText's trainer does
  source, target = (pathlib.Path(x).absolute() for x in (args.source, args.target))
  fixed = {"run_name": target.name, "base_output_directory": target.parent, "enable_checkpointing": True, **_here()}
  fixed = [f"{key}={x}" for key, x in fixed.items()]
  config = pyconfig.initialize(["", args.config, *args.overrides, *fixed])
  return relayout.convert(config, source, target, args.step)


def _here() -> dict:
  """Keys for the devices of this machine, whatever the run is for: a checkpoint is the same on any mesh."""
  from maxtext.configs.types import MaxTextConfig

  axes = [key for key in MaxTextConfig.model_fields if re.fullmatch(r"(ici|dcn)_\w+_parallelism", key)]
  one = {"skip_jax_distributed_system": True, "num_slices": 1}
  return one | dict.fromkeys(axes, 1) | {"ici_fsdp_parallelism": -1}


if __name__ == "__main__":
  main(sys.argv[1:])
