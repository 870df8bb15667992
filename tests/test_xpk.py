"""XPK itself: the manifest that it makes of a request, what it rejects, and what docs/cluster.md tells it."""

import json
import re
import shlex
import subprocess

import pytest
import yaml

from maxtext_mudd.cluster import __main__ as cluster
from maxtext_mudd.cluster import request as requests
from maxtext_mudd.cluster import training
from maxtext_mudd.config.errors import ConfigError
from tests.cluster import (
  MAKE,
  SYNTHETIC,
  VARIABLES,
  XPK,
  arguments,
  documented,
  main,
  needs_xpk,
  request,
  without_make,
)
from tests.runs import ROOT


@pytest.fixture
def offline(tmp_path, monkeypatch):
  """Neither gcloud, kubectl nor docker, a home of its own, and this machine's environment for local work."""
  monkeypatch.setenv("PATH", str(tmp_path / "bin"))
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--of-this-machine")


@needs_xpk
def test_manifest_of_xpk_itself(offline, tmp_path, capfd):
  file = tmp_path / "xpk" / "manifest.yml"
  changes = {
    "ARGS": f"{SYNTHETIC} steps=10 'hf_path=two words'",
    "XPK_ARGS": "--priority=high '--env=LIBTPU_INIT_ARGS=--xla_a=true --xla_b=1'",
    "MAX_RESTARTS": "3",
    "MANIFEST": str(file),
  }
  assert cluster.main([f"XPK={XPK}", *arguments(**changes)]) == 0
  assert capfd.readouterr().out.splitlines()[-1] == f"manifest: {file}"

  job = yaml.safe_load(file.read_text())
  assert (job["kind"], job["metadata"]["name"]) == ("JobSet", "mudd-405m")
  assert job["spec"]["failurePolicy"]["maxRestarts"] == 3
  [replicated] = job["spec"]["replicatedJobs"]
  assert replicated["replicas"] == 2  # slices
  hosts = replicated["template"]["spec"]
  assert hosts["parallelism"] == hosts["completions"] == 2  # v5p-16 is 8 chips, 4 a host
  pod = hosts["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "2x2x2",
  }
  assert pod["priorityClassName"] == "high"
  [container] = pod["containers"]
  assert container["image"] == VARIABLES["DOCKER_IMAGE"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert {entry["name"]: entry["value"] for entry in container["env"]} == {
    "JAX_PLATFORMS": "tpu,cpu",
    "PYTHONUNBUFFERED": "1",
    "LIBTPU_INIT_ARGS": "--xla_a=true --xla_b=1",
  }
  shell, flag, script = container["command"]
  assert (shell, flag) == ("bash", "-c")
  run = re.search(r"^\((.*)\) & PID=\$!;$", script, re.MULTILINE).group(1)
  assert shlex.split(run) == [
    "python3",
    "MaxText/train.py",
    "yaml/mudd_405m.yml",
    "run_name=mudd-405m",
    "base_output_directory=gs://my-bucket/runs",
    "yaml/data/synthetic.yml",
    "steps=10",
    "hf_path=two words",
  ]


@needs_xpk
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"TPU_TYPE": "v5p-9"}, "TPU_TYPE=v5p-9 is not one that XPK knows; the closest are v5p-"),
    ({"XPK_ARGS": "--sopt"}, "XPK rejects XPK_ARGS=--sopt: unrecognized arguments: --sopt."),
    ({"XPK_ARGS": "--priority=top"}, "XPK rejects XPK_ARGS=--priority=top: --priority: invalid choice: 'top'"),
    ({"XPK_ARGS": "--env=A"}, "xpk ended its dry run with status 1: AssertionError: Invalid environment variable"),
    ({"XPK_ARGS": "--help"}, "XPK_ARGS=--help asks XPK for something other than a workload; leave it out."),
    (
      {"XPK_ARGS": "'--env=A=\"b\" c'"},
      "XPK_ARGS='--env=A=\"b\" c' is changed in XPK's manifest; remove quotes from it.",
    ),
  ],
)
def test_what_xpk_itself_rejects(changes, message, offline, tmp_path, capsys):
  manifest = tmp_path / "manifest.yml"
  found = main(XPK, capsys, MANIFEST=str(manifest), **changes)
  assert found.startswith(message)
  assert not manifest.exists()


