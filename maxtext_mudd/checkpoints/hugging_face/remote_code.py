"""Copies the modelling code of a Hugging Face model along with the model; this project never runs it."""

import pathlib
import shutil

FOLDER = "remote_code"  # the subfolder of a model folder that has the code
_FILES = ("*.py", "generation_config.json")


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the code files of the folder `source`, if it has any. Raises OSError."""
  for file in (file for pattern in _FILES for file in sorted(source.glob(pattern)) if file.is_file()):
    target.mkdir(exist_ok=True)
    shutil.copyfile(file, target / file.name)
