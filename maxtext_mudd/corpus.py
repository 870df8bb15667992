"""Builds the default corpus from the source code of Python's standard library.

    python3 -m maxtext_mudd.corpus FOLDER

It writes FOLDER/train.parquet and FOLDER/eval.parquet. A hash of its path decides to which of the two a file goes, so
the same standard library always gives the same rows. A row has at most PIECE_BYTES bytes of one file. With the byte
tokenizer it is one sequence, a <bos> and its bytes. So every byte is predicted once, and loss / ln 2 is bits per byte.
"""

from collections.abc import Iterator
import hashlib
import pathlib
import random
import sys
import sysconfig

from absl import app
import pyarrow as pa
import pyarrow.parquet

PIECE_BYTES = 255
EVAL_PERIOD = 20  # one file in this many is for evaluation
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib2to3"}
TEXT_COLUMN = "text"


def source_files(library: pathlib.Path) -> list[pathlib.Path]:
  """The paths of the library's .py files, relative to it and sorted."""
  paths = (path.relative_to(library) for path in library.rglob("*.py"))
  return sorted(path for path in paths if not EXCLUDED_FOLDERS.intersection(path.parts))


def is_eval(path: pathlib.Path) -> bool:
  return int(hashlib.sha256(path.as_posix().encode()).hexdigest(), 16) % EVAL_PERIOD == 0


def pieces(text: str) -> Iterator[str]:
  """Splits a text, between characters, into pieces of at most PIECE_BYTES bytes of UTF-8."""
  data = text.encode()
  start = 0
  while start < len(data):
    end = min(start + PIECE_BYTES, len(data))
    while end < len(data) and data[end] & 0xC0 == 0x80:  # a byte inside of a character
      end -= 1
    yield data[start:end].decode()
    start = end


def read(path: pathlib.Path) -> str | None:
  """The text of a file; None if it is not UTF-8, as some test data of the library are not."""
  try:
    return path.read_bytes().decode()
  except UnicodeDecodeError:
    return None


def build(library: pathlib.Path, folder: pathlib.Path) -> dict[str, int]:
  """Writes train.parquet and eval.parquet into `folder`.

  Args:
    library: the folder of Python's standard library.

  Returns:
    The number of bytes of text for "train" and for "eval".

  Raises:
    ValueError: the library has no source files for one of the two.
  """
  rows = {"train": [], "eval": []}
  for path in source_files(library):
    text = read(library / path)
    if text is not None:
      rows["eval" if is_eval(path) else "train"].extend(pieces(text))
  for split, texts in rows.items():
    if not texts:
      raise ValueError(f"{library}: no Python sources for the {split} split; pass a complete standard library.")
  return write(rows, folder)


def write(rows: dict[str, list[str]], folder: pathlib.Path) -> dict[str, int]:
  """Shuffles the rows of each split and writes them to SPLIT.parquet in `folder`.

  Returns:
    The number of bytes of text by split.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for split, texts in rows.items():
    random.Random(0).shuffle(texts)
    incomplete = folder / f"{split}.parquet.part"
    pa.parquet.write_table(pa.table({TEXT_COLUMN: texts}), incomplete)
    incomplete.rename(folder / f"{split}.parquet")
  return {split: sum(len(text.encode()) for text in texts) for split, texts in rows.items()}


def main(argv: list[str]) -> None:
  if len(argv) != 2:
    sys.exit("usage: python3 -m maxtext_mudd.corpus FOLDER")
  sizes = build(pathlib.Path(sysconfig.get_path("stdlib")), pathlib.Path(argv[1]))
  print(f"{argv[1]}: {sizes['train'] / 1e6:.1f} MB to train on, {sizes['eval'] / 1e6:.1f} MB to evaluate on.")


if __name__ == "__main__":
  app.run(main)
