"""Reads from a configuration which files of text or tokens a run uses, of what format, and which of their columns.

`file_keys` yields the keys that name data files, `patterns` splits the value of such a key, and `matches` and
`local_files` list the files that exist. `check` refuses values that name no usable file.
"""

from collections.abc import Iterator
import dataclasses
import glob
import os
import pathlib
import re

from maxtext_mudd import assets
from maxtext_mudd.config.errors import ConfigError

_FORMATS_BY_ENDING = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
# Loaders of `datasets` for local files. Any other hf_path names a data set of the Hugging Face hub.
LOCAL_FORMATS = ("arrow", "csv", "json", "parquet", "text")


@dataclasses.dataclass(frozen=True)
class Columns:
  """The columns of a table that a run reads.

  Attributes:
    names: the names of the columns.
    tokenize_key: the key that says whether the columns hold text: tokenize_train_data or tokenize_eval_data.
    tokenize: the value of that key. True: the columns hold text, which MaxText tokenizes. False: they hold tokens.
  """

  names: tuple[str, ...]
  tokenize_key: str
  tokenize: bool


def is_remote(path: str) -> bool:
  """Whether a path or pattern is a URL, such as gs://bucket/file, which no check opens."""
  return "://" in path


def cache_folder() -> pathlib.Path:
  """The folder in which `text_files` keeps converted text. It can be deleted whenever no run reads it."""
  # Path.expanduser would raise for users without a home folder, even if their data need no cache.
  caches = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  return pathlib.Path(caches).absolute() / "maxtext-mudd" / "text"


def splits(config) -> tuple[str, ...]:
  """The splits that a run reads: "train" and, if it evaluates, "eval"."""
  return ("train", "eval") if config.eval_interval > 0 else ("train",)


def file_keys(config) -> Iterator[tuple[str, str]]:
  """Yields each key by which this configuration names data files, with its value.

  It yields nothing for a data set of the hub, for synthetic data, and for `mmap_npy`, whose keys name folders and index
  files.
  """
  for split in splits(config):
    if key := _file_key(config, split):
      yield key, getattr(config, key) or ""


def check(config) -> None:
  """Raises ConfigError for local files that are not named, do not exist, or have the ending of another format."""
  uses_hf_key = config.hf_train_files and not config.grain_train_files
  if config.dataset_type == "grain" and uses_hf_key and config.hf_path not in LOCAL_FORMATS:
    raise ConfigError(f"hf_path={config.hf_path} is not a format of local files; set it to {', '.join(LOCAL_FORMATS)}.")
  for key, value in file_keys(config):
    if not value and key.startswith("hf"):  # MaxText refuses an empty grain_*_files itself
      no_evaluation = ", or set eval_interval=-1 for a run without evaluation" if "eval" in key else ""
      raise ConfigError(f"{key}='' names no data; set it to files, or to a pattern that matches files{no_evaluation}.")
    for pattern, weight in patterns(key, value) if value else ():
      if not is_remote(pattern):
        _check_pattern(key, pattern, weight, config)


def _check_pattern(key: str, pattern: str, weight: str, config) -> None:
  if weight and not re.fullmatch(r"[0-9.eE+-]+", weight):
    raise ConfigError(f"{key}={pattern},{weight}: {weight!r} is not a weight; write pattern,number.")
  files = matches(key, pattern, config)
  if not files:
    raise ConfigError(f"{key}={pattern}: no such file; {_data_readme()} says where data comes from.")
  for file in files if file_type(key, config) == "text" else ():
    if other_format := _FORMATS_BY_ENDING.get(file.suffix):
      raise ConfigError(
        f"{key}={file} is not plain text by its ending; set hf_path={other_format}, or rename the file."
      )


def _data_readme() -> str:
  """The path of the page about data, relative to the current folder if it is below that."""
  path = assets.CONFIGURATIONS / "README.md"
  return str(path.relative_to(pathlib.Path.cwd()) if path.is_relative_to(pathlib.Path.cwd()) else path)


