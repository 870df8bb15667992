"""The wheel as its user meets it: what it installs, and the first commands, in a folder without files of a checkout."""

import pathlib
import re
import subprocess
import sys
import tomllib
import venv
import zipfile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

from maxtext_mudd.config import files as config_files
from tests import runs

# README's model, with sizes of a test.
MODEL = """
base_config: mudd_base.yml
mudd: true
mudd_ffn_reallocation: true
scan_layers: false
decoder_block: llama2
base_num_decoder_layers: 2
base_emb_dim: 32
base_num_query_heads: 2
base_num_kv_heads: 2
head_dim: 16
base_mlp_dim: 256
vocab_size: 64
"""
UV = (sys.executable, "-m", "uv", "--quiet")
ON_ONE_CPU = ("hardware=cpu", "skip_jax_distributed_system=true", "enable_checkpointing=false")
SMALL = ("max_target_length=16", "per_device_batch_size=2", "enable_goodput_recording=false", "monitor_goodput=false")


def requirements() -> dict[str, Requirement]:
  project = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]
  return {canonicalize_name(each.name): each for each in map(Requirement, project["dependencies"])}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """As `make wheel` builds it, which would also renew .venv where a pinned requirement is newer."""
  folder = tmp_path_factory.mktemp("dist")
  subprocess.run([*UV, "build", "--wheel", "--out-dir", folder, runs.ROOT], check=True)
  (file,) = folder.glob("maxtext_mudd-*.whl")
  return file


def test_the_wheel_holds_the_package_and_the_models(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    text = archive.read(metadata).decode()
  for name in ("plugin.py", "assets/byte_tokenizer/tokenizer.json", "yaml/mudd_tiny.yml"):
    assert f"maxtext_mudd/{name}" in names
  for line in ("Name: maxtext-mudd", "License-Expression: Apache-2.0", "Provides-Extra: tpu", "Provides-Extra: cuda"):
    assert line in text


def test_the_wheel_asks_for_everything_that_is_pinned():
  """MaxText declares no dependencies outside extras, so the wheel has to."""
  lines = (runs.ROOT / "requirements" / "runtime.in").read_text().splitlines()
  assert requirements().keys() == {canonicalize_name(Requirement(line.split("#")[0].strip()).name) for line in lines}


def test_dependencies_are_bounded():
  for name, requirement in requirements().items():
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators in ({">=", "<"}, {"=="}), name


@pytest.mark.parametrize("name", ["runtime", "dev", "tpu", "cuda"])
def test_tested_versions_are_taken(name):
  lines = (runs.ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
  pinned = dict(line.split("==") for line in lines if "==" in line)
  pinned = {canonicalize_name(package): version.split()[0] for package, version in pinned.items()}
  for package, requirement in requirements().items():
    assert requirement.specifier.contains(pinned[package]), package


@pytest.mark.slow
def test_the_first_commands_of_a_user(wheel, tmp_path):
  """Installs from the package index, which takes minutes."""
  venv.create(tmp_path / "venv", with_pip=False)
  python = tmp_path / "venv" / "bin" / "python"
  subprocess.run([*UV, "pip", "install", "--python", python, wheel], check=True)
  folder = tmp_path / "empty"
  folder.mkdir()

  def command(*arguments):
    environment = runs.environment(HF_HUB_OFFLINE="1", TPU_SKIP_MDS_QUERY="1")
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
      [python, "-m", "maxtext_mudd.train", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )

  listed = command("--list")
  assert listed.returncode == 0
  assert [line.split()[0] for line in listed.stdout.splitlines()] == config_files.packaged()
  helped = command("--help")
  (keys,) = re.findall(r"mudd_\* +(.*)", helped.stdout)
  assert pathlib.Path(keys).is_relative_to(tmp_path / "venv")
  mistake = command("yaml/mudd_3b.yml")
  assert (mistake.returncode, mistake.stdout) == (2, "")
  assert mistake.stderr.startswith("maxtext-mudd: yaml/mudd_3b.yml: no such configuration file; the nearest ")
  (folder / "my.yml").write_text(MODEL)
  fixed = ("run_name=r", "base_output_directory=runs", "steps=2", *ON_ONE_CPU, *SMALL)
  trained = command("my.yml", "data/synthetic.yml", *fixed)
  assert trained.returncode == 0, trained.stderr[-4000:]
  assert len(runs.losses(folder / "runs" / "r")) == 2
