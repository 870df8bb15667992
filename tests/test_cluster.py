"""`make xpk`: what XPK is told, the manifest that XPK itself makes of it, and what is refused before."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from maxtext_mudd.cluster import __main__ as cluster
from maxtext_mudd.cluster import request as requests
from maxtext_mudd.cluster import training, xpk
from maxtext_mudd.config.errors import ConfigError
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


REFUSED = {
  "no cluster": ({"CLUSTER": ""}, "CLUSTER is not set; for example: make xpk CLUSTER=my-cluster"),
  "capitals": (
    {"WORKLOAD": "My_Run"},
    "WORKLOAD=My_Run is not a name that XPK takes: lower-case letters, digits and hyphens, with a letter first and no "
    "hyphen last.",
  ),
  "hyphen last": ({"CLUSTER": "a-"}, "CLUSTER=a- is not a name that XPK takes"),
  "length": ({"WORKLOAD": "w" * 41}, f"WORKLOAD={'w' * 41} has 41 characters; XPK takes 40 at most."),
  "no slices": ({"NUM_SLICES": "0"}, "NUM_SLICES=0 is not valid; write a whole number from 1 up."),
  "half a slice": ({"NUM_SLICES": "1.5"}, "NUM_SLICES=1.5 is not valid"),
  "restarts": ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1 is not valid; write a whole number from 0 up."),
  "local output": ({"OUTPUT": "runs"}, "OUTPUT=runs is not a folder of Cloud Storage; write gs://BUCKET/FOLDER."),
  "no bucket": ({"OUTPUT": "gs://"}, "OUTPUT=gs:// is not a folder of Cloud Storage"),
  "variable in the output": ({"OUTPUT": "gs://my-bucket/$USER"}, "OUTPUT=gs://my-bucket/$USER is not a folder"),
  "slice by MaxText's name": (
    {"TPU_TYPE": "v5e-16"},
    "TPU_TYPE=v5e-16 is MaxText's name for it; write XPK's, v5litepod-16.",
  ),
  "image": (
    {"DOCKER_IMAGE": "a; b"},
    "DOCKER_IMAGE=a; b is not an image; write REGISTRY/PROJECT/NAME:TAG, lower case but for TAG.",
  ),
  "capitals in an image": (
    {"DOCKER_IMAGE": "gcr.io/My-project/mudd:1"},
    "DOCKER_IMAGE=gcr.io/My-project/mudd:1 is not",
  ),
  "mistyped variable": ({"NUM_SLICE": "3"}, "NUM_SLICE is not a variable of make xpk; the nearest is NUM_SLICES."),
  "project": ({"PROJECT": "My Project"}, "PROJECT=My Project is not the id of a Google Cloud project"),
  "zone": ({"ZONE": "us"}, "ZONE=us is not a zone of Google Cloud, such as us-east5-a."),
  "switch": ({"DRY_RUN": "yes"}, "DRY_RUN=yes is not valid; write DRY_RUN=1, or leave it out."),
  "ending": ({"CONFIG": "model.yaml"}, "CONFIG=model.yaml: a configuration file must end in .yml."),
  "no file": ({"CONFIG": "yaml/absent.yml"}, "CONFIG=yaml/absent.yml: no such configuration file; see yaml/"),
  "not in the image": (
    {"CONFIG": str(ROOT / "tests" / "run.yml")},
    f"CONFIG={ROOT}/tests/run.yml is not in yaml/, and the image holds no other configuration files; put it there.",
  ),
  "neither key nor file": (
    {"ARGS": "steps"},
    "ARGS: steps is not key=value, nor a configuration file, which ends in .yml.",
  ),
  "run name": ({"ARGS": "run_name=x"}, "ARGS: run_name=x is set by WORKLOAD; set it there."),
  "topology": (
    {"ARGS": "compile_topology=v5p-8"},
    "ARGS: compile_topology=v5p-8 is set by TPU_TYPE; set it there.",
  ),
  "slices of the topology": (
    {"ARGS": "compile_topology_num_slices=4"},
    "ARGS: compile_topology_num_slices=4 is set by NUM_SLICES; set it there.",
  ),
  "quotes": ({"ARGS": "hf_path='a"}, "ARGS=hf_path='a has quotes that do not match (no closing quotation)."),
  "lines": ({"ARGS": "a=1\nb=2"}, "ARGS='a=1\\nb=2' has line breaks or other control characters"),
  "variable": ({"ARGS": "a=$(HOME)"}, "ARGS=a=$(HOME) has a $, and Kubernetes would replace the variable after it"),
  "flag of a variable": (
    {"XPK_ARGS": "--no-dry-run"},
    "XPK_ARGS: --no-dry-run is set by DRY_RUN; set it there.",
  ),
  "Pathways": (
    {"XPK_ARGS": "--use-pathways"},
    "XPK_ARGS: --use-pathways does not work with xpk workload create: Pathways has a command of its own",
  ),
  "no project": (
    {"DRY_RUN": "", "DOCKER_IMAGE": "gcr.io/your-project/maxtext-mudd:abc"},
    "PROJECT is not set and gcloud has none; set it, or name an image: DOCKER_IMAGE=REGISTRY/NAME:TAG",
  ),
  "changes that no image holds": (
    {"DRY_RUN": "", "DOCKER_IMAGE": "gcr.io/my-project/maxtext-mudd:abc-dirty"},
    "DOCKER_IMAGE=gcr.io/my-project/maxtext-mudd:abc-dirty: this checkout has changes that are in no commit",
  ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_before_xpk_runs(mistake, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  changes, message = REFUSED[mistake]
  manifest = tmp_path / "xpk" / "manifest.yml"
  assert main("/never/run", capsys, MANIFEST=str(manifest), **changes).startswith(message)
  assert not list(tmp_path.iterdir())


RUNS_THAT_CANNOT_WORK = {
  "mistyped key": ({"ARGS": "mudd_way=4"}, "mudd_way is not a configuration key; the nearest is mudd_ways."),
  "of another machine": (
    {"CONFIG": str(ROOT / "yaml" / "mudd_tiny.yml")},
    "hardware=cpu does not train on v5p-16; add hardware=tpu to ARGS.",
  ),
  "alone": (
    {"ARGS": "skip_jax_distributed_system=true"},
    "skip_jax_distributed_system=True would let every host train",
  ),
  "mesh": (
    {"ARGS": "ici_fsdp_parallelism=3"},
    "ici_fsdp_parallelism=3: the product 3 of the mesh is not the 8 devices of a slice; set one of them to -1, or",
  ),
  "mesh of slices": (
    {"ARGS": "dcn_data_parallelism=4"},
    "dcn_data_parallelism=4: the product 4 of the mesh is not the 2 slices; set one of them to -1, or",
  ),
  "slices that are not there": (
    {"NUM_SLICES": "1", "ARGS": "dcn_data_parallelism=2"},
    "DCN parallelism requested but only one slice available.",
  ),
  "maps in a bucket": (
    {"ARGS": "grain_train_files=gs://my-bucket/pile"},
    "grain_train_files=gs://my-bucket/pile: Megatron files are read from a file system; mount the bucket",
  ),
  "no text": (
    {"ARGS": str(ROOT / "yaml" / "data" / "local_text.yml")},
    "hf_train_files='' names no data; set it to files, or to a pattern that matches files.",
  ),
}


@pytest.mark.parametrize("mistake", RUNS_THAT_CANNOT_WORK)
def test_runs_that_cannot_work(mistake):
  changes, message = RUNS_THAT_CANNOT_WORK[mistake]
  with pytest.raises(ConfigError) as error:
    training.check(request(**changes))
  assert str(error.value).startswith(message)


def test_a_base_outside_of_the_image(tmp_path, monkeypatch):
  monkeypatch.setattr(training, "ROOT", tmp_path)
  (tmp_path / "yaml").mkdir()
  (tmp_path / "yaml" / "mudd_405m.yml").write_text("base_config: ../mine.yml\n")
  (tmp_path / "mine.yml").write_text("base_config: base.yml\n")
  with pytest.raises(ConfigError, match=r"^yaml/mudd_405m\.yml builds on .*mine\.yml, which is not in yaml/"):
    training.check(request())


@pytest.mark.parametrize(
  "image", ["a", "a/b:V1.0", "localhost:5000/a_b/c", "us-docker.pkg.dev/p/r/n:X-y", f"a.io/b@sha256:{'0' * 64}"]
)
def test_images_that_are_images(image):
  assert request(DOCKER_IMAGE=image).image == image


@pytest.mark.parametrize("tpu_type", ["v5p-16", "v5litepod-16", "v6e-8", "v5p-2x2x2"])
def test_runs_that_work(tpu_type):
  """On what MaxText knows by XPK's name, by another, and not at all."""
  assert training.check(request(TPU_TYPE=tpu_type, ARGS=f"{SYNTHETIC} dcn_data_parallelism=2")) == []


