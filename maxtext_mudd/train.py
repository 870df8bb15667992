"""Stock `maxtext.trainers.pre_train.train` with MUDD connections: `python3 -m maxtext_mudd.train FILE.yml`."""

from maxtext.trainers.pre_train import train

from maxtext_mudd import preflight
from maxtext_mudd.launch import launch


def run() -> None:
  """Trains; what the run reads and writes is checked before anything is compiled."""
  launch(train.main, check=preflight.check_training)


if __name__ == "__main__":
  run()
