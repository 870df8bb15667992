"""What `make xpk` is asked for: its variables, held to the rules of XPK, Kubernetes and Cloud Storage."""

from collections.abc import Sequence
import dataclasses
import difflib
import pathlib
import re
import shlex

from maxtext_mudd.config import slices
from maxtext_mudd.config.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
IN_IMAGE = "yaml"  # what the Dockerfile copies of a checkout that a run could name
NAME_LIMIT = 40
YOUR_PROJECT, YOUR_ZONE = "your-project", "your-zone-a"  # stand in a dry run for what gcloud would tell

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[a-zA-Z0-9._=+-]+)*/?")
_PART = r"[a-z0-9]+([._-]+[a-z0-9]+)*"
_IMAGE = re.compile(rf"{_PART}(:[0-9]+)?(/{_PART})*(:[a-zA-Z0-9_][a-zA-Z0-9_.-]*)?(@sha256:[0-9a-f]{{64}})?")
_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]")
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]*(-[a-z])?")
_TAKEN = {
  "run_name": "WORKLOAD",
  "base_output_directory": "OUTPUT",
  "compile_topology": "TPU_TYPE",
  "compile_topology_num_slices": "NUM_SLICES",
}
_FLAGS = {  # of `xpk workload create`
  "--command": "CONFIG and ARGS",
  "--cluster": "CLUSTER",
  "--workload": "WORKLOAD",
  "--tpu-type": "TPU_TYPE",
  "--device-type": "TPU_TYPE",
  "--num-slices": "NUM_SLICES",
  "--max-restarts": "MAX_RESTARTS",
  "--docker-image": "DOCKER_IMAGE",
  "--base-docker-image": "DOCKER_IMAGE",
  "--script-dir": "DOCKER_IMAGE",
  "--project": "PROJECT",
  "--zone": "ZONE",
  "--dry-run": "DRY_RUN",
  "--no-dry-run": "DRY_RUN",
  "--output-manifest-file": "MANIFEST",
}
_EXAMPLES = {
  "CONFIG": "yaml/mudd_405m.yml",
  "CLUSTER": "my-cluster",
  "TPU_TYPE": "v5p-16",
  "NUM_SLICES": "1",
  "WORKLOAD": "mudd-405m",
  "OUTPUT": "gs://my-bucket/runs",
  "DOCKER_IMAGE": "gcr.io/my-project/maxtext-mudd:1",
}
_NAMES = (*_EXAMPLES, "ARGS", "XPK_ARGS", "MAX_RESTARTS", "PROJECT", "ZONE", "DRY_RUN", "MANIFEST", "XPK")


@dataclasses.dataclass(frozen=True)
class Request:
  """A run on a cluster.

  Attributes:
    config: the model's file, as the container names it.
    cluster, workload, tpu_type, num_slices, max_restarts, image, project, zone: as XPK takes them; an empty project or
      zone is gcloud's.
    output: folder of Cloud Storage, for MaxText's base_output_directory.
    overrides: further arguments of MaxText/train.py.
    xpk_args: further arguments of `xpk workload create`.
    dry_run: whether to stop before the submission.
    manifest: file that gets the manifest.
  """

  config: str
  cluster: str
  workload: str
  tpu_type: str
  num_slices: int
  output: str
  image: str
  max_restarts: int = 0
  project: str = ""
  zone: str = ""
  overrides: tuple[str, ...] = ()
  xpk_args: tuple[str, ...] = ()
  dry_run: bool = False
  manifest: pathlib.Path = pathlib.Path("manifest.yml")


def read(arguments: Sequence[str]) -> Request:
  """Reads NAME=value arguments, which are the variables of `make xpk`.

  Raises:
    ConfigError: a value is missing, or one that XPK, Kubernetes or Cloud Storage would reject.
  """
  for argument in arguments:
    if "=" not in argument:
      raise ConfigError(f"{argument} is not NAME=value, such as WORKLOAD=mudd-405m.")
  given = dict(argument.split("=", 1) for argument in arguments)
  for name in given:
    if name not in _NAMES:
      nearest = difflib.get_close_matches(name.upper(), _NAMES, n=1, cutoff=0.0)[0]
      raise ConfigError(f"{name} is not a variable of make xpk; the nearest is {nearest}.")
  for name, example in _EXAMPLES.items():
    if not given.get(name):
      raise ConfigError(f"{name} is not set; for example: make xpk {name}={example}")
  for name in ("CLUSTER", "WORKLOAD"):
    _check_name(name, given[name])
  if (tpu_type := slices.of_xpk(given["TPU_TYPE"])) != given["TPU_TYPE"]:
    raise ConfigError(f"TPU_TYPE={given['TPU_TYPE']} is MaxText's name for it; write XPK's, {tpu_type}.")
  _check(given, "OUTPUT", _BUCKET, "is not a folder of Cloud Storage; write gs://BUCKET/FOLDER.")
  _check(given, "DOCKER_IMAGE", _IMAGE, "is not an image; write REGISTRY/PROJECT/NAME:TAG, lower case but for TAG.")
  _check(given, "PROJECT", _PROJECT, "is not the id of a Google Cloud project, such as my-project.")
  _check(given, "ZONE", _ZONE, "is not a zone of Google Cloud, such as us-east5-a.")
  dry_run = _switch("DRY_RUN", given.get("DRY_RUN", ""))
  if not dry_run:
    check_image(given["DOCKER_IMAGE"])
  return Request(
    config=in_image("CONFIG", given["CONFIG"]),
    cluster=given["CLUSTER"],
    workload=given["WORKLOAD"],
    tpu_type=given["TPU_TYPE"],
    num_slices=_number("NUM_SLICES", given["NUM_SLICES"], least=1),
    output=given["OUTPUT"].rstrip("/"),
    image=given["DOCKER_IMAGE"],
    max_restarts=_number("MAX_RESTARTS", given.get("MAX_RESTARTS") or "0", least=0),
    project=given.get("PROJECT", ""),
    zone=given.get("ZONE", ""),
    overrides=tuple(map(_override, _words("ARGS", given.get("ARGS", "")))),
    xpk_args=tuple(map(_flag_of_xpk, _words("XPK_ARGS", given.get("XPK_ARGS", "")))),
    dry_run=dry_run,
    manifest=pathlib.Path(given.get("MANIFEST") or f"build/xpk/{given['WORKLOAD']}.yml"),
  )


