"""`make submit LAUNCHER=gcluster`: gcluster's arguments against its documented flags, dry runs and submissions."""

import json
import os
import re
import shlex
import subprocess

from maxtext.utils.accelerator_to_spec_map import UserFacingNameToSystemCharacteristics
import pytest
import yaml

from maxtext_mudd.cluster import __main__ as cluster
from maxtext_mudd.cluster import gcluster, training
from maxtext_mudd.cluster import request as requests
from maxtext_mudd.config import slices
from maxtext_mudd.config.errors import ConfigError
from tests.cluster import (
  DOCUMENTED,
  GCLUSTER_FLAGS,
  MAKE,
  SYNTHETIC,
  VARIABLES,
  XPK,
  arguments,
  documented,
  gcluster_recorder,
  main,
  needs_xpk,
  told,
  without_make,
)
from tests.runs import ROOT

GCLUSTER = {"LAUNCHER": "gcluster"}
PLACE = {"PROJECT": "my-project", "ZONE": "us-east5-a"}
MACHINE_TYPES = DOCUMENTED["machine_types"]["names"]


def request(**changes: str) -> requests.Request:
  return requests.read(arguments(**GCLUSTER | changes))


def flags(words: list[str]) -> list[str]:
  """The flags of a command line, short ones by their long names."""
  names = [word.partition("=")[0] for word in words if word.startswith("-")]
  return [f"--{DOCUMENTED['short_flags']['names'][x[1]]}" if re.fullmatch("-[A-Za-z]", x) else x for x in names]


def test_command():
  changes = PLACE | {"ARGS": f"steps=10 {SYNTHETIC} 'hf_path=two words'", "MAX_RESTARTS": "3"}
  made = request(GCLUSTER_ARGS="--priority=high '--mount=gs://my-bucket;/app/data'", **changes)
  assert gcluster.command(made) == [
    *("gcluster", "job", "submit"),
    "--env=JAX_PLATFORMS=tpu,cpu",
    "--env=PYTHONUNBUFFERED=1",
    "--compute-type=ct5p-hightpu-4t",
    "--priority=high",
    "--mount=gs://my-bucket;/app/data",
    "--topology=2x2x2",
    "--cluster=my-cluster",
    "--project=my-project",
    "--location=us-east5-a",
    "--name=mudd-405m",
    "--num-slices=2",
    "--restarts=3",
    "--image=gcr.io/my-project/maxtext-mudd:abc",
    "--command=python3 MaxText/train.py yaml/mudd_405m.yml run_name=mudd-405m "
    "base_output_directory=gs://my-bucket/runs steps=10 yaml/data/synthetic.yml 'hf_path=two words'",
  ]


@pytest.mark.parametrize("place", [PLACE, {}])
@pytest.mark.parametrize("dry_run_out", [None, "manifest.yml"])
def test_flags_are_documented_and_those_that_gcluster_requires_are_given(place, dry_run_out):
  found = flags(gcluster.arguments(request(**place), dry_run_out))
  assert set(found) <= GCLUSTER_FLAGS
  assert set(found) >= {f"--{name}" for name in DOCUMENTED["required"]["names"]}
  assert [name for name in found if name != "--env"] == list(dict.fromkeys(found))[1:]  # each of them once
  assert ("--dry-run-out" in found) == bool(dry_run_out)
  assert ({"--project", "--location"} <= set(found)) == bool(place)  # otherwise `gcluster job config` has them


def test_flags_of_variables_and_limits_are_documented():
  launcher = request().launcher
  assert set(flags(list(launcher.variable_of_flag))) <= GCLUSTER_FLAGS
  assert launcher.workload_limit == DOCUMENTED["workload_limit"]["characters"]


@pytest.mark.parametrize(
  ("tpu_type", "hardware"),
  [
    ("v4-16", ("ct4p-hightpu-4t", "2x2x2")),
    ("v5p-8", ("ct5p-hightpu-4t", "2x2x1")),
    ("v5p-16", ("ct5p-hightpu-4t", "2x2x2")),
    ("v5p-4x4x12", ("ct5p-hightpu-4t", "4x4x12")),
    ("v5litepod-1", ("ct5lp-hightpu-1t", "1x1")),
    ("v5litepod-8", ("ct5lp-hightpu-8t", "2x4")),
    ("v5litepod-16", ("ct5lp-hightpu-4t", "4x4")),
    ("v6e-4", ("ct6e-standard-4t", "2x2")),
    ("v6e-2x4", ("ct6e-standard-8t", "2x4")),
    ("v6e-256", ("ct6e-standard-4t", "16x16")),
    ("tpu7x-16", ("tpu7x-standard-4t", "2x2x2")),
  ],
)
def test_hardware(tpu_type, hardware):
  assert gcluster.hardware(tpu_type) == hardware
  assert hardware[0] in MACHINE_TYPES


