"""The tokenizer of a Hugging Face folder, which goes where its model goes."""

import pathlib
import shutil
from typing import Any

_MAIN = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of them makes it that of a tokenizer
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")


def keys(folder: pathlib.Path) -> dict[str, Any]:
  """MaxText's keys for the tokenizer in a folder; none where there is none."""
  if not any((folder / name).is_file() for name in _MAIN):
    return {}
  return {"tokenizer_path": str(folder), "tokenizer_type": "huggingface"}


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Its files, where the source has one. Raises OSError."""
  if keys(source):
    target.mkdir(exist_ok=True)
    for file in (source / name for name in (*_MAIN, *_BESIDE)):
      if file.is_file():
        shutil.copyfile(file, target / file.name)
