"""`python3 -m maxtext_mudd.cluster XPK=.venv-xpk/bin/xpk CONFIG=... CLUSTER=...`: what `make xpk` runs."""

import pathlib
import shlex
import sys

from maxtext_mudd.cluster import request as requests
from maxtext_mudd.cluster import training, xpk
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs.launch import exit_with


def main(arguments: list[str]) -> int:
  """Submits a run, or with DRY_RUN=1 shows what would be submitted; the exit status. What cannot work is refused by one
  sentence and status 2 before anything is written."""
  named = [argument.removeprefix("XPK=") for argument in arguments if argument.startswith("XPK=")]
  program = named[-1] if named else str(requests.ROOT / ".venv-xpk" / "bin" / "xpk")
  try:
    request = requests.read(arguments)
    manifest = xpk.rehearse(program, request)
    mounted = training.check(request)
    _write(request.manifest, manifest)
  except ConfigError as error:
    exit_with(str(error))
  for path in mounted:
    print(f"to be mounted in the container, as docs/cluster.md says: {path}")
  print(shlex.join(["xpk", *xpk.arguments(request, request.manifest, request.dry_run)]))
  print(f"manifest: {request.manifest}", flush=True)
  if not request.dry_run:
    return xpk.submit(program, request)
  try:
    requests.check_image(request.image)
  except ConfigError as error:
    print(f"not to be submitted as it is: {error}", flush=True)
  return 0


def _write(file: pathlib.Path, manifest: str) -> None:
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(manifest)
  except OSError as error:
    raise ConfigError(
      f"MANIFEST={file} cannot be written ({error.strerror}); name a file in a folder of yours."
    ) from None


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
