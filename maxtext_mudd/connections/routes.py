"""Which entries of the buffers of carries each stage of a pipeline passes on to the next. Pure Python.

Stage s of S runs the blocks from s·L/S + 1 on. Before them its buffer holds entries that earlier stages made, behind
them also those that it made. An entry crosses a boundary if a later stage reads it: each boundary once, and none behind
its last reader.
"""

from collections.abc import Mapping
import dataclasses
import itertools

from maxtext_mudd import connections
from maxtext_mudd.blocks import num_blocks
from maxtext_mudd.blocks.stacks import num_stages

Pairs = tuple[tuple[int, int], ...]  # (stage, next stage), as `jax.lax.ppermute` takes them


@dataclasses.dataclass(frozen=True)
class Routes:
  """What crosses the boundaries of a pipeline besides the arrays that always do.

  Attributes:
    starts: by stage, how many entries its buffer holds before its first block.
    given: by the boundaries that they cross after a stage was given them, the entries. They do not wait for a block.
    made: boundaries that the first entry that a stage makes crosses, then the second, and so on.
  """

  starts: tuple[int, ...]
  given: Mapping[Pairs, tuple[int, ...]]
  made: tuple[Pairs, ...]


def routes(config) -> Routes:
  """The routes of a configuration whose number of blocks is a multiple of the number of stages."""
  stages = num_stages(config)
  length = num_blocks(config) // stages
  held = [connections.family(config).held(config, stage * length) for stage in range(stages + 1)]
  starts = tuple(x.number for x in held[:-1])
  crossing = [set(x.read) for x in held[1:-1]]  # the boundary behind each stage but the last
  given = {}
  for entry in range(starts[-1]):
    pairs = tuple((s, s + 1) for s, read in enumerate(crossing) if entry in read and entry < starts[s])
    if pairs:
      given.setdefault(pairs, []).append(entry)
  number = max(after.number - before.number for before, after in itertools.pairwise(held))
  made = (tuple((s, s + 1) for s, read in enumerate(crossing) if starts[s] + k in read) for k in range(number))
  return Routes(starts, {pairs: tuple(entries) for pairs, entries in given.items()}, tuple(made))
