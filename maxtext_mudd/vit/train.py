"""Trains an image classifier, a Vision Transformer with depth connections, or resumes its run.

    python3 -m maxtext_mudd.vit.train vit/mudd_vit_s16_i1k.yml data_dir=DIR run_name=first [key=value ...]

docs/vit.md tells more; `--help` lists the keys.
"""

from collections.abc import Sequence
import os
import sys
import textwrap

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import library_warnings
from maxtext_mudd.vit import config as vit_config


def main(arguments: Sequence[str]) -> int:
  """Runs the command. Returns the exit status: 2 for a mistake of the user, which ends in one sentence."""
  if any(argument in ("-h", "--help") for argument in arguments):
    print(usage())
    return 0
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would print that PyTorch is missing
  try:
    config = vit_config.read(arguments)
    with library_warnings.hidden():
      from maxtext_mudd.vit import run  # imports JAX

      result = run.train(config)
  except ConfigError as error:
    print(f"maxtext-mudd: {error}", file=sys.stderr)
    return 2
  print(
    f"{config.folder}: eval loss {result['eval_loss']:.4f}, accuracy {100 * result['accuracy']:.2f} % after step "
    f"{result['step']}; {config.folder / 'curve.png'} has the curves"
  )
  return 0


def usage() -> str:
  """What `--help` prints."""
  lines = [__doc__.strip(), "", "Keys, with their defaults:"]
  for name, field in vit_config.VitConfig.model_fields.items():
    if name.startswith("mudd_"):
      continue
    default = getattr(field.default, "value", field.default)
    lines += textwrap.wrap(
      f"{name}={default}  {field.description}", 110, initial_indent="  ", subsequent_indent="      "
    )
  return "\n".join([*lines, "", "and the keys mudd_* of yaml/mudd_base.yml that are keys of connections."])


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
