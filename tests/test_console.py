"""The console of the launchers: what it shows, and what goes to the log file of the run."""

import contextlib
import functools
import logging
import os
import pathlib
import pty
import subprocess
import sys
import termios
import threading
import time
import types

import jax
import pytest

from maxtext_mudd.assets import BYTE_TOKENIZER_FOLDER
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import console
from maxtext_mudd.runs.progress import Progress
from tests import runs

Console = functools.partial(console.Console, holds_output=True)
NOISE = "ParamInfo(name='') created with ts_context=None. Passing unshared or default TensorStore contexts"


def step(number: int, speed: float = 1000.0, loss: str = "2.500") -> str:
  """MaxText's message for a step."""
  return (
    f"completed step: {number}, seconds: 1.000, TFLOP/s/device: 0.100, Tokens/s/device: {speed:.3f}, "
    f"total_weights: 4096, loss: {loss}, lm_loss: {loss}, perplexity: 12.182"
  )


def evaluation(number: int) -> str:
  return (
    f"Completed eval after train step {number}, loss=1.755, perplexity=5.786, total_weights=48706.0, avg_z_loss=0.000"
  )


@pytest.fixture
def config(tmp_path):
  """What the console reads of a configuration."""
  return types.SimpleNamespace(
    log_console="brief",
    use_dpo=False,
    base_output_directory=str(tmp_path / "out"),
    checkpoint_dir=str(tmp_path / "out" / "run" / "checkpoints" / ""),
    run_name="run",
    steps=100,
    log_period=10,
    num_target_devices=2,
    tokenizer_path=str(BYTE_TOKENIZER_FOLDER),
  )


@pytest.fixture
def folder(config) -> pathlib.Path:
  return pathlib.Path(config.base_output_directory) / "run"


@pytest.fixture
def log(caplog):
  """Logs as MaxText does."""
  caplog.set_level(logging.INFO, "absl")
  return logging.getLogger("absl")


@pytest.fixture(autouse=True)
def no_temporary_files(tmp_path, monkeypatch):
  """Temporary files are made in a folder, which has to be empty in the end."""
  temporary = tmp_path / "temporary"
  temporary.mkdir()
  monkeypatch.setattr("tempfile.tempdir", str(temporary))
  yield temporary
  assert not list(temporary.iterdir())


class Clock:
  """Two seconds pass between any two looks at it."""

  now = 0.0

  def __call__(self) -> float:
    self.now += 2.0
    return self.now


def test_lines_of_steps(config):
  progress = Progress(config, Clock())
  lines = [progress.line(step(number, speed=1000.0 + number)) for number in range(100)]
  shown = {number: line for number, line in enumerate(lines) if line}
  assert sorted(shown) == [0, *range(9, 100, 10)]
  assert shown[0] == "step   1/100  loss 2.500"
  # Nine steps of 2010 tokens on the mean, on two devices; by the clock each took 2 s.
  assert shown[9] == "step  10/100  loss 2.500  1,005 tokens/s  3 min 00 s left"
  assert shown[99] == "step 100/100  loss 2.500  1,094 tokens/s"
  assert progress.end() == "finished step 100/100 after 3 min 22 s"


def test_a_line_a_minute_where_steps_are_slow(config):
  config.log_period = 1000
  progress = Progress(config, Clock())
  shown = [number for number in range(70) if progress.line(step(number))]
  assert shown == [0, 30, 60]


@pytest.mark.parametrize(
  ("message", "line"),
  [
    (evaluation(40), "eval after step 41: 2.533 bits per byte"),
    ("Completed eval step: 3, seconds: 0.200, running loss=1.755, running perplexity=5.783", None),
    ("Saved a checkpoint at step 40.", "saved checkpoints/40"),
    (
      "[process=0][thread=async_save] Finished saving checkpoint (finalized tmp dir) to `/out/run/checkpoints/7`.",
      "saved checkpoints/7",
    ),
    ("restoring from this run's directory step 40", "resuming from checkpoints/40"),
    (
      "[train] Total estimated memory size: 1.2 GB, estimated output size: 0.4 GB",
      "compiled after 2 s; a train step takes about 1.2 GB of memory",
    ),
    ("[eval] Total estimated memory size: 1.2 GB, estimated output size: 0.4 GB", None),
    ("Waiting for step 40 to finish before checkpoint...", None),
    (f"[Rampup Batch Size Phase], {step(0, loss='nan')}".replace("Tokens", "Other"), "step   1/100  loss nan"),
    (
      "completed profiler activation/deactivation step: 9, total_weights: 4096, loss: 2.500, lm_loss: 2.500",
      "step  10/100  loss 2.500",
    ),
  ],
)
def test_other_lines(config, message, line):
  assert Progress(config, Clock()).line(message) == line


def test_evaluations_of_other_tokenizers(config):
  config.tokenizer_path = "EleutherAI/gpt-neox-20b"
  assert Progress(config).line(evaluation(40)) == "eval after step 41: loss 1.755"


