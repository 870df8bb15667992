"""Submits a training run to a TPU cluster, or with DRY_RUN=1 only writes its manifest.

    python3 -m maxtext_mudd.cluster LAUNCHER=gcluster CONFIG=yaml/mudd_405m.yml CLUSTER=my-cluster ...

`make submit` and `make xpk` run this command. docs/cluster.md explains its variables.
"""

import pathlib
import shlex
import sys
import types

from maxtext_mudd.cluster import gcluster, training, xpk
from maxtext_mudd.cluster import request as requests
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs.launch import exit_with

_LAUNCHERS = {"gcluster": gcluster, "xpk": xpk}


def main(arguments: list[str]) -> int:
  """Submits a run, or with DRY_RUN=1 prints what would be submitted.

  A request that cannot work ends the process with one sentence and status 2, before anything is written.

  Args:
    arguments: NAME=value arguments: the variables of `make submit`.

  Returns:
    The exit status: the launcher's own after a submission.
  """
  try:
    request = requests.read(arguments)
    launcher = _LAUNCHERS[request.launcher.name]
    paths_to_mount = training.check(request)
    command = launcher.command(request)
    for path in paths_to_mount:
      print(f"mount this path in the container, as docs/cluster.md says: {path}")
    print(shlex.join(command), flush=True)
    _rehearse(launcher, request)
  except ConfigError as error:
    exit_with(str(error))
  if not request.dry_run:
    return launcher.submit(request)
  try:
    requests.check_image(request.image)
  except ConfigError as error:
    print(f"this request would be refused without DRY_RUN=1: {error}", flush=True)
  return 0


def _rehearse(launcher: types.ModuleType, request: requests.Request) -> None:
  """Writes the manifest of a request, and in a dry run prints it. Raises ConfigError."""
  try:
    manifest = launcher.rehearse(request)
  except gcluster.NotInstalledError as error:
    if not request.dry_run:
      raise
    print(f"no manifest: {error}", flush=True)
    return
  _write(request.manifest, manifest)
  if request.dry_run:
    print(manifest.rstrip())
  print(f"manifest: {request.manifest}", flush=True)


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
