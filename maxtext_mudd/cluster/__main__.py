"""Submits a training run to a TPU cluster, or with DRY_RUN=1 only writes its manifest.

    python3 -m maxtext_mudd.cluster XPK=.venv-xpk/bin/xpk CONFIG=yaml/mudd_405m.yml CLUSTER=my-cluster ...

`make xpk` runs this command. docs/cluster.md explains its variables.
"""

import pathlib
import shlex
import sys

from maxtext_mudd.cluster import request as requests
from maxtext_mudd.cluster import training, xpk
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs.launch import exit_with


def main(arguments: list[str]) -> int:
  """Submits a run, or with DRY_RUN=1 prints what would be submitted.

  A request that cannot work ends the process with one sentence and status 2, before anything is written.

  Args:
    arguments: NAME=value arguments: the variables of `make xpk`, and XPK, the path of XPK's program.

  Returns:
    The exit status: XPK's own after a submission.
  """
  programs = [argument.removeprefix("XPK=") for argument in arguments if argument.startswith("XPK=")]
  program = programs[-1] if programs else str(requests.ROOT / ".venv-xpk" / "bin" / "xpk")
  try:
    request = requests.read(arguments)
    manifest = xpk.rehearse(program, request)
    paths_to_mount = training.check(request)
    _write(request.manifest, manifest)
  except ConfigError as error:
    exit_with(str(error))
  for path in paths_to_mount:
    print(f"mount this path in the container, as docs/cluster.md says: {path}")
  print(shlex.join(["xpk", *xpk.arguments(request, request.manifest, request.dry_run)]))
  print(f"manifest: {request.manifest}", flush=True)
  if not request.dry_run:
    return xpk.submit(program, request)
  try:
    requests.check_image(request.image)
  except ConfigError as error:
    print(f"this request would be refused without DRY_RUN=1: {error}", flush=True)
  return 0


def _write(file: pathlib.Path, manifest: str) -> None:
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(manifest)
  except OSError as error:
    raise ConfigError(
      f"MANIFEST={file} cannot be written ({error.strerror}); name a file in a folder that you can write to."
    ) from None


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
