"""Parts of the tests, so that the slow ones can be run over time: `make test-slow SHARD=2/6`."""

import re
import zlib


def parse(shard: str) -> tuple[int, int]:
  """(k, n) of "k/n"; raises ValueError for anything else."""
  found = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
  if not found or not 1 <= int(found[1]) <= int(found[2]):
    raise ValueError(f"SHARD={shard} is not a part of the tests; write k/n with k from 1 to n, as 2/6.")
  return int(found[1]), int(found[2])


def holds(shard: tuple[int, int], test: str) -> bool:
  """Whether the part has a test of this name. By its hash: a test that is added or removed moves no other one."""
  part, parts = shard
  return zlib.crc32(test.encode()) % parts == part - 1
