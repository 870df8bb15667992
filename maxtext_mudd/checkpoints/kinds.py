"""Which command of `maxtext_mudd.convert` a folder is for, where it is another than the one that was asked."""

import pathlib

from maxtext_mudd.checkpoints import folder
from maxtext_mudd.checkpoints import train_state as relayout
from maxtext_mudd.checkpoints.authors_jax import models as fork
from maxtext_mudd.checkpoints.hugging_face import files as hf_files
from maxtext_mudd.config.errors import ConfigError

_RUN = "from-run"


def check(path: pathlib.Path, command: str) -> None:
  """Raises ConfigError for a folder that another command reads, or none.

  Args:
    command: from-hf, from-fork or from-run.
  """
  if not path.is_dir():
    raise ConfigError(f"{path}: there is no such folder; name {_WANTED[command]}.")
  if folder.is_folder(path):
    raise ConfigError(f"{path} has {folder.CONFIG}: it is converted already; name {_WANTED[command]}.")
  if command != "from-hf" and any((path / name).exists() for name in hf_files.FILES):
    raise ConfigError(f"{path} is a Hugging Face folder; convert it by from-hf.")
  if command == "from-hf":
    if fork.is_folder(path) and not any((path / name).exists() for name in hf_files.FILES):
      raise ConfigError(
        f"{path} is a folder of the authors' JAX code or of a run; convert it by from-fork or from-run."
      )
  elif command == _RUN and (path / fork.FILE).exists():
    raise ConfigError(f"{path} is a folder of the authors' JAX code; convert it by from-fork.")
  elif not fork.is_folder(path):
    run = path.parent if path.name == "checkpoints" else path
    if command == _RUN and (run / "checkpoints").is_dir():
      _, newest = relayout.checkpoint(run)
      raise ConfigError(f"{path} is the folder of a run; name one of its checkpoints, as {newest}.")
    raise ConfigError(f"{path} holds no parameters; name {_WANTED[command]}.")


_WANTED = {
  "from-hf": "a Hugging Face folder with the files of a model",
  "from-fork": f"a folder with {fork.FILE} or an Orbax tree",
  "from-run": "a checkpoint, as OUTPUT/RUN/checkpoints/STEP",
}
