"""Calls `xpk workload create` for a request.

`command` is the command line. `rehearse` makes XPK's own dry run, which needs no network. `submit` submits the request.
"""

import os
import pathlib
import re
import shlex
import subprocess
import tempfile

import yaml

from maxtext_mudd.cluster.request import ENVIRONMENT, PROJECT_PLACEHOLDER, ZONE_PLACEHOLDER, Request
from maxtext_mudd.config.errors import ConfigError


def arguments(request: Request, manifest: pathlib.Path, dry_run: bool) -> list[str]:
  """The arguments of `xpk`. Those that the request sets come last, because XPK takes the last of two equal flags."""
  project = request.project or (PROJECT_PLACEHOLDER if dry_run else "")
  zone = request.zone or (ZONE_PLACEHOLDER if dry_run else "")
  return [
    "workload",
    "create",
    *(f"--env={name}={value}" for name, value in ENVIRONMENT.items()),
    *request.launcher_args,
    f"--cluster={request.cluster}",
    f"--workload={request.workload}",
    f"--tpu-type={request.tpu_type}",
    f"--num-slices={request.num_slices}",
    f"--max-restarts={request.max_restarts}",
    f"--docker-image={request.image}",
    f"--command={request.training_command}",
    *([f"--project={project}"] if project else []),
    *([f"--zone={zone}"] if zone else []),
    f"--output-manifest-file={manifest}",
    "--dry-run" if dry_run else "--no-dry-run",
  ]


def command(request: Request) -> list[str]:
  """The command that submits a request, or with DRY_RUN=1 writes its manifest only."""
  return ["xpk", *arguments(request, request.manifest, request.dry_run)]


def rehearse(request: Request) -> str:
  """Returns the manifest that XPK generates for a request.

  Raises:
    ConfigError: XPK is not installed, rejects an argument, or generates a manifest that changes the request.
  """
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "manifest.yml"
    finished = _run(request, arguments(request, file, dry_run=True), capture_output=True, stdin=subprocess.DEVNULL)
    if finished.returncode or not file.is_file():
      raise ConfigError(_rejection(request, finished))
    manifest = file.read_text()
  _check_manifest(manifest, request)
  return manifest


def submit(request: Request) -> int:
  """Submits a request. XPK's own output and questions are on the terminal. Returns XPK's exit status."""
  return _run(request, arguments(request, request.manifest, dry_run=False)).returncode


def _run(request: Request, xpk_arguments: list[str], **options) -> subprocess.CompletedProcess:
  environment = dict(os.environ)
  if "--dry-run" in xpk_arguments:
    environment["TELEMETRY_ENABLED"] = "false"  # XPK would report a dry run to its developers, too
  try:
    return subprocess.run([request.program, *xpk_arguments], env=environment, text=True, check=False, **options)
  except OSError as error:
    raise ConfigError(f"XPK={request.program} cannot be run ({error.strerror}); make xpk installs it.") from None


def _rejection(request: Request, finished: subprocess.CompletedProcess) -> str:
  """A sentence with the variable that XPK rejects and XPK's own reason."""
  xpk_args = f"XPK_ARGS={shlex.join(request.launcher_args)}"
  if not finished.returncode:
    return f"{xpk_args} asks XPK for something other than a workload; leave it out."
  error = re.search(r"^xpk\b.*?: error: (?:argument (\S+): )?(.+)", finished.stderr, re.MULTILINE)
  if not error:
    lines = [*finished.stdout.splitlines(), *finished.stderr.splitlines()]
    last_line = next((line for line in reversed(lines) if line and "XPK failed" not in line), "no output")
    return f"xpk ended its dry run with status {finished.returncode}: {last_line.removeprefix('[XPK] ')}"
  flag, reason = error.groups()
  variables = {"--tpu-type": f"TPU_TYPE={request.tpu_type}", "--cluster": f"CLUSTER={request.cluster}"}
  variable = variables.get(flag, xpk_args)
  closest = re.fullmatch(r"invalid choice: .* \(closest matches: (.*)\)", reason)
  if closest:
    return f"{variable} is not one that XPK knows; the closest are {closest.group(1)}."
  return f"XPK rejects {variable}: {f'{flag}: ' if flag else ''}{reason}."


def _check_manifest(manifest: str, request: Request) -> None:
  """Raises ConfigError if the manifest does not run the request's command in its image.

  XPK inserts its arguments into YAML without quoting them, so some characters change the manifest.
  """
  try:
    job = yaml.safe_load(manifest)
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    container = pod["containers"][-1]
    command = container["command"][-1]
    is_unchanged = container["image"] == request.image and f"({request.training_command}) &" in command
  except (yaml.YAMLError, KeyError, IndexError, TypeError):
    is_unchanged = False
  if not is_unchanged:
    raise ConfigError(f"{request.further_arguments} is changed in XPK's manifest; remove quotes from it.")
