"""Reads the variables of `make submit` into a `Request`.

`read` checks them by the rules of the launcher, Kubernetes and Cloud Storage. It needs neither a network nor JAX.
"""

from collections.abc import Sequence
import dataclasses
import difflib
import pathlib
import re
import shlex

from maxtext_mudd.cluster.launchers import LAUNCHERS, NAME_LIMIT, ROOT, Launcher
from maxtext_mudd.config import slices
from maxtext_mudd.config.errors import ConfigError

CONFIG_FOLDER = "yaml"  # the only folder of configuration files that the Dockerfile copies into the image
PROJECT_PLACEHOLDER, ZONE_PLACEHOLDER = "your-project", "your-zone-a"  # in a dry run, which does not ask gcloud
# The environment of the container. With these platforms a TPU that does not start is an error. Without them JAX would
# train on the CPU.
ENVIRONMENT = {"JAX_PLATFORMS": "tpu,cpu", "PYTHONUNBUFFERED": "1"}

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
_VARIABLES = (
  *("LAUNCHER", *_REQUIRED, "ARGS", "MAX_RESTARTS", "PROJECT", "ZONE", "DRY_RUN", "MANIFEST"),
  *(name for x in LAUNCHERS.values() for name in (x.program_variable, x.args_variable)),
)


@dataclasses.dataclass(frozen=True)
class Request:
  """A training run on a cluster.

  Attributes:
    launcher: the launcher that submits it.
    program: the path of the launcher's program.
    config: the path of the model's configuration file in the container.
    cluster, workload, tpu_type, num_slices, max_restarts, image, project, zone: values for the flags of the launcher.
      If the project or the zone is empty, the launcher takes it from its own settings.
    output: a folder of Cloud Storage, for MaxText's base_output_directory.
    overrides: further arguments of MaxText/train.py.
    launcher_args: further arguments of the launcher's command.
    dry_run: whether to stop before the submission.
    manifest: the file to write the manifest to.
  """

  launcher: Launcher
  program: str
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
  launcher_args: tuple[str, ...] = ()
  dry_run: bool = False
  manifest: pathlib.Path = pathlib.Path("manifest.yml")

  @property
  def training_command(self) -> str:
    """The command that the container runs, quoted for its shell."""
    run = [f"run_name={self.workload}", f"base_output_directory={self.output}"]
    return shlex.join(["python3", "MaxText/train.py", self.config, *run, *self.overrides])

  @property
  def further_arguments(self) -> str:
    """The variables of free text and their values, for messages."""
    words_by_name = {"ARGS": self.overrides, self.launcher.args_variable: self.launcher_args}
    described = [f"{name}={shlex.join(words)}" for name, words in words_by_name.items() if words]
    return " and ".join(described) or "The request"


def read(arguments: Sequence[str]) -> Request:
  """Reads NAME=value arguments, which are the variables of `make submit`.

  Raises:
    ConfigError: a value is missing, or the launcher, Kubernetes or Cloud Storage would reject it.
  """
  for argument in arguments:
    if "=" not in argument:
      raise ConfigError(f"{argument} is not NAME=value, such as WORKLOAD=mudd-405m.")
  values = dict(argument.split("=", 1) for argument in arguments)
  launcher = _launcher(values.get("LAUNCHER", ""))
  _check_variables(values, launcher)
  dry_run = _switch("DRY_RUN", values.get("DRY_RUN", ""))
  if not dry_run:
    check_image(values["DOCKER_IMAGE"])
  args_variable = launcher.args_variable
  return Request(
    launcher=launcher,
    program=values.get(launcher.program_variable) or launcher.program,
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
    launcher_args=tuple(_launcher_argument(x, launcher) for x in _words(args_variable, values.get(args_variable, ""))),
    dry_run=dry_run,
    manifest=pathlib.Path(values.get("MANIFEST") or f"build/{launcher.name}/{values['WORKLOAD']}.yml"),
  )


def _launcher(name: str) -> Launcher:
  """Returns the launcher of a name. Raises ConfigError for another name."""
  if name not in LAUNCHERS:
    mistake = f"LAUNCHER={name} is not a launcher" if name else "LAUNCHER is not set"
    raise ConfigError(f"{mistake}; write {' or '.join(f'LAUNCHER={x.name} ({x.title})' for x in LAUNCHERS.values())}.")
  return LAUNCHERS[name]


def _check_variables(values: dict[str, str], launcher: Launcher) -> None:
  """Checks the names of all variables, and the values of those that are texts. Raises ConfigError."""
  for name in values:
    if name not in _VARIABLES:
      nearest = difflib.get_close_matches(name.upper(), _VARIABLES, n=1, cutoff=0.0)[0]
      raise ConfigError(f"{name} is not a variable of {launcher.make}; the nearest is {nearest}.")
  for name, example in _REQUIRED.items():
    if not values.get(name):
      raise ConfigError(f"{name} is not set; for example: {launcher.make} {name}={example}")
  for other in LAUNCHERS.values():
    if other is not launcher and (value := values.get(other.args_variable)):
      raise ConfigError(
        f"{other.args_variable}={value} has flags of {other.command}, and LAUNCHER={launcher.name} runs "
        f"{launcher.command}; write its flags in {launcher.args_variable}."
      )
  _check_name("CLUSTER", values["CLUSTER"], launcher, NAME_LIMIT)
  _check_name("WORKLOAD", values["WORKLOAD"], launcher, launcher.workload_limit)
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


def _check_name(name: str, value: str, launcher: Launcher, limit: int) -> None:
  """Checks a name by XPK's own rule (its `name_type`), which keeps the names of Kubernetes objects and pods valid."""
  if len(value) > limit:
    raise ConfigError(f"{name}={value} has {len(value)} characters; {launcher.title} takes {limit} at most.")
  if not _NAME_RULE.fullmatch(value):
    raise ConfigError(
      f"{name}={value} is not a name that {launcher.title} takes: lower-case letters, digits and hyphens, "
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


def _launcher_argument(argument: str, launcher: Launcher) -> str:
  """Returns an argument of XPK_ARGS or GCLUSTER_ARGS. Raises ConfigError for a flag that a variable sets or that cannot
  work."""
  flag = argument.split("=", 1)[0]
  if not flag.startswith("--"):
    flag = flag[:2]  # a short flag, whose value may follow without a space
  if flag in launcher.variable_of_flag:
    raise ConfigError(
      f"{launcher.args_variable}: {argument} is set by {launcher.variable_of_flag[flag]}; set it there."
    )
  pathways, reason = launcher.pathways
  if flag.startswith(pathways):
    raise ConfigError(
      f"{launcher.args_variable}: {argument} does not work with {launcher.command}: {reason}; leave it out."
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