def _file_key(config, split: str) -> str:
  """The key that names the files of a split; empty if no key does."""
  is_local_format = config.hf_path in LOCAL_FORMATS
  key, hf_key = f"grain_{split}_files", f"hf_{split}_files"
  if config.dataset_type == "hf":
    return hf_key if is_local_format else ""
  if config.dataset_type != "grain" or config.grain_file_type == "mmap_npy":
    return ""
  # With Grain, hf_{split}_files names the files where grain_{split}_files is empty. `text_files` sets the latter then.
  files = getattr(config, key)
  uses_hf_key = not files or files == getattr(config, hf_key) or files.startswith(glob.escape(str(cache_folder())))
  return hf_key if is_local_format and config.grain_file_type == "parquet" and uses_hf_key else key


def describe(split: str, config) -> str:
  """The key and value, as "key=value", by which a configuration names the data of "train" or "eval"."""
  for key, value in file_keys(config):
    if split in key and value:
      return f"{key}={value}"
  key = {"grain": f"grain_{split}_files", "hf": "hf_path"}.get(config.dataset_type, "dataset_type")
  value = getattr(config, key)
  return f"{key}={getattr(value, 'value', value)}"


def file_type(key: str, config) -> str:
  """The format of the files that a key of `file_keys` names: one of `LOCAL_FORMATS`, or a `grain_file_type`."""
  return config.hf_path if key.startswith("hf") else config.grain_file_type


def columns(key: str, config) -> Columns:
  """The columns that MaxText reads from the files that a key of `file_keys` names."""
  split = "eval" if "eval" in key else "train"
  tokenize_key = f"tokenize_{split}_data"
  return Columns(tuple(getattr(config, f"{split}_data_columns")), tokenize_key, getattr(config, tokenize_key))


def patterns(key: str, value: str) -> list[tuple[str, str]]:
  """The patterns in the value of a key, each with the text of its weight in a mixture, or "" if it has no weight."""
  if key.startswith("hf"):
    return [(value, "")]  # one pattern: `datasets` takes a comma as a part of the name
  return [(pattern, weight) for pattern, _, weight in (entry.partition(",") for entry in value.split(";"))]


def _megatron_prefixes(pattern: str) -> list[str]:
  """The paths of Megatron's .bin and .idx pairs, without these endings.

  Args:
    pattern: what MaxText takes: the path of one pair without its ending, or a folder of pairs.
  """
  if os.path.isdir(pattern) and not os.path.isfile(f"{pattern}.idx"):
    return [name.removesuffix(".idx") for name in sorted(glob.glob(os.path.join(glob.escape(pattern), "*.idx")))]
  return [pattern] if os.path.isfile(f"{pattern}.bin") or os.path.isfile(f"{pattern}.idx") else []


def matches(key: str, pattern: str, config) -> list[pathlib.Path]:
  """The paths that a local pattern matches, sorted by name. A pair of Megatron files is given by its .idx file."""
  if file_type(key, config) == "mmap":
    return [pathlib.Path(f"{prefix}.idx") for prefix in _megatron_prefixes(pattern)]
  is_grain = config.dataset_type == "grain"
  # ** stands for any number of folders in `datasets`, and where `text_files` reads for Grain. In MaxText it is one *.
  recursive = key.startswith("hf") and not (is_grain and file_type(key, config) == "parquet")
  return sorted(map(pathlib.Path, glob.glob(os.path.expanduser(pattern), recursive=recursive)))


def local_files(key: str, value: str, config) -> list[pathlib.Path]:
  """The local files that the patterns of a key match, without repetitions. Remote patterns are left out."""
  local_patterns = [pattern for pattern, _ in patterns(key, value) if not is_remote(pattern)]
  paths = (path for pattern in local_patterns for path in matches(key, pattern, config))
  return list(dict.fromkeys(path for path in paths if path.is_file()))
