"""Whole runs through the entry points: stock unchanged, the patches, kill and resume, a damaged checkpoint."""

from concurrent.futures import ThreadPoolExecutor
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import maxtext
import pytest

from maxtext_mudd.model import classes
from tests import runs

STOCK_YML = str(runs.ROOT / "tests" / "stock.yml")
PATCHES = {"entry-points": [], "decoder-path": ["decoder_path=maxtext_mudd/model/classes.py"]}  # with a run's keys
LAST_STEP = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def overrides(folder) -> list[str]:
  return runs.build_corpus(folder)


def patch_file(name: str) -> pathlib.Path:
  return runs.ROOT / "patches" / f"maxtext-0.2.5-{name}.patch"


@pytest.fixture(scope="module", params=PATCHES)
def patch(request) -> str:
  return request.param


@pytest.fixture(scope="module")
def patched(tmp_path_factory, patch) -> pathlib.Path:
  """A copy of the installed MaxText with the patch applied."""
  copy = tmp_path_factory.mktemp(patch)
  source = pathlib.Path(maxtext.__file__).parent
  shutil.copytree(source, copy / "maxtext", ignore=shutil.ignore_patterns("__pycache__"))
  env = os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)}
  subprocess.run(["git", "apply", str(patch_file(patch))], cwd=copy, check=True, env=env)
  return copy


@pytest.fixture(scope="module")
def losses(folder, overrides) -> dict[int, float]:
  """Of a run with connections, to its end."""
  return runs.train(runs.LAUNCHER, runs.RUN_YML, folder / "output", "plugin", *overrides)


def test_stock_is_unchanged_without_mudd(folder):
  with ThreadPoolExecutor(max_workers=2) as pool:
    launchers = {"stock": runs.STOCK, "launched": runs.LAUNCHER}
    stock, launched = pool.map(lambda name: runs.train(launchers[name], STOCK_YML, folder / "output", name), launchers)
  assert sorted(stock) == [0, 1, 2, 3]
  assert launched == stock


@pytest.mark.slow
def test_the_patch_trains_as_the_plugin_does(folder, overrides, losses, patch, patched):
  keys = [*overrides, *PATCHES[patch], "enable_checkpointing=false"]
  found = runs.train(runs.STOCK, runs.RUN_YML, folder / "output", f"patched-{patch}", *keys, PYTHONPATH=str(patched))
  assert sorted(found) == list(range(LAST_STEP + 1))
  assert found == losses


@pytest.mark.parametrize("name", PATCHES)
def test_the_patch_does_not_mention_mudd(name):
  assert "mudd" not in patch_file(name).read_text().lower()


def test_both_patches_find_the_same_classes():
  groups = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
  by_entry_point = {group.removeprefix("maxtext."): entries["mudd"] for group, entries in groups.items()}
  offered = {name: value for name, value in vars(classes).items() if name.endswith("_class")}
  assert {name: f"{value.__module__}:{value.__name__}" for name, value in offered.items()} == by_entry_point


PRINT_ERRORS = """
import sys
from maxtext.configs import pyconfig

for overrides in sys.argv[2:]:
  try:
    pyconfig.initialize(["", sys.argv[1], *overrides.split()])
  except ValueError as error:
    print(error)
"""


