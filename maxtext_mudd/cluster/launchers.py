"""The programs that can submit a request, and which variable of `make submit` sets each of their flags."""

import dataclasses
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAME_LIMIT = 40  # of XPK, and of clusters' names


@dataclasses.dataclass(frozen=True)
class Launcher:
  """A program that submits requests.

  Attributes:
    name: the value of LAUNCHER. In capitals it is the variable that has the path of the program.
    title: its name in messages.
    make: the make target in messages.
    command: the command that submits.
    program: the default path of the program.
    workload_limit: how many characters a WORKLOAD may have.
    variable_of_flag: the variable that sets a flag of the command.
    pathways: how flags of Pathways begin, and why they do not work.
  """

  name: str
  title: str
  make: str
  command: str
  program: str
  workload_limit: int
  variable_of_flag: dict[str, str]
  pathways: tuple[str, str]

  @property
  def program_variable(self) -> str:
    return self.name.upper()

  @property
  def args_variable(self) -> str:
    return f"{self.name.upper()}_ARGS"


LAUNCHERS = {
  "gcluster": Launcher(
    name="gcluster",
    title="Cluster Toolkit",
    make="make submit",
    command="gcluster job submit",
    program="gcluster",
    workload_limit=28,
    variable_of_flag={  # GCLUSTER_ARGS may have --compute-type: a slice of eight chips has more than one machine type
      **dict.fromkeys(("--command", "-e"), "CONFIG and ARGS"),
      **dict.fromkeys(("--cluster", "-c"), "CLUSTER"),
      **dict.fromkeys(("--name", "-n"), "WORKLOAD"),
      "--topology": "TPU_TYPE",
      "--num-slices": "NUM_SLICES",
      "--num-nodes": "TPU_TYPE",
      "--restarts": "MAX_RESTARTS",
      **dict.fromkeys(("--image", "-i", "--base-image", "-B", "--build-context", "-b"), "DOCKER_IMAGE"),
      **dict.fromkeys(("--project", "-p"), "PROJECT"),
      **dict.fromkeys(("--location", "-l"), "ZONE"),
      **dict.fromkeys(("--dry-run-out", "-o"), "DRY_RUN and MANIFEST"),
    },
    pathways=("--pathways", "MaxText/train.py runs without Pathways here"),
  ),
  "xpk": Launcher(
    name="xpk",
    title="XPK",
    make="make xpk",
    command="xpk workload create",
    program=str(ROOT / ".venv-xpk" / "bin" / "xpk"),
    workload_limit=NAME_LIMIT,
    variable_of_flag={
      "--command": "CONFIG and ARGS",
      "--cluster": "CLUSTER",
      "--workload": "WORKLOAD",
      **dict.fromkeys(("--tpu-type", "--device-type"), "TPU_TYPE"),
      "--num-slices": "NUM_SLICES",
      "--max-restarts": "MAX_RESTARTS",
      **dict.fromkeys(("--docker-image", "--base-docker-image", "--script-dir"), "DOCKER_IMAGE"),
      "--project": "PROJECT",
      "--zone": "ZONE",
      **dict.fromkeys(("--dry-run", "--no-dry-run"), "DRY_RUN"),
      "--output-manifest-file": "MANIFEST",
    },
    # XPK takes abbreviated flags.
    pathways=("--use-pat", "Pathways has a command of its own, which make xpk does not run"),
  ),
}
