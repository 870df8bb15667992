"""The console of the launchers before the configuration is read, in a debugger, and when the process is aborted."""

import contextlib
import subprocess
import sys
import types

import pytest

from maxtext_mudd.runs import console, early_check
from tests import runs

TINY = str(runs.ROOT / "yaml" / "mudd_tiny.yml")
MODEL = str(runs.ROOT / "yaml" / "mudd_405m.yml")
LOCAL = ("run_name=x", "base_output_directory=runs")


@pytest.fixture
def config(tmp_path):
  """What the console reads of a configuration."""
  return types.SimpleNamespace(
    log_console="brief",
    base_output_directory=str(tmp_path),
    checkpoint_dir=str(tmp_path / "run" / "checkpoints" / ""),
    run_name="run",
    steps=100,
    log_period=10,
    num_target_devices=1,
    tokenizer_path="",
  )


def run(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-c", code, *arguments],
    cwd=runs.ROOT,
    env=runs.environment(PYTHONBREAKPOINT=""),
    capture_output=True,
    text=True,
    **options,
  )


@pytest.mark.parametrize(
  ("arguments", "may"),
  [
    ([TINY, *LOCAL], True),
    ([TINY, *LOCAL, "prompt=a: b: [c"], True),
    ([TINY, "run_name=x"], True),
    ([TINY, *LOCAL, "log_console=full"], False),
    ([TINY, "base_output_directory=gs://bucket/runs"], False),
    ([TINY, *LOCAL, "skip_jax_distributed_system=false"], False),
    ([MODEL, *LOCAL], False),
    ([TINY, *LOCAL, "--flagfile=x"], False),
    ([TINY, *LOCAL, "log_console=${profiler}"], False),
    ([TINY, *LOCAL, "steps=[1"], False),
    (["nowhere.yml"], False),
    (["steps=3"], False),
    ([], False),
  ],
)
def test_command_lines_whose_console_will_be_brief(arguments, may):
  assert early_check.shows_brief_console(["train.py", *arguments]) == may


def test_a_variable_of_the_environment_may_change_the_console(monkeypatch):
  monkeypatch.setenv("M_LOG_CONSOLE", "full")
  assert not early_check.shows_brief_console(["train.py", TINY, *LOCAL])


@pytest.mark.parametrize("may", [True, False])
def test_a_console_reads_the_command_line(may, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["train.py", TINY, *LOCAL, *([] if may else ["log_console=full"])])
  with contextlib.suppress(ZeroDivisionError), console.Console():
    print("before the configuration")
    assert capsys.readouterr().out == ("" if may else "before the configuration\n")
    1 / 0  # noqa: B018


def test_brief_from_the_configuration_on(config, tmp_path, capsys):
  (tmp_path / "run").mkdir()
  with console.Console(holds_output=False):
    print("before the configuration")
    console.start(config)
    print("after it")
  shown = capsys.readouterr().out
  assert shown.startswith("before the configuration\ntraining run for 100 steps; ")
  assert "after it" not in shown
  assert "after it\n" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("holds_output", [True, False])
def test_no_folder_for_temporary_files(holds_output, config, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
  with console.Console(holds_output=holds_output):
    print("before the configuration")
    console.start(config)
    print("after it")
  assert capsys.readouterr() == (
    "before the configuration\nafter it\n",
    "warning: no folder for temporary files can be written to, so the console shows everything, and there is no "
    "log.txt; set the environment variable TMPDIR to a folder that can.\n",
  )


@pytest.mark.parametrize("is_configured", [True, False])
def test_a_debugger_has_the_real_console(is_configured, config, tmp_path, monkeypatch, capsys):
  (tmp_path / "run").mkdir()
  debugger = types.SimpleNamespace(run=lambda *arguments: print("(Pdb)", *arguments))
  monkeypatch.setattr(sys, "breakpointhook", debugger.run)
  with console.Console(holds_output=True):
    print("before")
    if is_configured:
      console.start(config)
    breakpoint(1)
    print("after")
  shown = capsys.readouterr().out
  assert shown.endswith("\n(Pdb) 1\nafter\n")
  assert shown.startswith("training run" if is_configured else "before\n")
  assert (tmp_path / "run" / "log.txt").exists() == is_configured
  assert sys.breakpointhook is debugger.run


def test_a_debugger_stops_in_the_frame_that_called_it():
  code = """
from maxtext_mudd.runs.console import Console
with Console(holds_output=True):
  number = 41
  breakpoint()
  number += 1
"""
  finished = run(code, input="p number + 1\nc\n")
  assert finished.returncode == 0, finished.stderr
  assert "(Pdb) 42\n" in finished.stdout


def test_an_aborted_process_has_said_where_its_log_is(tmp_path):
  code = """
import os, sys, types
from maxtext_mudd.runs import console
folder = sys.argv[1]
with console.Console(holds_output=True):
  console.start(types.SimpleNamespace(
    log_console="brief", base_output_directory=folder, checkpoint_dir=folder + "/run/checkpoints/", run_name="run",
    steps=1, log_period=1, num_target_devices=1, tokenizer_path="",
  ))
  os.write(2, b"F1128 13:28:32.476575    4615 client.cc:80] the device is lost\\n")
  os.abort()
"""
  (tmp_path / "run").mkdir()
  finished = run(code, str(tmp_path))
  assert finished.returncode < 0
  assert finished.stdout.splitlines()[0].endswith(f"the full log is {tmp_path / 'run' / 'log.txt'}")
  assert finished.stderr.startswith("Fatal Python error: Aborted\n")
  assert "the device is lost" in (tmp_path / "run" / "log.txt").read_text()