def config_errors(patched, config: str, *overrides: str) -> list[str]:
  """What the patched MaxText says about a configuration with each of `overrides`, line by line."""
  finished = subprocess.run(
    [sys.executable, "-c", PRINT_ERRORS, config, *overrides],
    cwd=runs.ROOT,
    env=runs.environment(PYTHONPATH=str(patched)),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr[-4000:]
  return finished.stdout.splitlines()


@pytest.mark.slow
def test_the_patch_refuses_keys_of_optimizers(patch, patched):
  """Optimizers stay MaxText's own, which do not know the parameters of connections."""
  keys = ["opt_type=muon", "mudd_decay=matrices", "mudd_learning_rate_factor=0.5"]
  errors = config_errors(patched, runs.RUN_YML, *(" ".join([*PATCHES[patch], key]) for key in keys))
  refusals = [line for line in errors if "mudd=True in MaxText's own commands" in line]
  assert [key for key, line in zip(keys, refusals, strict=True) if key in line] == keys


@pytest.mark.slow
@pytest.mark.parametrize("patch", ["decoder-path"], indirect=True)
def test_a_decoder_path_that_cannot_work(tmp_path, patched):
  for name, text in {"notes.txt": "", "empty.py": "", "other.py": "decoder_class = config_class = dict"}.items():
    (tmp_path / name).write_text(text)
  paths = [str(tmp_path / name) for name in ("absent.py", "notes.txt", "empty.py", "other.py")]
  assert config_errors(patched, STOCK_YML, *(f"decoder_path={path}" for path in paths)) == [
    f"Cannot import {paths[0]!r}: file does not exist",
    f"Cannot import {paths[1]!r}: not a valid python file",
    f"{paths[2]!r} does not define a class named 'decoder_class'",
    f"{paths[3]!r}: config_class is not a subclass of MaxTextConfig",
  ]


@pytest.mark.slow
def test_resumes_exactly_after_a_kill(folder, overrides, losses):
  output = folder / "output"
  process = subprocess.Popen(
    runs.command(runs.LAUNCHER, runs.RUN_YML, output, "killed", *overrides),
    cwd=runs.ROOT,
    env=runs.environment(),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  checkpoints = output / "killed" / "checkpoints"
  deadline = time.monotonic() + 300
  while not (checkpoints / "4").exists():  # then step 5 has begun
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (checkpoints / str(LAST_STEP)).exists(), "killed too late to tell anything"

  newest = max(int(entry.name) for entry in checkpoints.iterdir() if entry.name.isdigit())
  for events in (output / "killed").rglob("events.out.*"):
    events.unlink()  # what is read below was written by the resumed process

  resumed = runs.train(runs.LAUNCHER, runs.RUN_YML, output, "killed", *overrides)
  assert list(resumed) == list(range(newest + 1, LAST_STEP + 1))
  assert resumed == {step: losses[step] for step in resumed}


def test_a_truncated_checkpoint_is_reported_and_kept(folder, overrides, losses):
  output = folder / "output"
  shutil.copytree(output / "plugin", output / "damaged")
  newest = output / "damaged" / "checkpoints" / str(LAST_STEP)
  for file in (newest / "items").rglob("d/*"):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

  def contents():
    files = (output / "damaged" / "checkpoints").rglob("*")
    return {file: file.read_bytes() for file in files if file.is_file()}

  before = contents()
  finished = subprocess.run(
    runs.command(runs.LAUNCHER, runs.RUN_YML, output, "damaged", *overrides, "steps=10"),
    cwd=runs.ROOT,
    env=runs.environment(),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 2
  assert f"maxtext-mudd: {newest}: the newest checkpoint cannot be restored and is left as it is" in finished.stderr
  assert "move it away to resume from the one before it" in finished.stderr
  assert contents() == before


@pytest.mark.slow
def test_a_run_that_was_told_to_end_is_not_taken_for_completed(folder, overrides):
  """SIGTERM, as before a preemption: MaxText saves and stops; the status tells a cluster to start the run again."""
  one_process = {"JOB_INDEX": "0", "JOB_COMPLETION_INDEX": "0", "PROCESSES_IN_JOB": "1", "JAX_PROCESS_COUNT": "1"}
  keys = ["steps=1000000", "checkpoint_period=1000000", "enable_autocheckpoint=true", "eval_interval=-1"]
  keys += ["hardware=cpu", "skip_jax_distributed_system=false", "log_console=full"]
  process = subprocess.Popen(
    runs.command(runs.LAUNCHER, runs.RUN_YML, folder / "output", "told", *overrides, *keys),
    cwd=runs.ROOT,
    env=runs.environment(JAX_COORDINATOR_ADDRESS="localhost", **one_process),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  said = ""
  while "completed step: 2," not in said:
    said = process.stderr.readline()
    assert said, f"ended with {process.wait()} before it was told"
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=300)
  assert process.returncode == 128 + signal.SIGTERM
  saved = [int(entry.name) for entry in (folder / "output" / "told" / "checkpoints").iterdir()]
  assert max(saved) > 2