def in_image(name: str, value: str) -> str:
  """A configuration file by the name that it has in the image.

  Raises:
    ConfigError: it is no file, no YAML by its name, or not in the image.
  """
  path = pathlib.Path(value).resolve()
  if path.suffix != ".yml":
    raise ConfigError(f"{name}={value}: a configuration file must end in .yml.")
  if not path.is_file():
    raise ConfigError(f"{name}={value}: no such configuration file; see {IN_IMAGE}/ for those of this project.")
  if not path.is_relative_to(ROOT / IN_IMAGE):
    raise ConfigError(
      f"{name}={value} is not in {IN_IMAGE}/, and the image holds no other configuration files; put it there."
    )
  return path.relative_to(ROOT).as_posix()


def _check_name(name: str, value: str) -> None:
  """XPK's own rule (its `name_type`), which keeps names of Kubernetes objects and of the pods within their limits."""
  if len(value) > NAME_LIMIT:
    raise ConfigError(f"{name}={value} has {len(value)} characters; XPK takes {NAME_LIMIT} at most.")
  if not _NAME.fullmatch(value):
    raise ConfigError(
      f"{name}={value} is not a name that XPK takes: lower-case letters, digits and hyphens, "
      "with a letter first and no hyphen last."
    )


def _check(given: dict[str, str], name: str, rule: re.Pattern, reason: str) -> None:
  value = given.get(name, "")
  if value and not rule.fullmatch(value):
    raise ConfigError(f"{name}={value} {reason}")


def check_image(image: str) -> None:
  """Refuses the Makefile's own name where there is no image of that name.

  Raises:
    ConfigError.
  """
  if f"/{YOUR_PROJECT}/" in image:
    raise ConfigError(
      "PROJECT is not set and gcloud has none; set it, or name an image: DOCKER_IMAGE=REGISTRY/NAME:TAG"
    )
  if image.endswith("-dirty"):
    raise ConfigError(
      f"DOCKER_IMAGE={image}: this tree has changes that are in no commit, so no image is named after it; commit them "
      "and run make image, or name an image yourself."
    )


def _number(name: str, value: str, least: int) -> int:
  if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < least:
    raise ConfigError(f"{name}={value} is not valid; write a whole number from {least} up.")
  return int(value)


def _switch(name: str, value: str) -> bool:
  if value not in ("", "0", "1"):
    raise ConfigError(f"{name}={value} is not valid; write {name}=1, or leave it out.")
  return value == "1"


def _words(name: str, value: str) -> list[str]:
  """Arguments as a shell would split them, but for what would not reach the container as it is."""
  if not value.isprintable():
    raise ConfigError(f"{name}={value!r} has line breaks or other control characters; write it on one line.")
  if "$" in value:
    raise ConfigError(
      f"{name}={value} has a $, which Kubernetes reads as a variable of its own; write the value itself."
    )
  try:
    return shlex.split(value)
  except ValueError as error:
    raise ConfigError(f"{name}={value} has quotes that do not match ({str(error).lower()}).") from None


def _flag_of_xpk(argument: str) -> str:
  flag = argument.split("=", 1)[0]
  if flag in _FLAGS:
    raise ConfigError(f"XPK_ARGS: {argument} is set by {_FLAGS[flag]}; give it there.")
  if flag.startswith("--use-pat") and "--use-pathways".startswith(flag):  # XPK takes abbreviations
    raise ConfigError(
      f"XPK_ARGS: {argument} does not work with xpk workload create: Pathways has a command of its own, which make xpk "
      "does not run; leave it out."
    )
  return argument


def _override(argument: str) -> str:
  key = argument.split("=", 1)[0]
  if key in _TAKEN:
    raise ConfigError(f"ARGS: {argument} is set by {_TAKEN[key]}; give it there.")
  if "=" in argument:
    return argument
  if not argument.endswith(".yml"):
    raise ConfigError(f"ARGS: {argument} is not key=value, nor a configuration file, which ends in .yml.")
  return in_image("ARGS", argument)