def test_data_that_must_be_mounted():
  assert training.check(request()) == ["grain_train_files=/app/data/pile/train"]
  assert training.check(request(ARGS="grain_train_files=/mnt/pile/train")) == ["grain_train_files=/mnt/pile/train"]
  mixed = "grain_file_type=parquet 'grain_train_files=gs://my-bucket/a.parquet,0.5;/mnt/b.parquet,0.5'"
  assert training.check(request(ARGS=mixed)) == ["grain_train_files=/mnt/b.parquet"]


def test_command_line():
  made = request(ARGS=f"steps=10 {SYNTHETIC} 'hf_path=two words'", XPK_ARGS="--spot", PROJECT="my-project")
  assert xpk.training_command(made) == (
    "python3 MaxText/train.py yaml/mudd_405m.yml run_name=mudd-405m base_output_directory=gs://my-bucket/runs "
    "steps=10 yaml/data/synthetic.yml 'hf_path=two words'"
  )
  told = xpk.arguments(made, pathlib.Path("m.yml"), dry_run=False)
  assert told[:5] == ["workload", "create", "--env=JAX_PLATFORMS=tpu,cpu", "--env=PYTHONUNBUFFERED=1", "--spot"]
  assert "--project=my-project" in told
  assert not [word for word in told if word.startswith("--zone")]  # gcloud's
  assert told[-2:] == ["--output-manifest-file=m.yml", "--no-dry-run"]


