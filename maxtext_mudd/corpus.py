"""Builds the default corpus from the Python standard library's own sources: `python3 -m maxtext_mudd.corpus FOLDER`.

Every row is at most PIECE_BYTES bytes of one file, so that with the byte tokenizer a row is one sequence (a <bos> and
its bytes), every byte is predicted once, and loss / ln 2 is bits per byte. Files go to train or eval by a hash of
their path; the same standard library always gives the same rows.
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
EVAL_SHARE = 20  # one file in this many
EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "lib2to3"}
TEXT_COLUMN = "text"


def source_files(library: pathlib.Path) -> list[pathlib.Path]:
  """The library's .py files, relative to it, in a fixed order."""
  found = (path.relative_to(library) for path in library.rglob("*.py"))
  return sorted(path for path in found if not EXCLUDED.intersection(path.parts))


def is_eval(path: pathlib.Path) -> bool:
  return int(hashlib.sha256(path.as_posix().encode()).hexdigest(), 16) % EVAL_SHARE == 0


def pieces(text: str) -> Iterator[str]:
  """The text in pieces of at most PIECE_BYTES bytes of UTF-8, cut between characters."""
  data = text.encode()
  start = 0
  while start < len(data):
    end = min(start + PIECE_BYTES, len(data))
    while end < len(data) and data[end] & 0xC0 == 0x80:
      end -= 1
    yield data[start:end].decode()
    start = end


def read(path: pathlib.Path) -> str | None:
  """The text of a file; None if it is not UTF-8 (some test data is not)."""
  try:
    return path.read_bytes().decode()
  except UnicodeDecodeError:
    return None


def build(library: pathlib.Path, folder: pathlib.Path) -> dict[str, int]:
  """Writes train.parquet and eval.parquet into `folder`; returns the bytes of text in each.

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
  """Writes the rows of each split, shuffled, to SPLIT.parquet in `folder`; returns the bytes of text in each."""
  folder.mkdir(parents=True, exist_ok=True)
  for split, texts in rows.items():
    random.Random(0).shuffle(texts)
    part = folder / f"{split}.parquet.part"
    pa.parquet.write_table(pa.table({TEXT_COLUMN: texts}), part)
    part.rename(folder / f"{split}.parquet")
  return {split: sum(len(text.encode()) for text in texts) for split, texts in rows.items()}


def main(argv: list[str]) -> None:
  if len(argv) != 2:
    sys.exit("usage: python3 -m maxtext_mudd.corpus FOLDER")
  sizes = build(pathlib.Path(sysconfig.get_path("stdlib")), pathlib.Path(argv[1]))
  print(f"{argv[1]}: {sizes['train'] / 1e6:.1f} MB to train on, {sizes['eval'] / 1e6:.1f} MB to evaluate on.")


if __name__ == "__main__":
  app.run(main)
