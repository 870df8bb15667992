"""Calls `gcluster job submit`, of Google's Cluster Toolkit, for a request.

`command` is the command line. `rehearse` makes gcluster's own dry run, which reads the cluster. `submit` submits the
request.
"""

import math
import pathlib
import re
import shlex
import subprocess
import tempfile

from maxtext.utils import accelerator_to_spec_map
import yaml

from maxtext_mudd.cluster.request import ENVIRONMENT, Request
from maxtext_mudd.config import slices
from maxtext_mudd.config.errors import ConfigError

# For each family of TPUs: the start of its machine types, the dimensions of a topology, and the sizes of slices that
# are one machine. The machines of other slices have four chips.
_MACHINES = {
  "v4": ("ct4p-hightpu", 3, ()),
  "v5litepod": ("ct5lp-hightpu", 2, (1, 8)),
  "v5p": ("ct5p-hightpu", 3, ()),
  "v6e": ("ct6e-standard", 2, (1, 8)),
  "tpu7x": ("tpu7x-standard", 3, ()),
}


class NotInstalledError(ConfigError):
  """gcluster cannot be run. A dry run then has no manifest."""


def hardware(tpu_type: str) -> tuple[str, str]:
  """The machine type and the topology of a slice: "ct5p-hightpu-4t" and "2x2x2" for v5p-16.

  gcluster has short names, too, but the number in them is of cores or of chips, as the family and gcluster's version
  have it. A topology means the same in all versions.

  Args:
    tpu_type: XPK's name of the slice.

  Raises:
    ConfigError: gcluster has no machine type for the slice, or its topology is not known.
  """
  family, _, size = tpu_type.partition("-")
  if family not in _MACHINES:
    raise ConfigError(f"TPU_TYPE={tpu_type}: Cluster Toolkit has machines of {', '.join(_MACHINES)} only.")
  machine, dimensions, whole = _MACHINES[family]
  topology = size if "x" in size else _topology(tpu_type)
  if not re.fullmatch("x".join(["[1-9][0-9]*"] * dimensions), topology):
    example = "x".join("2" * dimensions)
    raise ConfigError(f"TPU_TYPE={tpu_type}: a topology of {family} has {dimensions} sizes, as in {family}-{example}.")
  chips = math.prod(map(int, topology.split("x")))
  chips_of_machine = chips if chips in whole else 4
  if chips % chips_of_machine:
    raise ConfigError(
      f"TPU_TYPE={tpu_type} is not a multiple of {chips_of_machine} chips, which Cluster Toolkit's machines of "
      f"{family} have; write a larger type."
    )
  return f"{machine}-{chips_of_machine}t", topology


def _topology(tpu_type: str) -> str:
  """The topology of a slice whose name has a number. Raises ConfigError if MaxText does not know the slice."""
  known = accelerator_to_spec_map.UserFacingNameToSystemCharacteristics
  name = slices.of_maxtext(tpu_type)
  if name not in known:
    nearest = slices.of_xpk(slices.nearest(tpu_type, known))
    raise ConfigError(
      f"TPU_TYPE={tpu_type} is not one that MaxText knows; write the nearest, {nearest}, or a topology in place of the "
      "number, as in v5p-2x2x2."
    )
  return known[name].topology_name.partition(":")[2]


def arguments(request: Request, dry_run_out: pathlib.Path | None = None) -> list[str]:
  """The arguments of `gcluster`. Those that the request sets come last, because gcluster takes the last of two equal
  flags; only GCLUSTER_ARGS may name another machine type.

  Args:
    dry_run_out: the file to write the manifest to, instead of submitting it.

  Raises:
    ConfigError: gcluster has no machine type for the slice, or its topology is not known.
  """
  machine, topology = hardware(request.tpu_type)
  return [
    "job",
    "submit",
    *(f"--env={name}={value}" for name, value in ENVIRONMENT.items()),
    f"--compute-type={machine}",
    *request.launcher_args,
    f"--topology={topology}",
    f"--cluster={request.cluster}",
    *([f"--project={request.project}"] if request.project else []),
    *([f"--location={request.zone}"] if request.zone else []),
    f"--name={request.workload}",
    f"--num-slices={request.num_slices}",
    f"--restarts={request.max_restarts}",
    f"--image={request.image}",
    f"--command={request.training_command}",
    *([f"--dry-run-out={dry_run_out}"] if dry_run_out else []),
  ]


def command(request: Request) -> list[str]:
  """The command that submits a request. Raises ConfigError as `arguments` does."""
  return ["gcluster", *arguments(request)]


def rehearse(request: Request) -> str:
  """Returns the manifest that gcluster generates for a request. gcluster changes nothing in the cluster.

  Raises:
    NotInstalledError: gcluster cannot be run.
    ConfigError: gcluster rejects the request, cannot read the cluster, or changes the request in the manifest.
  """
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "manifest.yml"
    finished = _run(request, arguments(request, file), capture_output=True, stdin=subprocess.DEVNULL)
    if finished.returncode or not file.is_file():
      raise ConfigError(_rejection(request, finished))
    manifest = file.read_text()
  _check_manifest(manifest, request)
  return manifest


def submit(request: Request) -> int:
  """Submits a request. gcluster's own output and questions are on the terminal. Returns gcluster's exit status."""
  return _run(request, arguments(request)).returncode


def _run(request: Request, gcluster_arguments: list[str], **options) -> subprocess.CompletedProcess:
  try:
    return subprocess.run([request.program, *gcluster_arguments], text=True, check=False, **options)
  except OSError as error:
    raise NotInstalledError(
      f"GCLUSTER={request.program} cannot be run ({error.strerror}); install Cluster Toolkit 1.103.0 or later from "
      "https://github.com/GoogleCloudPlatform/cluster-toolkit/releases, and put gcluster on the PATH or name its path "
      "in GCLUSTER."
    ) from None


def _rejection(request: Request, finished: subprocess.CompletedProcess) -> str:
  """A sentence with gcluster's own reason, and the variable that sets the flag that it asks for."""
  if not finished.returncode:
    return (
      f"GCLUSTER_ARGS={shlex.join(request.launcher_args)} asks gcluster for something other than a job; leave it out."
    )
  lines = [*finished.stdout.splitlines(), *finished.stderr.splitlines()]
  reason = next((line.strip() for line in reversed(lines) if line.strip()), "no output").removeprefix("Error: ")
  flag = re.search(r"using (?:the )?(--[a-z-]+) flag", reason)
  variable = flag and request.launcher.variable_of_flag.get(flag[1], request.launcher.args_variable)
  hint = f" ({variable} sets {flag[1]})" if flag else ""
  return f"gcluster ended its dry run with status {finished.returncode}: {reason.rstrip('.')}{hint}."


def _check_manifest(manifest: str, request: Request) -> None:
  """Raises ConfigError if no job of the manifest runs the request's command in its image."""
  try:
    sets = [x for x in yaml.safe_load_all(manifest) if isinstance(x, dict) and x.get("kind") == "JobSet"]
    pods = [job["template"]["spec"]["template"]["spec"] for x in sets for job in x["spec"]["replicatedJobs"]]
    containers = [x for pod in pods for x in pod["containers"] if x["image"] == request.image]
    is_unchanged = any(request.training_command in (*x.get("command", ()), *x.get("args", ())) for x in containers)
  except (yaml.YAMLError, KeyError, IndexError, TypeError):
    is_unchanged = False
  if not is_unchanged:
    raise ConfigError(f"{request.further_arguments} is changed in gcluster's manifest; leave parts of it out.")
