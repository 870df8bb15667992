"""Checks Megatron's pairs of a .bin file, which holds tokens, and an .idx file, which says where documents are.

Reads the header of the .idx file and the sizes of both files, not the tokens.
"""

import pathlib
import struct

from maxtext.input_pipeline import _mmap_datasource as mmap_datasource
import numpy as np

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the token type, number of sequences, number of documents


def fault(prefix: str) -> str:
  """What is wrong with the pair `prefix`.bin and `prefix`.idx, as the end of a sentence; empty if nothing is.

  Sums the sizes of all documents, as MaxText does. For the Pile's 210 million documents that takes a second.
  """
  index, tokens = pathlib.Path(f"{prefix}.idx"), pathlib.Path(f"{prefix}.bin")
  if not index.is_file():
    return f"{index} is missing; a .bin file is read with its .idx file."
  if not tokens.is_file():
    return f"{tokens} is missing; an .idx file describes a .bin file."
  index_bytes = index.stat().st_size
  if index_bytes < _HEADER.size:
    return f"{index} has {index_bytes} bytes, fewer than the {_HEADER.size} of its header; write it again."
  with index.open("rb") as file:
    magic, version, type_code, sequences, documents = _HEADER.unpack(file.read(_HEADER.size))
  if magic != mmap_datasource.MMAP_INDEX_MAGIC:
    return (
      f"{index} does not begin with {mmap_datasource.MMAP_INDEX_MAGIC!r}, so it is not an index of Megatron; name "
      "another."
    )
  if version != mmap_datasource.MMAP_INDEX_VERSION:
    return f"{index} has version {version}; MaxText reads version {mmap_datasource.MMAP_INDEX_VERSION}."
  token_types = {code: np.dtype(x) for code, x in mmap_datasource.DTYPE_CODES.items() if np.dtype(x).kind in "iu"}
  if type_code not in token_types:
    known_codes = ", ".join(f"{code} ({dtype})" for code, dtype in token_types.items())
    return f"{index} has the type code {type_code}; tokens have one of {known_codes}."
  # For each sequence a size of 4 bytes and an offset of 8; for each document the 8 bytes of its start.
  expected = _HEADER.size + sequences * (4 + 8) + documents * 8
  if index_bytes not in (expected, expected + 8):  # some writers do not count the end of the last document
    counts = f"{sequences} sequences and {documents} documents"
    return f"{index} has {index_bytes} bytes, which do not fit the {counts} of its header; write it again."
  if not sequences:
    return f"{index} says that {tokens} holds no documents; write both again."
  sizes = np.memmap(index, "<i4", mode="r", offset=_HEADER.size, shape=(sequences,))
  expected, token_bytes = int(sizes.sum(dtype=np.int64)) * token_types[type_code].itemsize, tokens.stat().st_size
  if token_bytes != expected:
    return f"{tokens} has {token_bytes} bytes, and {index.name} describes {expected}; copy or write both again."
  return ""