@needs_xpk
def test_names_are_judged_as_xpk_judges_them():
  names = ["a", "a1", "a-b", "1a", "-a", "a-", "A", "a_b", "a.b", "", "a\n", "é", "w" * 40, "w" * 41, "a--b", "a b"]
  judge = (
    "import argparse, json, sys\nfrom xpk.parser.validators import name_type\n"
    "def takes(name):\n  try: return name_type(name) == name\n  except argparse.ArgumentTypeError: return False\n"
    "print(json.dumps(list(map(takes, json.load(sys.stdin)))))"
  )
  python = XPK.parent / "python"
  theirs = subprocess.run([python, "-c", judge], input=json.dumps(names), capture_output=True, text=True, check=True)
  assert json.loads(theirs.stdout) == list(map(taken, names))


def taken(name: str) -> bool:
  try:
    return bool(request(WORKLOAD=name))
  except ConfigError:
    return False


@pytest.mark.parametrize(
  ("variable", "sentence"),
  [
    ("ARGS=hf_path=$x", "ARGS has a dollar sign, which does not reach the container as it is"),
    ("OUTPUT=gs://my-bucket/it's", "OUTPUT has a single quote, which does not reach the container as it is"),
  ],
)
@needs_xpk
def test_make_refuses_what_it_would_change(variable, sentence):
  line = [*MAKE, "xpk", "CONFIG=yaml/mudd_405m.yml", "WORKLOAD=x", "OUTPUT=gs://my-bucket", "DRY_RUN=1", variable]
  finished = subprocess.run(line, cwd=ROOT, env=without_make(), capture_output=True, text=True)
  assert finished.returncode == 2
  assert sentence in finished.stderr


@needs_xpk
@pytest.mark.parametrize("target", [["xpk"], ["submit", "LAUNCHER=xpk"]])
def test_make(target, tmp_path):
  """Quotes, STEPS and ARGS go through make and two shells."""
  manifest = tmp_path / "manifest.yml"
  line = [
    *MAKE,
    *target,
    "CONFIG=yaml/mudd_405m.yml",
    *(f"{name}={VARIABLES[name]}" for name in ("CLUSTER", "TPU_TYPE", "NUM_SLICES", "WORKLOAD", "OUTPUT", "DRY_RUN")),
    "STEPS=10",
    "ARGS=yaml/data/synthetic.yml 'hf_path=two \"words\"'",
    f"MANIFEST={manifest}",
  ]
  finished = subprocess.run(line, cwd=ROOT, env=without_make(), capture_output=True, text=True)
  assert finished.returncode == 0, finished.stderr
  written = manifest.read_text()
  assert "steps=10 yaml/data/synthetic.yml 'hf_path=two \"words\"') &" in written
  assert "image: gcr.io/your-project/maxtext-mudd:" in written
  assert written.rstrip() in finished.stdout
  assert "this request would be refused without DRY_RUN=1: PROJECT is not set and gcloud has none" in finished.stdout


@needs_xpk
def test_documented_xpk_commands_are_ones_that_xpk_takes():
  lines = documented(".venv-xpk/bin/xpk")
  assert {" ".join(line[:2]) for line in lines} >= {"cluster create", "storage attach", "workload list"}
  parse = (
    "import argparse, json, sys\nfrom xpk.parser.core import set_parser\n"
    "parser = argparse.ArgumentParser()\nset_parser(parser)\n"
    "for line in json.load(sys.stdin): parser.parse_args(line)"
  )
  python = XPK.parent / "python"
  finished = subprocess.run([python, "-c", parse], input=json.dumps(lines), capture_output=True, text=True)
  assert finished.returncode == 0, finished.stderr


def test_documented_runs_are_not_refused(monkeypatch):
  monkeypatch.chdir(ROOT)
  lines = documented("make xpk")
  assert len(lines) > 3
  for line in lines:
    training.check(requests.read(["LAUNCHER=xpk", f"DOCKER_IMAGE={VARIABLES['DOCKER_IMAGE']}", *line]))
