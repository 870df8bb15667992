"""Tokenizers, which go where their models go: of a Hugging Face folder, or one file of SentencePiece or tiktoken."""

from collections.abc import Mapping
import pathlib
import shutil
from typing import Any

_MAIN = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of them makes it that of a tokenizer
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
_FILES = ("sentencepiece", "tiktoken")  # types of tokenizers that are one file


def keys(folder: pathlib.Path) -> dict[str, Any]:
  """MaxText's keys for the tokenizer in a folder; none where there is none."""
  if not any((folder / name).is_file() for name in _MAIN):
    return {}
  return {"tokenizer_path": str(folder), "tokenizer_type": "huggingface"}


def moved(own: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """The keys for a tokenizer that lies in a folder now, wherever those of its model say that it was."""
  file = folder / pathlib.Path(str(own.get("tokenizer_path") or "")).name
  if own.get("tokenizer_type") in _FILES and file.is_file():
    return {"tokenizer_path": str(file)}
  return keys(folder)


def of_run(config, target: pathlib.Path) -> dict[str, Any]:
  """The keys for the tokenizer of a configuration once `copy_of_run` has put it into a folder; none where it is
  nothing on this machine."""
  source = pathlib.Path(config.tokenizer_path or "").absolute()
  if not config.tokenizer_path or not source.exists():
    return {}
  if name := _file_name(config):
    return {"tokenizer_path": str(target / name), "tokenizer_type": config.tokenizer_type.value}
  if keys(source):
    return {"tokenizer_path": str(target), "tokenizer_type": "huggingface"}
  return {"tokenizer_path": str(source)}


def copy_of_run(config, target: pathlib.Path) -> None:
  """Puts it there. Raises OSError."""
  if name := _file_name(config):
    target.mkdir(exist_ok=True)
    shutil.copyfile(config.tokenizer_path, target / name)
  elif config.tokenizer_path:
    copy(pathlib.Path(config.tokenizer_path), target)


def _file_name(config) -> str:
  """Of a tokenizer that is one file; none for others."""
  source, kind = pathlib.Path(config.tokenizer_path or ""), config.tokenizer_type.value
  if kind not in _FILES or not source.is_file():
    return ""
  return source.name if kind != "tiktoken" or kind in source.name else f"{source.name}.{kind}"  # MaxText asks for it


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Its files, where the source has one. Raises OSError."""
  if keys(source):
    target.mkdir(exist_ok=True)
    for file in (source / name for name in (*_MAIN, *_BESIDE)):
      if file.is_file():
        shutil.copyfile(file, target / file.name)
