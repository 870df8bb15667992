"""Requests to `make submit`, and programs that stand for the launchers."""

import json
import os
import pathlib
import shlex
import sys

import pytest
import yaml

from maxtext_mudd.cluster import __main__ as cluster
from maxtext_mudd.cluster import request as requests
from tests.runs import ROOT

XPK = ROOT / ".venv-xpk" / "bin" / "xpk"
SYNTHETIC = str(ROOT / "yaml" / "data" / "synthetic.yml")
VARIABLES = {
  "LAUNCHER": "xpk",
  "CONFIG": str(ROOT / "yaml" / "mudd_405m.yml"),
  "CLUSTER": "my-cluster",
  "TPU_TYPE": "v5p-16",
  "NUM_SLICES": "2",
  "WORKLOAD": "mudd-405m",
  "OUTPUT": "gs://my-bucket/runs",
  "DOCKER_IMAGE": "gcr.io/my-project/maxtext-mudd:abc",
  "DRY_RUN": "1",
}
DOCUMENTED = yaml.safe_load((ROOT / "tests" / "data" / "gcluster" / "job_submit.yml").read_text())
GCLUSTER_FLAGS = {f"--{name}" for source in DOCUMENTED["flags"] for name in source["names"]}
needs_xpk = pytest.mark.skipif(not XPK.is_file(), reason="make .venv-xpk/bin/xpk installs XPK")

# Neither environment is ever remade by a test: `make` would empty .venv first, and in a worktree it may be a link to
# one that others use.
MAKE = ["make", "--old-file=.venv/.ready", "--old-file=.venv-xpk/bin/xpk"]


def arguments(**changes: str) -> list[str]:
  return [f"{name}={value}" for name, value in (VARIABLES | changes).items()]


def request(**changes: str) -> requests.Request:
  return requests.read(arguments(**changes))


def main(program, capsys, **changes: str) -> str:
  """Runs to the refusal; its sentence.

  Args:
    program: the path of the launcher's program.
  """
  with pytest.raises(SystemExit) as ended:
    cluster.main([f"XPK={program}", f"GCLUSTER={program}", *arguments(**changes)])
  assert ended.value.code == 2
  return capsys.readouterr().err.splitlines()[-1].removeprefix("maxtext-mudd: ")


def without_make() -> dict[str, str]:
  return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def documented(start: str) -> list[list[str]]:
  """The command lines of the page that begin so, without that."""
  text = (ROOT / "docs" / "cluster.md").read_text()
  return [shlex.split(line)[len(start.split()) :] for line in text.splitlines() if line.startswith(f"    {start} ")]


def recorder(folder: pathlib.Path) -> pathlib.Path:
  """Stands for xpk where a submission would reach out: notes its arguments, and makes the manifest of a dry run."""
  return _program(
    folder / "recorder",
    f"log = {str(folder / 'told.jsonl')!r}\n"
    "open(log, 'a').write(json.dumps([sys.argv[1:], os.environ.get('TELEMETRY_ENABLED')]) + '\\n')\n"
    "flags = dict(word.split('=', 1) for word in sys.argv if word.startswith('--') and '=' in word)\n"
    "container = {'image': flags['--docker-image'], 'command': ['(' + flags['--command'] + ') & PID=$!;']}\n"
    "manifest = {'spec': {'replicatedJobs': [{'template': {'spec': {'template': {'spec': {'containers':\n"
    "  [container]}}}}}]}}\n"
    "open(flags['--output-manifest-file'], 'w').write(json.dumps(manifest))\n"
    "sys.exit(0 if '--dry-run' in sys.argv else 7)\n",
  )


def gcluster_recorder(folder: pathlib.Path, error: str = "", image: str = "") -> pathlib.Path:
  """Stands for gcluster: notes its arguments, takes the documented flags, and makes the manifest of a dry run.

  Args:
    error: the error that ends it.
    image: the image of the manifest. The default is that of the arguments.
  """
  known = [*sorted(GCLUSTER_FLAGS), "job", "submit"]
  return _program(
    folder / "gcluster",
    f"log, known, error, image = {(str(folder / 'told.jsonl'), known, error, image)!r}\n"
    "open(log, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    "flags = {word.partition('=')[0]: word.partition('=')[2] for word in sys.argv[1:]}\n"
    "unknown = [name for name in flags if name not in known]\n"
    "if error or unknown:\n"
    "  sys.exit('reading the cluster\\nError: ' + (error or 'unknown flag: ' + unknown[0]))\n"
    "if '--dry-run-out' not in flags:\n"
    "  sys.exit(7)\n"
    "command = ['/bin/bash', '-c', flags['--command']]\n"
    "pod = {'template': {'spec': {'containers': [{'image': image or flags['--image'], 'command': command}]}}}\n"
    "job = {'kind': 'JobSet', 'spec': {'replicatedJobs': [{'template': {'spec': pod}}]}}\n"
    "claim = {'kind': 'PersistentVolumeClaim'}\n"
    "open(flags['--dry-run-out'], 'w').write(json.dumps(claim) + '\\n---\\n' + json.dumps(job) + '\\n')\n",
  )


def told(folder: pathlib.Path) -> list:
  """What a recorder in the folder has noted."""
  return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


def _program(file: pathlib.Path, code: str) -> pathlib.Path:
  file.write_text(f"#!{sys.executable}\nimport json, os, sys\n{code}")
  file.chmod(0o755)
  return file
