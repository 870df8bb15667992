"""What is replaced in MaxText, and that nothing is when MaxText is not the one this package knows."""

import re
import subprocess
import sys

from maxtext.configs import pyconfig
from maxtext.configs.types import MaxTextConfig
from maxtext.models import models as maxtext_models
import pytest

from maxtext_mudd import plugin, versions
from maxtext_mudd.config.keys import MuddKeys
from maxtext_mudd.config.mudd_config import MuddConfig
from maxtext_mudd.model.decoder import MuddDecoder
from tests import runs


def test_installing_again_changes_nothing():
  before = [(pyconfig._initialize_pydantic, maxtext_models.NNXDecoder)]
  plugin.install()
  assert [(pyconfig._initialize_pydantic, maxtext_models.NNXDecoder)] == before
  assert maxtext_models.NNXDecoder is MuddDecoder


@pytest.mark.parametrize(
  ("stub", "message"),
  [
    ('__version__ = "0.9.9"', "maxtext 0.9.9 is installed, and maxtext-mudd knows 0.2.5 only; install maxtext==0.2.5."),
    ('raise ModuleNotFoundError("maxtext")', "maxtext is not installed; install maxtext==0.2.5."),
  ],
)
def test_unknown_version(stub, message, tmp_path):
  """A MaxText of which nothing is known, not even its modules."""
  (tmp_path / "maxtext").mkdir()
  (tmp_path / "maxtext" / "__init__.py").write_text(stub)
  finished = subprocess.run(
    [sys.executable, *runs.LAUNCHER, "yaml/mudd_tiny.yml"],
    cwd=runs.ROOT,
    env=runs.environment(PYTHONPATH=str(tmp_path)),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 2
  assert finished.stderr.splitlines() == [f"maxtext-mudd: {message}"]


@pytest.mark.parametrize("seam", plugin.SEAMS, ids=lambda seam: seam.name)
def test_seam_of_another_shape(seam, monkeypatch):
  """Every seam is looked at before the first is replaced."""
  import importlib

  module = importlib.import_module(seam.module)
  monkeypatch.setattr(plugin, "_installed", False)
  monkeypatch.setattr(module, seam.name, lambda something_else: None)
  first = plugin.SEAMS[0]
  before = getattr(importlib.import_module(first.module), first.name)
  with pytest.raises(versions.UnknownMaxText, match=f"{seam.module}.{seam.name} does not take {seam.parameters[0]}"):
    plugin.install()
  assert getattr(importlib.import_module(first.module), first.name) is before


def test_other_config_classes_are_left_alone():
  """Entry points with a configuration class of their own keep it."""

  class Other(MaxTextConfig):
    pass

  from tests import models

  assert type(pyconfig.initialize_pydantic(["", models.BASE_YML], run_name="x", log_config=False)) is MuddConfig
  found = pyconfig.initialize_pydantic(["", models.BASE_YML], config_class=Other, run_name="x", log_config=False)
  assert type(found) is Other


def test_only_the_plugin_assigns_to_attributes_of_modules():
  for file in (runs.ROOT / "maxtext_mudd").rglob("*.py"):
    if file.name != "plugin.py":
      assert "setattr(importlib" not in file.read_text()
      assert not re.search(r"^\s*(pyconfig|models|train|maxtext_utils)\.\w+ = ", file.read_text(), re.M), file


def test_every_key_stands_in_the_base_file_with_its_default():
  """MaxText takes M_KEY from the environment only for keys that a YAML file names."""
  import yaml

  values = yaml.safe_load((runs.ROOT / "yaml" / "mudd_base.yml").read_text())
  defaults = {name: field.default for name, field in MuddKeys.model_fields.items()}
  assert defaults.keys() == MuddConfig.model_fields.keys() - MaxTextConfig.model_fields.keys()
  assert {key: value for key, value in values.items() if key != "base_config"} == defaults


def test_keys_from_the_environment(monkeypatch):
  monkeypatch.setenv("M_MUDD_WINDOW", "3")
  argv = ["", str(runs.ROOT / "yaml" / "mudd_tiny.yml"), "run_name=x"]
  assert pyconfig.initialize(argv).mudd_window == 3
