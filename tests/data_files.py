"""Files of text and tokens for the tests."""

import pathlib
import struct

import numpy as np


def write_pair(prefix: pathlib.Path | str, documents: list[np.ndarray]) -> None:
  """Megatron's indexed data set: the tokens one after another, and where each document starts."""
  sizes = [len(document) for document in documents]
  starts = np.cumsum([0, *sizes[:-1]]) * 2
  with open(f"{prefix}.bin", "wb") as file:
    file.write(np.concatenate(documents).astype("<u2").tobytes())
  with open(f"{prefix}.idx", "wb") as file:
    file.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 8))  # version 1, unsigned 16 bits
    file.write(struct.pack("<QQ", len(sizes), len(sizes) + 1))
    file.write(np.asarray(sizes, "<i4").tobytes() + np.asarray(starts, "<i8").tobytes())
    file.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
