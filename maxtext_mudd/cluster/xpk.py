"""The `xpk workload create` of a request: rehearsed as XPK's own dry run, which needs no network, then submitted."""

import os
import pathlib
import re
import shlex
import subprocess
import tempfile

import yaml

from maxtext_mudd.cluster.request import YOUR_PROJECT, YOUR_ZONE, Request
from maxtext_mudd.config.errors import ConfigError

# Both named, so that a TPU that does not start is an error: left to itself, JAX would train on the CPU.
ENVIRONMENT = {"JAX_PLATFORMS": "tpu,cpu", "PYTHONUNBUFFERED": "1"}


def training_command(request: Request) -> str:
  """What the container runs, quoted for its shell."""
  fixed = [f"run_name={request.workload}", f"base_output_directory={request.output}"]
  return shlex.join(["python3", "MaxText/train.py", request.config, *fixed, *request.overrides])


def arguments(request: Request, manifest: pathlib.Path, dry_run: bool) -> list[str]:
  """Arguments of `xpk`. Those that the request sets come last, where XPK takes the last of two."""
  project = request.project or (YOUR_PROJECT if dry_run else "")
  zone = request.zone or (YOUR_ZONE if dry_run else "")
  return [
    "workload",
    "create",
    *(f"--env={name}={value}" for name, value in ENVIRONMENT.items()),
    *request.xpk_args,
    f"--cluster={request.cluster}",
    f"--workload={request.workload}",
    f"--tpu-type={request.tpu_type}",
    f"--num-slices={request.num_slices}",
    f"--max-restarts={request.max_restarts}",
    f"--docker-image={request.image}",
    f"--command={training_command(request)}",
    *([f"--project={project}"] if project else []),
    *([f"--zone={zone}"] if zone else []),
    f"--output-manifest-file={manifest}",
    "--dry-run" if dry_run else "--no-dry-run",
  ]


def rehearse(xpk: str, request: Request) -> str:
  """The manifest that XPK makes of a request.

  Raises:
    ConfigError: XPK is not there, rejects an argument, or makes a manifest that is not the request's.
  """
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "manifest.yml"
    finished = _run(xpk, arguments(request, file, dry_run=True), capture_output=True, stdin=subprocess.DEVNULL)
    if finished.returncode or not file.is_file():
      raise ConfigError(_reason(request, finished))
    manifest = file.read_text()
  _check_manifest(manifest, request)
  return manifest


def submit(xpk: str, request: Request) -> int:
  """Submits, with XPK's own output and questions on the terminal; XPK's exit status."""
  return _run(xpk, arguments(request, request.manifest, dry_run=False)).returncode


def _run(xpk: str, xpk_arguments: list[str], **options) -> subprocess.CompletedProcess:
  environment = dict(os.environ)
  if "--dry-run" in xpk_arguments:
    environment["TELEMETRY_ENABLED"] = "false"  # XPK would tell its makers of a dry run, too
  try:
    return subprocess.run([xpk, *xpk_arguments], env=environment, text=True, check=False, **options)
  except OSError as error:
    raise ConfigError(f"XPK={xpk} cannot be run ({error.strerror}); make xpk installs it.") from None


def _reason(request: Request, finished: subprocess.CompletedProcess) -> str:
  """XPK's own reason, by the variable that it is about."""
  xpk_args = f"XPK_ARGS={shlex.join(request.xpk_args)}"
  if not finished.returncode:
    return f"{xpk_args} asks XPK for something other than a workload; leave it out."
  refused = re.search(r"^xpk\b.*?: error: (?:argument (\S+): )?(.+)", finished.stderr, re.MULTILINE)
  if not refused:
    last = [*finished.stdout.splitlines(), *finished.stderr.splitlines(), "no output"]
    said = next((line for line in reversed(last[:-1]) if line and "XPK failed" not in line), last[-1])
    return f"xpk ended its dry run with status {finished.returncode}: {said.removeprefix('[XPK] ')}"
  flag, reason = refused.groups()
  variables = {"--tpu-type": f"TPU_TYPE={request.tpu_type}", "--cluster": f"CLUSTER={request.cluster}"}
  about = variables.get(flag, xpk_args)
  closest = re.fullmatch(r"invalid choice: .* \(closest matches: (.*)\)", reason)
  if closest:
    return f"{about} is not one that XPK knows; the closest are {closest.group(1)}."
  return f"XPK rejects {about}: {f'{flag}: ' if flag else ''}{reason}."


def _check_manifest(manifest: str, request: Request) -> None:
  """XPK pastes what it is given into YAML as it is, so look at what came of it."""
  try:
    job = yaml.safe_load(manifest)
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    main = pod["containers"][-1]
    kept = main["image"] == request.image and f"({training_command(request)}) &" in main["command"][-1]
  except (yaml.YAMLError, KeyError, IndexError, TypeError):
    kept = False
  if not kept:
    given = {"ARGS": request.overrides, "XPK_ARGS": request.xpk_args}
    said = " and ".join(f"{name}={shlex.join(words)}" for name, words in given.items() if words)
    raise ConfigError(f"{said or 'The request'} does not come out as it is in XPK's manifest; look for quotes in it.")
