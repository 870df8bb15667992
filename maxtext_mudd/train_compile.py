"""Stock `maxtext.trainers.pre_train.train_compile` with MUDD connections."""

from maxtext_mudd.launch import launch


def run() -> None:
  """Compiles the train step ahead of time for the topology that the configuration names."""
  launch("maxtext.trainers.pre_train.train_compile")


if __name__ == "__main__":
  run()