@pytest.mark.parametrize(
  ("tpu_type", "sentence"),
  [
    ("v3-8", "TPU_TYPE=v3-8: Cluster Toolkit has machines of v4, v5litepod, v5p, v6e, tpu7x only."),
    ("v5p-9", "TPU_TYPE=v5p-9 is not one that MaxText knows; write the nearest, v5p-8, or a topology in place of the"),
    ("v5p", "TPU_TYPE=v5p is not one that MaxText knows"),
    ("v5p-2x2", "TPU_TYPE=v5p-2x2: a topology of v5p has 3 sizes, as in v5p-2x2x2."),
    ("v6e-2x2x2", "TPU_TYPE=v6e-2x2x2: a topology of v6e has 2 sizes, as in v6e-2x2."),
    ("v6e-0x4", "TPU_TYPE=v6e-0x4: a topology of v6e has 2 sizes"),
    ("tpu7x-2", "TPU_TYPE=tpu7x-2 is not a multiple of 4 chips, which Cluster Toolkit's machines of tpu7x have; write"),
  ],
)
def test_hardware_that_gcluster_does_not_have(tpu_type, sentence):
  with pytest.raises(ConfigError) as error:
    gcluster.hardware(tpu_type)
  assert str(error.value).startswith(sentence)


@needs_xpk
def test_a_type_is_the_same_slice_with_both_launchers():
  """XPK's own table: the same topology, and the same machines but for slices that gcluster has one machine of."""
  code = (
    "import json, sys\nfrom xpk.core.system_characteristics import UserFacingNameToSystemCharacteristics as known\n"
    "names = [x for x in json.load(sys.stdin) if x in known]\n"
    "print(json.dumps({x: (known[x].gce_machine_type, known[x].topology) for x in names}))"
  )
  tpus = [x for x, its in UserFacingNameToSystemCharacteristics.items() if its.platform == "tpu"]
  names = [*map(slices.of_xpk, tpus), "v5p-2x2x2", "v6e-4x8"]
  run = subprocess.run(
    [XPK.parent / "python", "-c", code], input=json.dumps(names), capture_output=True, text=True, check=True
  )
  theirs = {name: tuple(its) for name, its in json.loads(run.stdout).items()}
  assert len(theirs) > 200
  del theirs["tpu7x-2"]  # gcluster has no such machine
  ours = {name: gcluster.hardware(name) for name in theirs}
  assert {name: topology for name, (_, topology) in ours.items()} == {name: its[1] for name, its in theirs.items()}
  assert {name for name in ours if ours[name] != theirs[name]} == {"v5litepod-8", "v6e-8"}
  assert {machine for machine, _ in ours.values()} <= set(MACHINE_TYPES)


