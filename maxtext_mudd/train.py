"""Stock `maxtext.trainers.pre_train.train` with MUDD connections: `python3 -m maxtext_mudd.train FILE.yml`."""

from maxtext_mudd.launch import launch
from maxtext_mudd.runs.console import Console


def check_training(config) -> None:
  from maxtext_mudd import devices, preflight  # once MaxText is known to be the right one

  devices.check_batch(config)
  preflight.check_training(config)


def run() -> None:
  """Trains; what the run reads and writes is checked before anything is compiled."""
  with Console():
    launch("maxtext.trainers.pre_train.train", check=check_training)


if __name__ == "__main__":
  run()
