"""Requests to `make xpk`."""

import pytest

from maxtext_mudd.cluster import __main__ as cluster
from maxtext_mudd.cluster import request as requests
from tests.runs import ROOT

XPK = ROOT / ".venv-xpk" / "bin" / "xpk"
SYNTHETIC = str(ROOT / "yaml" / "data" / "synthetic.yml")
VARIABLES = {
  "CONFIG": str(ROOT / "yaml" / "mudd_405m.yml"),
  "CLUSTER": "my-cluster",
  "TPU_TYPE": "v5p-16",
  "NUM_SLICES": "2",
  "WORKLOAD": "mudd-405m",
  "OUTPUT": "gs://my-bucket/runs",
  "DOCKER_IMAGE": "gcr.io/my-project/maxtext-mudd:abc",
  "DRY_RUN": "1",
}
needs_xpk = pytest.mark.skipif(not XPK.is_file(), reason="make .venv-xpk/bin/xpk installs XPK")

# Neither environment is ever remade by a test: `make` would empty .venv first, and in a worktree it may be a link to
# one that others use.
MAKE = ["make", "--old-file=.venv/.ready", "--old-file=.venv-xpk/bin/xpk"]


def arguments(**changes: str) -> list[str]:
  return [f"{name}={value}" for name, value in (VARIABLES | changes).items()]


def request(**changes: str) -> requests.Request:
  return requests.read(arguments(**changes))


def main(xpk_program, capsys, **changes: str) -> str:
  """Runs to the refusal; its sentence."""
  with pytest.raises(SystemExit) as ended:
    cluster.main([f"XPK={xpk_program}", *arguments(**changes)])
  assert ended.value.code == 2
  return capsys.readouterr().err.splitlines()[-1].removeprefix("maxtext-mudd: ")
