"""Trains a model by MaxText's trainer, `maxtext.trainers.pre_train.train`, with MUDD connections.

    python3 -m maxtext_mudd.train FILE.yml run_name=mine key=value ...

A run of the same name that exists is resumed.
"""

import functools

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import console, data_settings, run_lock
from maxtext_mudd.runs.launch import launch


def check_training(config, lock: run_lock.RunLock | None = None) -> None:
  """Checks a training run, and locks its folder if `lock` is given.

  Raises:
    ConfigError: the run cannot work on one of the hosts of the job. It is raised on all hosts.
  """
  # These import MaxText, whose version `launch` has checked by now.
  from maxtext_mudd.config import devices
  from maxtext_mudd.runs import data_position, hosts, preflight, refusals

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
  """Trains. What the run reads and writes is checked, and its folder locked, before anything is compiled."""
  with run_lock.RunLock() as lock, console.Console():
    check = functools.partial(check_training, lock=lock)
    launch("maxtext.trainers.pre_train.train", check=check, check_early=data_settings.check)


if __name__ == "__main__":
  run()
