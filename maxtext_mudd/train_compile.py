"""Stock `maxtext.trainers.pre_train.train_compile` with MUDD connections."""

from maxtext.trainers.pre_train import train_compile

from maxtext_mudd.launch import launch


def run() -> None:
  """Compiles the train step ahead of time for the topology that the configuration names."""
  launch(train_compile.main)


if __name__ == "__main__":
  run()
