"""`make submit`: requests that are refused before a launcher runs, and what XPK is told."""

import pathlib

import pytest

from maxtext_mudd.cluster import __main__ as cluster
from maxtext_mudd.cluster import training, xpk
from maxtext_mudd.config.errors import ConfigError
from tests.cluster import SYNTHETIC, arguments, main, recorder, request, told
from tests.runs import ROOT

REFUSED = {
  "no launcher": (
    {"LAUNCHER": ""},
    "LAUNCHER is not set; write LAUNCHER=gcluster (Cluster Toolkit) or LAUNCHER=xpk (XPK).",
  ),
  "launcher": ({"LAUNCHER": "slurm"}, "LAUNCHER=slurm is not a launcher; write LAUNCHER=gcluster (Cluster Toolkit) or"),
  "flags of the other launcher": (
    {"GCLUSTER_ARGS": "--verbose"},
    "GCLUSTER_ARGS=--verbose has flags of gcluster job submit, and LAUNCHER=xpk runs xpk workload create; write its "
    "flags in XPK_ARGS.",
  ),
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
    "DOCKER_IMAGE=a; b is not an image; write REGISTRY/PROJECT/NAME:TAG, in lower case except for TAG.",
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
def test_refused_before_a_launcher_runs(mistake, tmp_path, monkeypatch, capsys):
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
  assert made.training_command == (
    "python3 MaxText/train.py yaml/mudd_405m.yml run_name=mudd-405m base_output_directory=gs://my-bucket/runs "
    "steps=10 yaml/data/synthetic.yml 'hf_path=two words'"
  )
  words = xpk.arguments(made, pathlib.Path("m.yml"), dry_run=False)
  assert words[:5] == ["workload", "create", "--env=JAX_PLATFORMS=tpu,cpu", "--env=PYTHONUNBUFFERED=1", "--spot"]
  assert "--project=my-project" in words
  assert not [word for word in words if word.startswith("--zone")]  # gcloud's
  assert words[-2:] == ["--output-manifest-file=m.yml", "--no-dry-run"]


def test_submission_is_rehearsed_first(tmp_path, monkeypatch, capfd):
  monkeypatch.delenv("TELEMETRY_ENABLED", raising=False)
  manifest = tmp_path / "xpk" / "manifest.yml"
  program = recorder(tmp_path)
  changes = {"DRY_RUN": "", "ARGS": SYNTHETIC, "MANIFEST": str(manifest)}
  assert cluster.main([f"XPK={program}", *arguments(**changes)]) == 7  # xpk's own status
  (rehearsed, telemetry), (submitted, own) = told(tmp_path)
  assert (rehearsed[-1], submitted[-1]) == ("--dry-run", "--no-dry-run")
  assert (telemetry, own) == ("false", None)
  assert f"--output-manifest-file={manifest}" in submitted
  assert capfd.readouterr().out.splitlines()[-1] == f"manifest: {manifest}"


def test_nothing_is_submitted_that_cannot_work(tmp_path, capsys):
  changes = {"DRY_RUN": "", "ARGS": "mudd_way=4", "MANIFEST": str(tmp_path / "manifest.yml")}
  assert main(recorder(tmp_path), capsys, **changes).startswith("mudd_way is not a configuration key")
  assert not (tmp_path / "told.jsonl").exists()
  assert not (tmp_path / "manifest.yml").exists()


def test_manifest_that_cannot_be_written(tmp_path, capsys):
  program = recorder(tmp_path)
  manifest = program / "manifest.yml"
  found = main(program, capsys, DRY_RUN="", ARGS=SYNTHETIC, MANIFEST=str(manifest))
  assert found == f"MANIFEST={manifest} cannot be written (File exists); name a file in a folder that you can write to."
  assert len(told(tmp_path)) == 1  # the rehearsal


def test_without_xpk(capsys):
  assert main("/no/xpk", capsys) == "XPK=/no/xpk cannot be run (No such file or directory); make xpk installs it."