def test_evaluations_of_fine_tuning(config):
  """Tunix' perplexity is a mean over evaluations; DPO's loss is not that of a token."""
  message = evaluation(4).replace("perplexity=5.786", "perplexity=9.123")
  assert Progress(config, first_step=1).line(message) == "eval after step 4: 2.532 bits per byte"
  config.use_dpo = True
  assert Progress(config, first_step=1).line(message) == "eval after step 4: loss 1.755"


def test_a_checkpoint_is_announced_once(config):
  progress = Progress(config)
  assert progress.line("Finished saving checkpoint (finalized tmp dir) to `/out/run/checkpoints/7`.")
  assert progress.line("Saved a checkpoint at step 7.") is None


def test_everything_goes_to_the_log(config, folder, log, capsys):
  with Console():
    print("before the configuration")
    console.start(config)
    folder.mkdir(parents=True)
    print("by print")
    os.write(2, b"by C++\n")
    subprocess.run([sys.executable, "-c", "print('by a child')"], check=True)
    log.info("by a log")
    log.info(step(0))
  logged = (folder / "log.txt").read_text()
  for text in ("before the configuration", "by print", "by C++", "by a child"):
    assert text in logged
  assert logged.splitlines()[0].startswith("==== 2")
  shown = capsys.readouterr()
  assert shown.out.splitlines() == [
    f"training run for 100 steps; the full log is {folder / 'log.txt'}",
    "reading data, building the model and compiling ...",
    "step   1/100  loss 2.500",
  ]
  assert not shown.err


def test_what_a_person_has_to_see(config, folder, log, capsys):
  with Console():
    log.warning("before the configuration")
    console.start(config)
    folder.mkdir(parents=True)
    for _ in range(2):
      log.warning("seen twice")
      log.warning(NOISE)
    os.write(2, b"E1128 13:28:32.476575    4615 pjrt_client.cc:578] the device is lost\n")
    os.write(2, b"I1128 13:28:32.476575    4615 pjrt_client.cc:578] all is well\n")
    print("maxtext-mudd: a sentence.", file=sys.stderr)
    try:
      raise OSError("the disk is full")
    except OSError:
      log.exception("not saved")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    log.info("Training stopped: You may have run out of training data. Received <class 'StopIteration'>")
    log.info("Training stopped: Target loss 2.0 is achieved.")
  shown = capsys.readouterr().err
  assert shown.startswith("warning: before the configuration\nwarning: seen twice\n")
  assert "error: the device is lost\nmaxtext-mudd: a sentence.\nerror: not saved\nTraceback" in shown
  assert "OSError: the disk is full\n" in shown
  assert "ZeroDivisionError" in shown
  assert "ZeroDivisionError" in (folder / "log.txt").read_text()
  assert "You may have run out" not in shown  # `launch` says it in its own words
  assert shown.endswith("\nTraining stopped: Target loss 2.0 is achieved.\n")
  for text in ("seen twice", "the device is lost"):
    assert shown.count(text) == 1
  assert "ts_context" not in shown
  assert "all is well" not in shown


def test_full_is_the_console_of_maxtext(config, folder, log, capsys):
  config.log_console = "full"
  with Console():
    print("before the configuration")
    print("an error", file=sys.stderr)
    console.start(config)
    print("after it")
    console.show("a result")
    log.info(step(0))
  assert capsys.readouterr() == ("before the configuration\nafter it\na result\n", "an error\n")
  assert not folder.exists()


def test_a_remote_folder_has_no_log(config, capsys):
  config.base_output_directory = "gs://bucket/out"
  with Console():
    console.start(config)
    print("as MaxText does")
  assert capsys.readouterr().out == "as MaxText does\n"


@pytest.mark.parametrize("is_read", [False, True])
def test_a_refused_run_leaves_nothing(config, is_read, tmp_path, capsys):
  with pytest.raises(SystemExit), Console():
    print("what MaxText says")
    if is_read:
      console.start(config)
    console.refuse("maxtext-mudd: no.")
    sys.exit(2)
  assert not (tmp_path / "out").exists()
  shown = capsys.readouterr()
  assert shown.err == "maxtext-mudd: no.\n"
  assert "what MaxText says" not in shown.out


def test_a_resumed_run_appends(config, folder, log):
  folder.mkdir(parents=True)
  (folder / "log.txt").write_text("of the first run\n")
  with Console():
    console.start(config)
    log.info(step(41))
    print("of the second")
  lines = (folder / "log.txt").read_text().splitlines()
  assert lines[0] == "of the first run"
  assert lines[1].startswith("==== 2")
  assert "of the second" in lines


@pytest.mark.parametrize("earlier", ["of the first run\n", None])
def test_a_refused_resumption_is_in_the_log_of_its_run(config, folder, earlier, capsys):
  folder.mkdir(parents=True)
  log = folder / "log.txt"
  if earlier:
    log.write_text(earlier)
  with pytest.raises(SystemExit), Console():
    console.start(config)
    print("what MaxText says")
    console.refuse("maxtext-mudd: no.")
    sys.exit(2)
  assert log.exists() == bool(earlier)
  if earlier:
    assert log.read_text().startswith(earlier + "==== ")
    assert log.read_text().endswith("what MaxText says\nmaxtext-mudd: no.\n")
  assert capsys.readouterr().err == "maxtext-mudd: no.\n"


