"""Checks the source folder of a conversion. If another command reads this folder, the error names that command."""

import pathlib

from maxtext_mudd.checkpoints import model_folder, orbax_folder, train_state
from maxtext_mudd.checkpoints.authors_jax import models as authors_jax
from maxtext_mudd.checkpoints.hugging_face import files as hf_files
from maxtext_mudd.config.errors import ConfigError

_EXPECTED = {
  "from-hf": "a Hugging Face folder with the files of a model",
  "from-fork": f"a folder with {authors_jax.FILE} or an Orbax tree",
  "from-run": "a checkpoint, such as OUTPUT/RUN/checkpoints/STEP",
  "upcycle": "a checkpoint, such as OUTPUT/RUN/checkpoints/STEP",
}
_OF_RUNS = ("from-run", "upcycle")


def check(path: pathlib.Path, command: str) -> None:
  """Checks the source of a conversion.

  Args:
    command: from-hf, from-fork, from-run or upcycle.

  Raises:
    ConfigError: the folder does not exist, holds no model, or is one that another command reads.
  """
  if not path.is_dir():
    raise ConfigError(f"{path}: there is no such folder; name {_EXPECTED[command]}.")
  has_hf_files = any((path / name).exists() for name in hf_files.FILES)
  if model_folder.is_model_folder(path) and command != "upcycle":
    raise ConfigError(f"{path} has {model_folder.CONFIG}: it is converted already; name {_EXPECTED[command]}.")
  if command != "from-hf" and has_hf_files:
    converter = "python3 -m maxtext.checkpoint_conversion.to_maxtext" if command == "upcycle" else "from-hf"
    raise ConfigError(f"{path} is a Hugging Face folder; convert it by {converter}.")
  if command == "from-hf":
    if authors_jax.is_folder(path) and not has_hf_files:
      raise ConfigError(
        f"{path} is a folder of the authors' JAX code or of a run; convert it by from-fork or from-run."
      )
  elif command in _OF_RUNS and (path / authors_jax.FILE).exists():
    raise ConfigError(f"{path} is a folder of the authors' JAX code; convert it by from-fork.")
  elif command in _OF_RUNS and any((path / name).is_dir() for name in orbax_folder.ITEMS):
    return
  elif not authors_jax.is_folder(path):
    run = path.parent if path.name == "checkpoints" else path
    if command in _OF_RUNS and (run / "checkpoints").is_dir():
      _, newest = train_state.find_checkpoint(run)
      raise ConfigError(f"{path} is the folder of a run; name one of its checkpoints, such as {newest}.")
    raise ConfigError(f"{path} holds no parameters; name {_EXPECTED[command]}.")
