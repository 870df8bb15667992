"""Megatron's .bin and .idx pairs, checked by their headers and sizes."""

import pathlib
import struct

from maxtext.input_pipeline import _mmap_datasource as maps
import numpy as np

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the type, sequences, documents


def fault(prefix: str) -> str:
  """What is wrong with the pair `prefix`.bin and `prefix`.idx, as the end of a sentence; empty if nothing is.

  Sums the sizes of all documents, which MaxText does, too: a second for the Pile's 210 million.
  """
  index, tokens = pathlib.Path(f"{prefix}.idx"), pathlib.Path(f"{prefix}.bin")
  if not index.is_file():
    return f"{index} is missing; a .bin file is read with its .idx file."
  if not tokens.is_file():
    return f"{tokens} is missing; an .idx file describes a .bin file."
  size = index.stat().st_size
  if size < _HEADER.size:
    return f"{index} has {size} bytes, fewer than the {_HEADER.size} of its header; write it again."
  with index.open("rb") as file:
    magic, version, code, sequences, documents = _HEADER.unpack(file.read(_HEADER.size))
  if magic != maps.MMAP_INDEX_MAGIC:
    return f"{index} does not begin with {maps.MMAP_INDEX_MAGIC!r}, so it is not an index of Megatron; name another."
  if version != maps.MMAP_INDEX_VERSION:
    return f"{index} has version {version}; MaxText reads version {maps.MMAP_INDEX_VERSION}."
  dtype = np.dtype(maps.DTYPE_CODES.get(code, np.float32))
  if dtype.kind not in "iu":
    known = ", ".join(f"{known} ({np.dtype(x)})" for known, x in maps.DTYPE_CODES.items() if np.dtype(x).kind in "iu")
    return f"{index} has the type code {code}; tokens have one of {known}."
  expected = _HEADER.size + sequences * (4 + 8) + documents * 8  # a size and an offset each; where documents start
  if size not in (expected, expected + 8):  # some writers do not count the end of the last document
    described = f"{sequences} sequences and {documents} documents"
    return f"{index} has {size} bytes, which do not fit the {described} of its header; write it again."
  if not sequences:
    return f"{index} says that {tokens} holds no documents; write both again."
  sizes = np.memmap(index, "<i4", mode="r", offset=_HEADER.size, shape=(sequences,))
  expected, size = int(sizes.sum(dtype=np.int64)) * dtype.itemsize, tokens.stat().st_size
  if size != expected:
    return f"{tokens} has {size} bytes, and {index.name} describes {expected}; copy or write both again."
  return ""