def recorder(folder: pathlib.Path) -> pathlib.Path:
  """Stands for xpk where a submission would reach out: notes what it is told, and makes the manifest of a dry run."""
  program = folder / "recorder"
  program.write_text(
    f"#!{sys.executable}\n"
    "import json, os, sys\n"
    f"log = {str(folder / 'told.jsonl')!r}\n"
    "open(log, 'a').write(json.dumps([sys.argv[1:], os.environ.get('TELEMETRY_ENABLED')]) + '\\n')\n"
    "flags = dict(word.split('=', 1) for word in sys.argv if word.startswith('--') and '=' in word)\n"
    "container = {'image': flags['--docker-image'], 'command': ['(' + flags['--command'] + ') & PID=$!;']}\n"
    "manifest = {'spec': {'replicatedJobs': [{'template': {'spec': {'template': {'spec': {'containers':\n"
    "  [container]}}}}}]}}\n"
    "open(flags['--output-manifest-file'], 'w').write(json.dumps(manifest))\n"
    "sys.exit(0 if '--dry-run' in sys.argv else 7)\n"
  )
  program.chmod(0o755)
  return program


def test_submission_is_rehearsed_first(tmp_path, monkeypatch, capfd):
  monkeypatch.delenv("TELEMETRY_ENABLED", raising=False)
  manifest = tmp_path / "xpk" / "manifest.yml"
  program = recorder(tmp_path)
  changes = {"DRY_RUN": "", "ARGS": SYNTHETIC, "MANIFEST": str(manifest)}
  assert cluster.main([f"XPK={program}", *arguments(**changes)]) == 7  # xpk's own status
  (rehearsed, telemetry), (submitted, own) = map(json.loads, (tmp_path / "told.jsonl").read_text().splitlines())
  assert (rehearsed[-1], submitted[-1]) == ("--dry-run", "--no-dry-run")
  assert (telemetry, own) == ("false", None)
  assert f"--output-manifest-file={manifest}" in submitted
  assert capfd.readouterr().out.splitlines()[-1] == f"manifest: {manifest}"


