"""The lock on a run's folder: one run at a time, and none that a dead process holds."""

import json
import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import tempfile

import pytest

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs.run_lock import NAME, RunLock
from tests import models, runs

HOLD = """
import sys, time, types
from maxtext_mudd.runs.run_lock import RunLock
with RunLock() as lock:
  lock.take(types.SimpleNamespace(checkpoint_dir=sys.argv[1]))
  print("held", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def config(tmp_path):
  return models.config(run_name="r", base_output_directory=str(tmp_path / "output"))


@pytest.fixture
def holder(config):
  """Another process that holds the lock of the run."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, config.checkpoint_dir],
    cwd=runs.ROOT,
    env=runs.environment(),
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.communicate()


def test_a_second_run_is_refused_with_the_name_of_the_first(config, holder, tmp_path):
  folder = tmp_path / "output" / "r"
  started = json.loads((folder / NAME).read_text())["started"]
  with RunLock() as lock, pytest.raises(ConfigError) as error:
    lock.take(config)
  assert str(error.value) == (
    f"{folder} is being written by process {holder.pid} on {socket.gethostname()} since {started}; wait for its end, "
    "or give this run another run_name."
  )
  assert [entry.name for entry in folder.iterdir()] == [NAME]
  with RunLock() as lock:
    lock.take(models.config(run_name="another", base_output_directory=str(tmp_path / "output")))


def test_the_lock_of_a_killed_run_is_taken_over(config, holder, tmp_path):
  file = tmp_path / "output" / "r" / NAME
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert file.exists()
  file.write_text(file.read_text().replace(str(holder.pid), str(os.getppid())))  # a number that lives again
  with RunLock() as lock:
    lock.take(config)
    assert json.loads(file.read_text())["process"] == os.getpid()


def test_nothing_is_left_of_a_run_that_wrote_nothing(config, tmp_path):
  with RunLock() as lock:
    lock.take(config)
    lock.take(config)  # as when MaxText reads its configuration again
  assert not (tmp_path / "output").exists()
  with RunLock() as lock:
    lock.take(config)
    (tmp_path / "output" / "r" / "tensorboard").mkdir()
  assert [entry.name for entry in (tmp_path / "output" / "r").iterdir()] == ["tensorboard"]


def test_a_folder_that_takes_no_lock(config, tmp_path):
  (tmp_path / "output").write_text("")
  with RunLock() as lock, pytest.raises(ConfigError, match=r"/r/run.lock cannot be written \(Not a directory\); name"):
    lock.take(config)


def test_a_lock_file_that_all_can_use(config, tmp_path):
  mask = os.umask(0o002)
  try:
    with RunLock() as lock:
      lock.take(config)
      assert stat.S_IMODE((tmp_path / "output" / "r" / NAME).stat().st_mode) == 0o664
  finally:
    os.umask(mask)


def test_a_lock_file_that_only_another_user_can_write():
  """In a folder like /tmp, where it cannot be removed either."""
  user = os.geteuid()
  with tempfile.TemporaryDirectory() as output:  # not below that of pytest, which is closed to others
    folder = pathlib.Path(output, "r")
    folder.mkdir()
    (folder / NAME).touch(0o444)
    for path in (folder, folder.parent):
      path.chmod(0o1777)
    config = models.config(run_name="r", base_output_directory=output)
    if not user:
      os.seteuid(65534)
    try:
      with RunLock() as lock, RunLock() as second:
        lock.take(config)
        with pytest.raises(ConfigError, match=r"/r is being written by another process; wait for its end"):
          second.take(config)
    finally:
      os.seteuid(user)


def test_a_lock_file_that_is_a_link_to_nowhere(config, tmp_path):
  folder = tmp_path / "output" / "r"
  folder.mkdir(parents=True)
  (folder / NAME).symlink_to(tmp_path / "no" / "where")
  with (
    RunLock() as lock,
    pytest.raises(ConfigError, match=r"/r/run.lock cannot be written \(No such file or directory"),
  ):
    lock.take(config)


def test_remote_output_is_not_locked():
  with RunLock() as lock:
    lock.take(models.config(run_name="r", base_output_directory="gs://bucket"))
