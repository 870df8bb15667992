"""What is replaced in MaxText, and that nothing is when MaxText is not the one this package knows."""

import importlib
import json
import os
import subprocess
import sys

from maxtext.configs import pyconfig
from maxtext.configs.types import MaxTextConfig
from maxtext.models import models as maxtext_models
import pytest

from maxtext_mudd import plugin
from maxtext_mudd.config.keys import MuddKeys
from maxtext_mudd.config.mudd_config import MuddConfig
from maxtext_mudd.model.decoder import MuddDecoder
from tests import runs


def test_installing_again_changes_nothing():
  def attributes():
    return [getattr(importlib.import_module(x.module), x.name) for x in plugin.REPLACEMENTS]

  before = attributes()
  plugin.install()
  assert attributes() == before
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
    env=runs.environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{runs.ROOT}"),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 2
  assert finished.stderr.splitlines() == [f"maxtext-mudd: {message}"]


OTHER_SHAPES = """
import importlib
from maxtext_mudd import plugin
from maxtext_mudd.config import versions

def modules():
  return [importlib.import_module(replacement.module) for replacement in plugin.REPLACEMENTS]

stock = [getattr(module, replacement.name) for module, replacement in zip(modules(), plugin.REPLACEMENTS)]
for i, (module, replacement) in enumerate(zip(modules(), plugin.REPLACEMENTS)):
  other = lambda something_else: None
  setattr(module, replacement.name, other)
  try:
    plugin.install()
  except versions.UnknownMaxText as error:
    print(error)
  found = [getattr(module, replacement.name) for module, replacement in zip(modules(), plugin.REPLACEMENTS)]
  assert found == [*stock[:i], other, *stock[i + 1:]], replacement
  setattr(module, replacement.name, stock[i])
"""


def test_seams_of_another_shape():
  """Every replacement is looked at before the first is replaced, in a process where none is."""
  finished = subprocess.run(
    [sys.executable, "-c", OTHER_SHAPES], cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True
  )
  assert finished.returncode == 0, finished.stderr[-4000:]
  said = [line for line in finished.stdout.splitlines() if " does not take " in line]
  assert len(said) == len(plugin.REPLACEMENTS)
  for line, replacement in zip(said, plugin.REPLACEMENTS):
    assert f"{replacement.module}.{replacement.name} does not take {replacement.parameters[0]}" in line


WHOLE_PACKAGE = """
import importlib, inspect, json, pkgutil, sys
from maxtext.trainers.pre_train import train  # and with it nearly all of MaxText

def attributes():
  found = {}
  for name, module in list(sys.modules.items()):
    for key, value in vars(module).items() if name.split(".")[0] == "maxtext" else ():
      found[name, key] = value
      bases = value.__mro__ if inspect.isclass(value) else ()  # a replaced class derives from the stock one
      if stock := next((x for x in bases if (x.__module__, x.__name__) == (name, key)), None):
        found |= {(name, f"{key}.{attribute}"): x for attribute, x in vars(stock).items()}
  return found

stock = attributes()
import maxtext_mudd
from maxtext_mudd import plugin
plugin.install()
for module in pkgutil.walk_packages(maxtext_mudd.__path__, "maxtext_mudd."):
  if not module.name.endswith("__main__"):
    importlib.import_module(module.name)
from tests import models
models.build(models.config(mudd=True))
found, modules = attributes(), {name for name, _ in stock}
changed = [key for key, value in stock.items() if key not in found or found[key] is not value]
new = [key for key, value in found.items() if key not in stock and key[0] in modules and type(value) is not type(sys)]
print(json.dumps(sorted({*changed, *new})))
"""


def test_nothing_else_in_maxtext_is_replaced():
  """Nor in its classes: not by the plugin, by importing all of this package, or by building a model."""
  finished = subprocess.run(
    [sys.executable, "-c", WHOLE_PACKAGE], cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True
  )
  assert finished.returncode == 0, finished.stderr[-4000:]
  found = {tuple(x) for x in json.loads(finished.stdout.splitlines()[-1])}
  assert found == {(x.module, x.name) for x in plugin.REPLACEMENTS}


def test_other_config_classes_are_left_alone():
  """Entry points with a configuration class of their own keep it."""

  class Other(MaxTextConfig):
    pass

  from tests import models

  assert type(pyconfig.initialize_pydantic(["", models.BASE_YML], run_name="x", log_config=False)) is MuddConfig
  found = pyconfig.initialize_pydantic(["", models.BASE_YML], config_class=Other, run_name="x", log_config=False)
  assert type(found) is Other


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