def test_an_interrupted_run_keeps_its_log(config, folder, log):
  folder.mkdir(parents=True)
  with pytest.raises(SystemExit), Console():
    console.start(config)
    log.info(step(0))
    console.refuse("maxtext-mudd: interrupted.")
    sys.exit(2)
  assert "maxtext-mudd: interrupted." in (folder / "log.txt").read_text()


def test_a_log_that_cannot_be_written(config, folder):
  (folder / "log.txt").mkdir(parents=True)
  with Console(), pytest.raises(ConfigError) as error:
    console.start(config)
  assert str(error.value).startswith(f"{folder / 'log.txt'}: the log of the run cannot be written (Is a directory)")


def test_a_crash_is_in_the_log_too(config, folder):
  with pytest.raises(ZeroDivisionError), Console():
    console.start(config)
    folder.mkdir(parents=True)
    logging.getLogger("absl").error("on the way")
    1 / 0  # noqa: B018
  assert "ZeroDivisionError" in (folder / "log.txt").read_text()


def test_a_crash_before_there_is_a_folder(config, folder, no_temporary_files, capsys):
  with pytest.raises(ZeroDivisionError), Console():
    console.start(config)
    print("on the way")
    1 / 0  # noqa: B018
  (log,) = no_temporary_files.iterdir()
  assert "on the way" in log.read_text()
  assert capsys.readouterr().err == f"maxtext-mudd: the log of this run is {log}.\n"
  assert not folder.exists()
  log.unlink()


def test_a_crash_before_the_configuration_is_read(capsys):
  with pytest.raises(ZeroDivisionError), Console():
    print("on the way")
    1 / 0  # noqa: B018
  assert capsys.readouterr().out == "on the way\n"


def test_results_of_a_launcher_without_a_log(config, tmp_path, capsys):
  with Console(writes_log=False):
    print("what MaxText says")
    console.start(config)
    console.show("Input `a` -> `b`")
  assert capsys.readouterr() == ("Input `a` -> `b`\n", "")
  assert not (tmp_path / "out").exists()


def test_a_process_of_several_has_the_console_of_maxtext(config, folder, log, monkeypatch, capsys):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  folder.mkdir(parents=True)
  with Console():
    console.start(config)
    os.write(2, b"F1128 13:28:32.476575    4615 client.cc:80] the coordinator is lost\n")
    print("as MaxText does")
  assert capsys.readouterr().out == "as MaxText does\n"
  assert not list(folder.iterdir())


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_on_terminals_alone(config, log, is_terminal, monkeypatch):
  reader, writer = pty.openpty() if is_terminal else os.pipe()
  if is_terminal:
    termios.tcsetwinsize(writer, (24, 80))
  with open(writer, "w") as stdout:
    monkeypatch.setattr(sys, "stdout", stdout)
    with Console():
      console.start(config)
      for number in range(3):
        time.sleep(0.15)  # a bar is drawn ten times a second at most
        log.info(step(number))
    monkeypatch.undo()
  shown = ""
  with contextlib.suppress(OSError):  # Linux: the other end of the terminal is closed
    while chunk := os.read(reader, 1000):
      shown += chunk.decode()
  os.close(reader)
  assert "step   1/100  loss 2.500" in shown
  assert ("3/100" in shown) == is_terminal
  assert ("\r" in shown.replace("\r\n", "\n")) == is_terminal


def test_a_run_from_its_command_to_its_end(tmp_path):
  overrides = runs.build_corpus(tmp_path)
  keys = [*overrides, "steps=6", "log_period=2", "checkpoint_period=5", "eval_interval=5", "eval_steps=1"]
  finished = subprocess.run(
    runs.command(runs.LAUNCHER, runs.RUN_YML, tmp_path, "run", *keys),
    cwd=runs.ROOT,
    env=runs.environment(),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr
  assert not finished.stderr
  lines = finished.stdout.splitlines()
  assert lines[0] == f"training run for 6 steps; the full log is {tmp_path / 'run' / 'log.txt'}"
  assert [line.split("  ")[0] for line in lines if line.startswith("step ")] == [f"step {n}/6" for n in (1, 2, 4, 6)]
  assert sum(line.startswith("eval after step ") and line.endswith(" bits per byte") for line in lines) == 2
  assert [line for line in lines if line.startswith("saved")] == ["saved checkpoints/0", "saved checkpoints/5"]
  assert lines[-1].startswith("finished step 6/6 after ")
  assert len(lines) == 12
  logged = (tmp_path / "run" / "log.txt").read_text()
  for number in range(6):
    assert f"completed step: {number}, seconds: " in logged
  assert "Total TFLOPs: " in logged  # which MaxText prints
