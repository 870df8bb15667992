"""The image for clusters: what `make image` refuses, and what the Dockerfile puts into it."""

import re
import subprocess

import pytest

from maxtext_mudd.cluster import training
from tests.cluster import MAKE
from tests.runs import ROOT


@pytest.mark.parametrize(
  ("image", "reason"), [("a/b:c-dirty", "commit the changes"), ("a/your-project/b:c", "PROJECT")]
)
def test_make_image_refuses(image, reason):
  finished = subprocess.run([*MAKE, "image", f"DOCKER_IMAGE={image}"], cwd=ROOT, capture_output=True, text=True)
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
  runtime_in, *libtpu = (ROOT / "requirements" / "tpu.in").read_text().splitlines()
  assert runtime_in == "-r runtime.in" and set(tpu) - set(runtime) == set(libtpu)
  assert [line.split("==")[0] for line in libtpu] == ["libtpu"]
  assert set(runtime) <= set(tpu)
  assert all(re.fullmatch(r"[a-z0-9._-]+==[^ ]+( ; .*)?", line) for line in tpu)
  installed = [" ".join(words) for words in instructions() if words[0] == "RUN"]
  assert "pip install --no-cache-dir --no-deps -r requirements/tpu.txt" in installed[1]
  assert not [line for line in installed if "--editable" in line or " -e " in line]
  assert [words[1] for words in instructions() if words[0] == "FROM"] == ["python:3.12-slim"] * 2
  assert ["WORKDIR", training.WORKDIR] in instructions()
  assert {("COPY", "MaxText", "MaxText"), ("COPY", "yaml", "yaml")} <= set(map(tuple, instructions()))
