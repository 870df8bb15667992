"""Which files of text or tokens a configuration reads."""

from collections.abc import Iterator
import dataclasses
import glob
import os
import pathlib
import re

from maxtext_mudd import assets
from maxtext_mudd.config.errors import ConfigError

REMOTE = "://"
_LOADER_OF_ENDING = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
LOCAL_LOADERS = ("arrow", "csv", "json", "parquet", "text")  # of `datasets`; any other hf_path names a hub's files


@dataclasses.dataclass(frozen=True)
class Columns:
  """The columns of a table that a run reads.

  Attributes:
    names: their names.
    tokenize_key: the key that says whether they hold text.
    tokenize: the value of that key. True: text, which MaxText tokenizes. False: tokens.
  """

  names: tuple[str, ...]
  tokenize_key: str
  tokenize: bool


def cache_folder() -> pathlib.Path:
  """Where `text_files` keeps converted text; it can be deleted at any time that no run reads it."""
  # Not Path.expanduser, which raises for users without a home folder, whatever data they read.
  caches = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  return pathlib.Path(caches).absolute() / "maxtext-mudd" / "text"


def splits(config) -> tuple[str, ...]:
  """Of which data a run reads: for training and, if there is an evaluation, for it."""
  return ("train", "eval") if config.eval_interval > 0 else ("train",)


def data_files(config) -> Iterator[tuple[str, str]]:
  """The keys by which a user names the data files of this configuration, with their values.

  Nothing is yielded for a hub's data sets, for synthetic data, and for `mmap_npy`, which names folders and index files.
  """
  for split in splits(config):
    if key := _key(config, split):
      yield key, getattr(config, key) or ""


def check(config) -> None:
  """Raises ConfigError for local files that are not named, are not there, or have the ending of another format."""
  named_by_hf = config.hf_train_files and not config.grain_train_files
  if config.dataset_type == "grain" and named_by_hf and config.hf_path not in LOCAL_LOADERS:
    raise ConfigError(f"hf_path={config.hf_path} is not a format of local files; set it to {', '.join(LOCAL_LOADERS)}.")
  for key, value in data_files(config):
    if not value and key.startswith("hf"):  # of grain, MaxText says it itself
      without = ", or eval_interval=-1 for a run without evaluation" if "eval" in key else ""
      raise ConfigError(f"{key}='' names no data; set it to files, or to a pattern that matches files{without}.")
    for pattern, weight in entries(key, value) if value else ():
      if REMOTE in pattern:
        continue
      if weight and not re.fullmatch(r"[0-9.eE+-]+", weight):
        raise ConfigError(f"{key}={pattern},{weight}: {weight!r} is not a weight; write pattern,number.")
      files = matches(key, pattern, config)
      if not files:
        raise ConfigError(f"{key}={pattern}: no such file; {_readme()} says where data comes from.")
      for file in files if file_type(key, config) == "text" else ():
        if other := _LOADER_OF_ENDING.get(file.suffix):
          raise ConfigError(f"{key}={file} is not plain text by its ending; set hf_path={other}, or rename the file.")


def _readme() -> str:
  """Where the page about data is: as a path from here, if it is below."""
  path = assets.CONFIGURATIONS / "README.md"
  return str(path.relative_to(pathlib.Path.cwd()) if path.is_relative_to(pathlib.Path.cwd()) else path)


def _key(config, split: str) -> str:
  local = config.hf_path in LOCAL_LOADERS
  key, hf_key = f"grain_{split}_files", f"hf_{split}_files"
  if config.dataset_type == "hf":
    return hf_key if local else ""
  if config.dataset_type != "grain" or config.grain_file_type == "mmap_npy":
    return ""
  # MaxText itself takes `hf_path` for Grain's parquet files where no files are named. `text_files` sets the key then.
  files = getattr(config, key)
  named_by_hf = not files or files == getattr(config, hf_key) or files.startswith(glob.escape(str(cache_folder())))
  return hf_key if local and config.grain_file_type == "parquet" and named_by_hf else key


def named(split: str, config) -> str:
  """The key and value by which a user names the data of `train` or `eval`."""
  for key, value in data_files(config):
    if split in key and value:
      return f"{key}={value}"
  key = {"grain": f"grain_{split}_files", "hf": "hf_path"}.get(config.dataset_type, "dataset_type")
  value = getattr(config, key)
  return f"{key}={getattr(value, 'value', value)}"


def file_type(key: str, config) -> str:
  """The format of the files that a key of `data_files` names: one of `LOCAL_LOADERS`, or a `grain_file_type`."""
  return config.hf_path if key.startswith("hf") else config.grain_file_type


def columns(key: str, config) -> Columns:
  """The columns that MaxText reads from the files of a key of `data_files`."""
  split = "eval" if "eval" in key else "train"
  tokenize_key = f"tokenize_{split}_data"
  return Columns(tuple(getattr(config, f"{split}_data_columns")), tokenize_key, getattr(config, tokenize_key))


def entries(key: str, value: str) -> list[tuple[str, str]]:
  """The patterns that the value of a key names, each with its weight in a mixture, which is empty if there is none."""
  if key.startswith("hf"):
    return [(value, "")]  # one pattern, in which a comma is part of a name
  return [(pattern, weight) for pattern, _, weight in (entry.partition(",") for entry in value.split(";"))]


def map_prefixes(pattern: str) -> list[str]:
  """The paths of Megatron's .bin and .idx pairs without these endings: MaxText takes the path of a pair or a folder."""
  if os.path.isdir(pattern) and not os.path.isfile(f"{pattern}.idx"):
    return [name.removesuffix(".idx") for name in sorted(glob.glob(os.path.join(glob.escape(pattern), "*.idx")))]
  return [pattern] if os.path.isfile(f"{pattern}.bin") or os.path.isfile(f"{pattern}.idx") else []


def matches(key: str, pattern: str, config) -> list[pathlib.Path]:
  """What a local pattern names, in the order of names; pairs of Megatron are named by their .idx files."""
  if file_type(key, config) == "mmap":
    return [pathlib.Path(f"{prefix}.idx") for prefix in map_prefixes(pattern)]
  is_grain = config.dataset_type == "grain"
  # In `datasets`, and where `text_files` reads for Grain, ** stands for any number of folders; in MaxText for one.
  recursive = key.startswith("hf") and not (is_grain and file_type(key, config) == "parquet")
  return sorted(map(pathlib.Path, glob.glob(os.path.expanduser(pattern), recursive=recursive)))


def local_files(key: str, value: str, config) -> list[pathlib.Path]:
  """The local files that the patterns of a key name; remote patterns are left out."""
  patterns = [pattern for pattern, _ in entries(key, value) if REMOTE not in pattern]
  return list(dict.fromkeys(file for pattern in patterns for file in matches(key, pattern, config) if file.is_file()))
