"""Stock `maxtext.trainers.pre_train.train` with MUDD connections: `python3 -m maxtext_mudd.train FILE.yml`."""

from maxtext_mudd.launch import launch
from maxtext_mudd.runs import console, run_lock, sources


def check_training(config) -> None:
  from maxtext_mudd import devices, preflight  # once MaxText is known to be the right one
  from maxtext_mudd.runs import data_place, refusals

  refusals.check(config)
  devices.check_batch(config)
  preflight.check_training(config)
  data_place.warn_on_resume(config)


def run() -> None:
  """Trains; what the run reads and writes is checked before anything is compiled, and its folder is locked."""
  with run_lock.RunLock() as lock, console.Console():

    def check(config) -> None:
      check_training(config)
      lock.take(config)

    launch("maxtext.trainers.pre_train.train", check=check, check_early=sources.check)


if __name__ == "__main__":
  run()
