"""Stock `maxtext.trainers.pre_train.train` with MUDD connections: `python3 -m maxtext_mudd.train FILE.yml`."""

import functools

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import console, data_settings, run_lock
from maxtext_mudd.runs.launch import launch


def check_training(config, lock: run_lock.RunLock | None = None) -> None:
  """Takes `lock` for the run's folder, or raises ConfigError, on all hosts of a job, for what cannot work on one."""
  from maxtext_mudd.config import devices
  from maxtext_mudd.runs import (
    data_position,
    hosts,
    preflight,  # once MaxText is known to be the right one
    refusals,
  )

  refusal = None
  try:
    refusals.check(config)
    devices.check_batch(config)
    preflight.check_training(config)
    if lock:
      lock.take(config)
    preflight.try_data(config)
  except ConfigError as error:
    refusal = error
  hosts.refuse_together(refusal)
  data_position.warn_on_resume(config)


def run() -> None:
  """Trains; what the run reads and writes is checked before anything is compiled, and its folder is locked."""
  with run_lock.RunLock() as lock, console.Console():
    check = functools.partial(check_training, lock=lock)
    launch("maxtext.trainers.pre_train.train", check=check, check_early=data_settings.check)


if __name__ == "__main__":
  run()