def test_nothing_is_submitted_that_cannot_work(tmp_path, capsys):
  changes = {"DRY_RUN": "", "ARGS": "mudd_way=4", "MANIFEST": str(tmp_path / "manifest.yml")}
  assert main(recorder(tmp_path), capsys, **changes).startswith("mudd_way is not a configuration key")
  told = [json.loads(line)[0] for line in (tmp_path / "told.jsonl").read_text().splitlines()]
  assert [words[-1] for words in told] == ["--dry-run"]
  assert not (tmp_path / "manifest.yml").exists()


def test_manifest_that_cannot_be_written(tmp_path, capsys):
  program = recorder(tmp_path)
  manifest = program / "manifest.yml"
  found = main(program, capsys, DRY_RUN="", ARGS=SYNTHETIC, MANIFEST=str(manifest))
  assert found == f"MANIFEST={manifest} cannot be written (File exists); name a file in a folder that you can write to."
  assert len((tmp_path / "told.jsonl").read_text().splitlines()) == 1  # the rehearsal


def test_without_xpk(capsys):
  assert main("/no/xpk", capsys) == "XPK=/no/xpk cannot be run (No such file or directory); make xpk installs it."


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
  line = ["make", "xpk", "CONFIG=yaml/mudd_405m.yml", "WORKLOAD=x", "OUTPUT=gs://my-bucket", "DRY_RUN=1", variable]
  finished = subprocess.run(line, cwd=ROOT, env=without_make(), capture_output=True, text=True)
  assert finished.returncode == 2
  assert sentence in finished.stderr


@needs_xpk
def test_make(tmp_path):
  """The issue's own line: quotes, STEPS and ARGS go through make and two shells."""
  manifest = tmp_path / "manifest.yml"
  line = [
    "make",
    "xpk",
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
  assert "this request would be refused without DRY_RUN=1: PROJECT is not set and gcloud has none" in finished.stdout


def without_make() -> dict[str, str]:
  return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def documented(start: str) -> list[list[str]]:
  """The command lines of the page that begin so, without that."""
  text = (ROOT / "docs" / "cluster.md").read_text()
  return [shlex.split(line)[len(start.split()) :] for line in text.splitlines() if line.startswith(f"    {start} ")]


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
    training.check(requests.read([f"DOCKER_IMAGE={VARIABLES['DOCKER_IMAGE']}", *line]))


@pytest.mark.parametrize(
  ("image", "reason"), [("a/b:c-dirty", "commit the changes"), ("a/your-project/b:c", "PROJECT")]
)
def test_make_image_refuses(image, reason):
  finished = subprocess.run(["make", "image", f"DOCKER_IMAGE={image}"], cwd=ROOT, capture_output=True, text=True)
  assert finished.returncode == 2
  assert reason in finished.stderr.splitlines()[0]


def instructions() -> list[list[str]]:
  text = (ROOT / "Dockerfile").read_text()
  return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


def test_image_is_made_of_files_that_are_there():
  named = [
    word for words in instructions() if words[0] == "COPY" and "--from=wheel" not in words for word in words[1:-1]
  ]
  assert named
  tracked = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout.splitlines()
  let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
  for name in named:
    assert [file for file in tracked if file == name or file.startswith(f"{name}/")], name
  assert sorted(let_in) == sorted(set(named))


def test_image_has_the_pinned_requirements():
  """All of the training environment and libtpu, each at one version; and what a run is started with."""
  runtime, tpu = ((ROOT / "requirements" / name).read_text().splitlines() for name in ("runtime.txt", "tpu.txt"))
  assert set(tpu) - set(runtime) == {"libtpu==0.0.52"}
  assert set(runtime) <= set(tpu)
  assert all(re.fullmatch(r"[a-z0-9._-]+==[^ ]+( ; .*)?", line) for line in tpu)
  installed = [" ".join(words) for words in instructions() if words[0] == "RUN"]
  assert "pip install --no-cache-dir --no-deps -r requirements/tpu.txt" in installed[1]
  assert not [line for line in installed if "--editable" in line or " -e " in line]
  assert [words[1] for words in instructions() if words[0] == "FROM"] == ["python:3.12-slim"] * 2
  assert ["WORKDIR", training.WORKDIR] in instructions()
  assert {("COPY", "MaxText", "MaxText"), ("COPY", "yaml", "yaml")} <= set(map(tuple, instructions()))
