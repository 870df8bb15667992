"""Reads the variables of `make xpk` into a `Request`.

`read` checks them by the rules of XPK, Kubernetes and Cloud Storage. It needs neither a network nor JAX.
"""

from collections.abc import Sequence
import dataclasses
import difflib
import pathlib
import re
import shlex

from maxtext_mudd.config import slices
from maxtext_mudd.config.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG_FOLDER = "yaml"  # the only folder of configuration files that the Dockerfile copies into the image
NAME_LIMIT = 40
PROJECT_PLACEHOLDER, ZONE_PLACEHOLDER = "your-project", "your-zone-a"  # in a dry run, which does not ask gcloud

_NAME_RULE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_OUTPUT_RULE = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[a-zA-Z0-9._=+-]+)*/?")
_IMAGE_PART = r"[a-z0-9]+([._-]+[a-z0-9]+)*"
_IMAGE_RULE = re.compile(
  rf"{_IMAGE_PART}(:[0-9]+)?(/{_IMAGE_PART})*(:[a-zA-Z0-9_][a-zA-Z0-9_.-]*)?(@sha256:[0-9a-f]{{64}})?"
)
_PROJECT_RULE = re.compile(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]")
_ZONE_RULE = re.compile(r"[a-z]+-[a-z]+[0-9]*(-[a-z])?")
# Keys of MaxText that a variable sets.
_VARIABLE_OF_KEY = {
  "run_name": "WORKLOAD",
  "base_output_directory": "OUTPUT",
  "compile_topology": "TPU_TYPE",
  "compile_topology_num_slices": "NUM_SLICES",
}
# Flags of `xpk workload create` that a variable sets.
_VARIABLE_OF_FLAG = {
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
# The required variables, each with an example.
_REQUIRED = {
  "CONFIG": "yaml/mudd_405m.yml",
  "CLUSTER": "my-cluster",
  "TPU_TYPE": "v5p-16",
  "NUM_SLICES": "1",
  "WORKLOAD": "mudd-405m",
  "OUTPUT": "gs://my-bucket/runs",
  "DOCKER_IMAGE": "gcr.io/my-project/maxtext-mudd:1",
}
_VARIABLES = (*_REQUIRED, "ARGS", "XPK_ARGS", "MAX_RESTARTS", "PROJECT", "ZONE", "DRY_RUN", "MANIFEST", "XPK")


@dataclasses.dataclass(frozen=True)
class Request:
  """A training run on a cluster.

  Attributes:
    config: the path of the model's configuration file in the container.
    cluster, workload, tpu_type, num_slices, max_restarts, image, project, zone: values for the flags of XPK. If the
      project or the zone is empty, XPK takes it from gcloud.
    output: a folder of Cloud Storage, for MaxText's base_output_directory.
    overrides: further arguments of MaxText/train.py.
    xpk_args: further arguments of `xpk workload create`.
    dry_run: whether to stop before the submission.
    manifest: the file to write the manifest to.
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
    ConfigError: a value is missing, or XPK, Kubernetes or Cloud Storage would reject it.
  """
  for argument in arguments:
    if "=" not in argument:
      raise ConfigError(f"{argument} is not NAME=value, such as WORKLOAD=mudd-405m.")
  values = dict(argument.split("=", 1) for argument in arguments)
  _check_variables(values)
  dry_run = _switch("DRY_RUN", values.get("DRY_RUN", ""))
  if not dry_run:
    check_image(values["DOCKER_IMAGE"])
  return Request(
    config=path_in_image("CONFIG", values["CONFIG"]),
    cluster=values["CLUSTER"],
    workload=values["WORKLOAD"],
    tpu_type=values["TPU_TYPE"],
    num_slices=_number("NUM_SLICES", values["NUM_SLICES"], least=1),
    output=values["OUTPUT"].rstrip("/"),
    image=values["DOCKER_IMAGE"],
    max_restarts=_number("MAX_RESTARTS", values.get("MAX_RESTARTS") or "0", least=0),
    project=values.get("PROJECT", ""),
    zone=values.get("ZONE", ""),
    overrides=tuple(map(_override, _words("ARGS", values.get("ARGS", "")))),
    xpk_args=tuple(map(_xpk_argument, _words("XPK_ARGS", values.get("XPK_ARGS", "")))),
    dry_run=dry_run,
    manifest=pathlib.Path(values.get("MANIFEST") or f"build/xpk/{values['WORKLOAD']}.yml"),
  )


def _check_variables(values: dict[str, str]) -> None:
  """Checks the names of all variables, and the values of those that are texts. Raises ConfigError."""
  for name in values:
    if name not in _VARIABLES:
      nearest = difflib.get_close_matches(name.upper(), _VARIABLES, n=1, cutoff=0.0)[0]
      raise ConfigError(f"{name} is not a variable of make xpk; the nearest is {nearest}.")
  for name, example in _REQUIRED.items():
    if not values.get(name):
      raise ConfigError(f"{name} is not set; for example: make xpk {name}={example}")
  for name in ("CLUSTER", "WORKLOAD"):
    _check_name(name, values[name])
  if (tpu_type := slices.of_xpk(values["TPU_TYPE"])) != values["TPU_TYPE"]:
    raise ConfigError(f"TPU_TYPE={values['TPU_TYPE']} is MaxText's name for it; write XPK's, {tpu_type}.")
  for name, rule, reason in (
    ("OUTPUT", _OUTPUT_RULE, "is not a folder of Cloud Storage; write gs://BUCKET/FOLDER."),
    (
      "DOCKER_IMAGE",
      _IMAGE_RULE,
      "is not an image; write REGISTRY/PROJECT/NAME:TAG, in lower case except for TAG.",
    ),
    ("PROJECT", _PROJECT_RULE, "is not the id of a Google Cloud project, such as my-project."),
    ("ZONE", _ZONE_RULE, "is not a zone of Google Cloud, such as us-east5-a."),
  ):
    value = values.get(name, "")
    if value and not rule.fullmatch(value):
      raise ConfigError(f"{name}={value} {reason}")


def path_in_image(name: str, value: str) -> str:
  """The path that a configuration file of this checkout has in the image.

  Args:
    name: the variable that names the file, for errors.
    value: the path of the file here.

  Raises:
    ConfigError: there is no such file, its name does not end in .yml, or the image does not have it.
  """
  path = pathlib.Path(value).resolve()
  if path.suffix != ".yml":
    raise ConfigError(f"{name}={value}: a configuration file must end in .yml.")
  if not path.is_file():
    raise ConfigError(f"{name}={value}: no such configuration file; see {CONFIG_FOLDER}/ for those of this project.")
  if not path.is_relative_to(ROOT / CONFIG_FOLDER):
    raise ConfigError(
      f"{name}={value} is not in {CONFIG_FOLDER}/, and the image holds no other configuration files; put it there."
    )
  return path.relative_to(ROOT).as_posix()


def _check_name(name: str, value: str) -> None:
  """Checks a name by XPK's own rule (its `name_type`), which keeps the names of Kubernetes objects and pods valid."""
  if len(value) > NAME_LIMIT:
    raise ConfigError(f"{name}={value} has {len(value)} characters; XPK takes {NAME_LIMIT} at most.")
  if not _NAME_RULE.fullmatch(value):
    raise ConfigError(
      f"{name}={value} is not a name that XPK takes: lower-case letters, digits and hyphens, "
      "with a letter first and no hyphen last."
    )


def check_image(image: str) -> None:
  """Raises ConfigError for an image name from the Makefile that lacks a project, or whose checkout has changes."""
  if f"/{PROJECT_PLACEHOLDER}/" in image:
    raise ConfigError(
      "PROJECT is not set and gcloud has none; set it, or name an image: DOCKER_IMAGE=REGISTRY/NAME:TAG."
    )
  if image.endswith("-dirty"):
    raise ConfigError(
      f"DOCKER_IMAGE={image}: this checkout has changes that are in no commit, so it has no image; commit them and run "
      "make image, or name another image."
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
  """Splits a value into arguments, as a shell does. Raises ConfigError for text that would not reach the container
  unchanged."""
  if not value.isprintable():
    raise ConfigError(f"{name}={value!r} has line breaks or other control characters; write it on one line.")
  if "$" in value:
    raise ConfigError(
      f"{name}={value} has a $, and Kubernetes would replace the variable after it; write the value of the variable."
    )
  try:
    return shlex.split(value)
  except ValueError as error:
    raise ConfigError(f"{name}={value} has quotes that do not match ({str(error).lower()}).") from None


def _xpk_argument(argument: str) -> str:
  """Returns an argument of XPK_ARGS. Raises ConfigError for a flag that a variable sets or that cannot work."""
  flag = argument.split("=", 1)[0]
  if flag in _VARIABLE_OF_FLAG:
    raise ConfigError(f"XPK_ARGS: {argument} is set by {_VARIABLE_OF_FLAG[flag]}; set it there.")
  if flag.startswith("--use-pat") and "--use-pathways".startswith(flag):  # XPK takes abbreviated flags
    raise ConfigError(
      f"XPK_ARGS: {argument} does not work with xpk workload create: Pathways has a command of its own, which make xpk "
      "does not run; leave it out."
    )
  return argument


def _override(argument: str) -> str:
  """Returns an argument of ARGS, with the path in the image if it is a file. Raises ConfigError."""
  key = argument.split("=", 1)[0]
  if key in _VARIABLE_OF_KEY:
    raise ConfigError(f"ARGS: {argument} is set by {_VARIABLE_OF_KEY[key]}; set it there.")
  if "=" in argument:
    return argument
  if not argument.endswith(".yml"):
    raise ConfigError(f"ARGS: {argument} is not key=value, nor a configuration file, which ends in .yml.")
  return path_in_image("ARGS", argument)
