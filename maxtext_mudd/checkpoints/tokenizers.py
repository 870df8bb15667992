"""Copies a model's tokenizer into its model folder, and gives MaxText's keys for it.

A tokenizer is a Hugging Face folder, or one file of SentencePiece or tiktoken.
"""

from collections.abc import Mapping
import json
import pathlib
import shutil
from typing import Any

_MAIN = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # a folder with one of these has a tokenizer
_SETTINGS = "tokenizer_config.json"
_OPTIONAL = (_SETTINGS, "special_tokens_map.json", "added_tokens.json", "merges.txt")
_OPTIONAL += ("chat_template.jinja",)
_NAMES_OF_4 = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # transformers 4 does not know the former; 5 knows both
_SINGLE_FILE_TYPES = ("sentencepiece", "tiktoken")


def keys(folder: pathlib.Path) -> dict[str, Any]:
  """MaxText's keys for the Hugging Face tokenizer in a folder; empty if there is none."""
  if not any((folder / name).is_file() for name in _MAIN):
    return {}
  return {"tokenizer_path": str(folder), "tokenizer_type": "huggingface"}


def config_fields(folder: pathlib.Path) -> dict[str, int | str]:
  """The fields of `config.json` for the Hugging Face tokenizer in a folder: the ids of BOS, EOS and padding, and
  `tokenizer_class`, without which pipelines of transformers 4 load no tokenizer; empty if there is none."""
  if not keys(folder):
    return {}
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  fields = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
  if (settings := folder / _SETTINGS).is_file():
    fields["tokenizer_class"] = json.loads(settings.read_text()).get("tokenizer_class")
    fields["tokenizer_class"] = _NAMES_OF_4.get(fields["tokenizer_class"], fields["tokenizer_class"])
  return {name: value for name, value in fields.items() if value is not None}


def moved_keys(model_keys: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """MaxText's keys for a tokenizer that is now in `folder`. The path in the model's keys may be an old one."""
  file = folder / pathlib.Path(str(model_keys.get("tokenizer_path") or "")).name
  if model_keys.get("tokenizer_type") in _SINGLE_FILE_TYPES and file.is_file():
    return {"tokenizer_path": str(file)}
  return keys(folder)


def run_keys(config, target: pathlib.Path) -> dict[str, Any]:
  """MaxText's keys for the tokenizer of a run after `copy_run_tokenizer` has copied it to `target`.

  The keys are empty if the run's tokenizer does not exist on this machine.
  """
  source = pathlib.Path(config.tokenizer_path or "").absolute()
  if not config.tokenizer_path or not source.exists():
    return {}
  if name := _file_name(config):
    return {"tokenizer_path": str(target / name), "tokenizer_type": config.tokenizer_type.value}
  if keys(source):
    return {"tokenizer_path": str(target), "tokenizer_type": "huggingface"}
  return {"tokenizer_path": str(source)}


def copy_run_tokenizer(config, target: pathlib.Path) -> None:
  """Copies the tokenizer of a run into the folder `target`, if it exists on this machine. Raises OSError."""
  if name := _file_name(config):
    target.mkdir(exist_ok=True)
    shutil.copyfile(config.tokenizer_path, target / name)
  elif config.tokenizer_path:
    copy(pathlib.Path(config.tokenizer_path), target)


def _file_name(config) -> str:
  """The file name, in a model folder, of a tokenizer that is one file; empty for other tokenizers."""
  source, tokenizer_type = pathlib.Path(config.tokenizer_path or ""), config.tokenizer_type.value
  if tokenizer_type not in _SINGLE_FILE_TYPES or not source.is_file():
    return ""
  if tokenizer_type == "tiktoken" and "tiktoken" not in source.name:  # MaxText recognizes the type by the name
    return f"{source.name}.tiktoken"
  return source.name


def export(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the files of a Hugging Face tokenizer, if the source folder has one, so that transformers 4 loads it, too.

  Raises:
    OSError: a file cannot be read or written.
  """
  copy(source, target)
  if (settings := target / _SETTINGS).is_file():
    fields = json.loads(settings.read_text())
    if name := _NAMES_OF_4.get(fields.get("tokenizer_class")):
      settings.write_text(json.dumps(fields | {"tokenizer_class": name}, indent=2))


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the files of a Hugging Face tokenizer, if the source folder has one. Raises OSError."""
  if keys(source):
    target.mkdir(exist_ok=True)
    for file in (source / name for name in (*_MAIN, *_OPTIONAL)):
      if file.is_file():
        shutil.copyfile(file, target / file.name)