REFUSED = {
  "length": (
    {"WORKLOAD": "w" * 29},
    f"WORKLOAD={'w' * 29} has 29 characters; Cluster Toolkit takes 28 at most.",
  ),
  "capitals": ({"WORKLOAD": "A"}, "WORKLOAD=A is not a name that Cluster Toolkit takes: lower-case letters"),
  "mistyped variable": ({"ZONES": "a"}, "ZONES is not a variable of make submit; the nearest is ZONE."),
  "no cluster": ({"CLUSTER": ""}, "CLUSTER is not set; for example: make submit CLUSTER=my-cluster"),
  "flags of the other launcher": (
    {"XPK_ARGS": "--spot"},
    "XPK_ARGS=--spot has flags of xpk workload create, and LAUNCHER=gcluster runs gcluster job submit; write its flags "
    "in GCLUSTER_ARGS.",
  ),
  "flag of a variable": ({"GCLUSTER_ARGS": "--location=a"}, "GCLUSTER_ARGS: --location=a is set by ZONE; set it there"),
  "short flag": ({"GCLUSTER_ARGS": "-n a"}, "GCLUSTER_ARGS: -n is set by WORKLOAD; set it there."),
  "short flag with its value": ({"GCLUSTER_ARGS": "-om.yml"}, "GCLUSTER_ARGS: -om.yml is set by DRY_RUN and MANIFEST"),
  "nodes": ({"GCLUSTER_ARGS": "--num-nodes=2"}, "GCLUSTER_ARGS: --num-nodes=2 is set by TPU_TYPE; set it there."),
  "Pathways": (
    {"GCLUSTER_ARGS": "--pathways"},
    "GCLUSTER_ARGS: --pathways does not work with gcluster job submit: MaxText/train.py runs without Pathways here",
  ),
  "key": ({"ARGS": "mudd_way=4"}, "mudd_way is not a configuration key; the nearest is mudd_ways."),
  "mesh": ({"ARGS": f"{SYNTHETIC} dcn_data_parallelism=4"}, "dcn_data_parallelism=4: the product 4 of the mesh is not"),
  "TPU type": ({"TPU_TYPE": "v3-8", "ARGS": SYNTHETIC}, "TPU_TYPE=v3-8: Cluster Toolkit has machines of"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_before_gcluster_runs(mistake, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  changes, message = REFUSED[mistake]
  program = gcluster_recorder(tmp_path)
  found = main(program, capsys, MANIFEST=str(tmp_path / "a" / "manifest.yml"), **GCLUSTER | changes)
  assert found.startswith(message)
  assert list(tmp_path.iterdir()) == [program]


def test_dry_run(tmp_path, capfd):
  file = tmp_path / "manifests" / "manifest.yml"
  changes = GCLUSTER | PLACE | {"ARGS": SYNTHETIC, "MANIFEST": str(file), "GCLUSTER_ARGS": "--verbose"}
  assert cluster.main([f"GCLUSTER={gcluster_recorder(tmp_path)}", *arguments(**changes)]) == 0
  command, *manifest, last = capfd.readouterr().out.splitlines()[-5:]
  made = request(**changes)
  assert shlex.split(command) == gcluster.command(made)
  assert last == f"manifest: {file}"
  assert file.read_text().splitlines() == manifest
  _, job = yaml.safe_load_all(file.read_text())
  assert job["kind"] == "JobSet" and made.training_command in json.dumps(job)
  ((*words, dry_run_out),) = told(tmp_path)
  assert ["gcluster", *words] == gcluster.command(made)
  assert dry_run_out.startswith("--dry-run-out=")


def test_dry_run_without_gcluster(tmp_path, capfd):
  changes = GCLUSTER | {"ARGS": SYNTHETIC, "MANIFEST": str(tmp_path / "manifest.yml")}
  assert cluster.main(["GCLUSTER=/no/gcluster", *arguments(**changes)]) == 0
  command, reason = capfd.readouterr().out.splitlines()[-2:]
  assert shlex.split(command) == gcluster.command(request(**changes))
  assert reason == (
    "no manifest: GCLUSTER=/no/gcluster cannot be run (No such file or directory); install Cluster Toolkit 1.103.0 or "
    "later from https://github.com/GoogleCloudPlatform/cluster-toolkit/releases, and put gcluster on the PATH or name "
    "its path in GCLUSTER."
  )
  assert not list(tmp_path.iterdir())


def test_submission_without_gcluster(capsys):
  found = main("/no/gcluster", capsys, DRY_RUN="", ARGS=SYNTHETIC, **GCLUSTER)
  assert found.startswith("GCLUSTER=/no/gcluster cannot be run (No such file or directory); install Cluster Toolkit")


def test_submission_is_rehearsed_first(tmp_path, capfd):
  file = tmp_path / "manifest.yml"
  changes = GCLUSTER | {"DRY_RUN": "", "ARGS": SYNTHETIC, "MANIFEST": str(file)}
  assert cluster.main([f"GCLUSTER={gcluster_recorder(tmp_path)}", *arguments(**changes)]) == 7  # gcluster's own status
  (*rehearsed, dry_run_out), submitted = told(tmp_path)
  assert rehearsed == submitted == gcluster.arguments(request(**changes))
  assert dry_run_out.startswith("--dry-run-out=")
  assert capfd.readouterr().out.splitlines()[-1] == f"manifest: {file}"
  assert file.exists()


@pytest.mark.parametrize(
  ("gcluster_args", "error", "sentence"),
  [
    ("--sopt", "", "gcluster ended its dry run with status 1: unknown flag: --sopt."),
    (
      "",
      "location is required; please specify it using the --location flag",
      "gcluster ended its dry run with status 1: location is required; please specify it using the --location flag "
      "(ZONE sets --location).",
    ),
    (
      "",
      "multiple LocalQueues found ([a b]). Please specify which one to use using --queue flag",
      "gcluster ended its dry run with status 1: multiple LocalQueues found ([a b]). Please specify which one to use "
      "using --queue flag (GCLUSTER_ARGS sets --queue).",
    ),
  ],
)
def test_what_gcluster_rejects(gcluster_args, error, sentence, tmp_path, capsys):
  """The command is printed all the same, and nothing is submitted or written."""
  changes = GCLUSTER | {"DRY_RUN": "", "ARGS": SYNTHETIC, "GCLUSTER_ARGS": gcluster_args}
  program = gcluster_recorder(tmp_path, error)
  with pytest.raises(SystemExit) as ended:
    cluster.main([f"GCLUSTER={program}", *arguments(**changes, MANIFEST=str(tmp_path / "manifest.yml"))])
  printed = capsys.readouterr()
  assert (ended.value.code, printed.err.splitlines()[-1]) == (2, f"maxtext-mudd: {sentence}")
  assert shlex.split(printed.out.splitlines()[-1]) == gcluster.command(request(**changes))
  assert len(told(tmp_path)) == 1
  assert not (tmp_path / "manifest.yml").exists()


def test_manifest_of_another_image(tmp_path, capsys):
  program = gcluster_recorder(tmp_path, image="a/b:c")
  found = main(program, capsys, ARGS=SYNTHETIC, GCLUSTER_ARGS="--verbose", **GCLUSTER)
  assert found == (
    "ARGS=yaml/data/synthetic.yml and GCLUSTER_ARGS=--verbose is changed in gcluster's manifest; leave parts of it out."
  )


def test_make(tmp_path):
  """gcluster is found on the PATH, and STEPS and GCLUSTER_ARGS go through make and two shells."""
  gcluster_recorder(tmp_path)
  names = ("CLUSTER", "TPU_TYPE", "NUM_SLICES", "WORKLOAD", "OUTPUT", "DRY_RUN")
  line = [
    *(*MAKE, "submit", "LAUNCHER=gcluster", "CONFIG=yaml/mudd_405m.yml", "STEPS=10", "ARGS=yaml/data/synthetic.yml"),
    *(f"{name}={VARIABLES[name]}" for name in names),
    "GCLUSTER_ARGS='--mount=gs://my-bucket;/app/data'",
    f"MANIFEST={tmp_path / 'manifest.yml'}",
  ]
  environment = without_make() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  finished = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert finished.returncode == 0, finished.stderr
  assert (tmp_path / "manifest.yml").read_text() in finished.stdout
  ((*words, _),) = told(tmp_path)
  assert "--mount=gs://my-bucket;/app/data" in words
  assert words[-1].endswith(" steps=10 yaml/data/synthetic.yml")


@pytest.mark.parametrize("value", ["", "slurm"])
def test_make_of_no_launcher(value):
  finished = subprocess.run(
    [*MAKE, "submit", f"LAUNCHER={value}"], cwd=ROOT, env=without_make(), capture_output=True, text=True
  )
  assert finished.returncode == 2
  assert "write LAUNCHER=gcluster (Cluster Toolkit) or LAUNCHER=xpk (XPK)." in finished.stderr


def test_documented_runs_are_not_refused(monkeypatch):
  monkeypatch.chdir(ROOT)
  lines = [line for line in documented("make submit") if "LAUNCHER=gcluster" in line]
  assert len(lines) > 1
  for line in lines:
    made = requests.read([f"DOCKER_IMAGE={VARIABLES['DOCKER_IMAGE']}", *line])
    training.check(made)
    assert set(flags(gcluster.arguments(made))) <= GCLUSTER_FLAGS


def test_flags_on_the_page_are_documented():
  text = (ROOT / "docs" / "cluster.md").read_text()
  written = re.findall(r"GCLUSTER_ARGS='?(--[a-z-]+)", text)
  assert len(written) > 2
  assert set(written) <= GCLUSTER_FLAGS
  lines = documented("gcluster job")
  assert {line[0] for line in lines} >= {"list", "logs", "cancel"}
  assert {name for line in lines for name in flags(line)} <= {"--cluster", "--location", "--project"}
