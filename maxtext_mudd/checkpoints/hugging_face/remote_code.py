"""The modelling code beside a Hugging Face model, which goes where its model goes and is never run here."""

import pathlib
import shutil

FOLDER = "remote_code"  # in a converted folder
_FILES = ("*.py", "generation_config.json")


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Its files, where the source has any. Raises OSError."""
  for file in (file for pattern in _FILES for file in sorted(source.glob(pattern)) if file.is_file()):
    target.mkdir(exist_ok=True)
    shutil.copyfile(file, target / file.name)
