"""The files of yaml/practice: their DAs, written out."""

import pytest

from maxtext_mudd import connections
from maxtext_mudd.complexity import sizes
from tests import runs

L = 24
ALL = {i: tuple(range(i + 1)) for i in range(1, L + 1)}
# By file: (sources, streams) by the block that a DA follows, and keys.
EVERY_SECOND = {i: (ALL[i], "qkvr") for i in (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23)} | {24: (ALL[24], "r")}
SPEEDRUN = {22: ((0, 20, 21, 22), "vr"), 23: ((0, 20, 22, 23), "vr")}
CONTEST = {
  2: ((0, 1, 2), "x"),
  5: (ALL[5], "x"),
  8: ((0, 7, 8), "x"),
  11: (ALL[11], "x"),
  14: ((0, 13, 14), "x"),
  17: (ALL[17], "vr"),
  20: (ALL[20], "vr"),
  23: (ALL[23], "x"),
}
FILES = {
  "every_second_405m": (EVERY_SECOND, {"mudd_post_norm": True, "mudd_pre_norm": False, "mudd_static_start": "zero"}),
  "speedrun_trimmed_405m": (SPEEDRUN, {"mudd_learning_rate_factor": 0.25}),
  "contest_ways_405m": (CONTEST, {}),
}


@pytest.mark.parametrize("name", FILES)
def test_placements(name):
  expected, keys = FILES[name]
  config = sizes.read(["", str(runs.ROOT / "yaml" / "practice" / f"{name}.yml")])
  found = connections.plan(config).sites
  assert {block: (site.sources, site.streams) for block, site in found.items()} == expected
  assert {key: getattr(config, key) for key in keys} == keys
  shared = {site.mlp for site in found.values()}
  assert shared == ({"late"} if name == "speedrun_trimmed_405m" else {None})


def test_every_file_is_written_out():
  assert {x.stem for x in (runs.ROOT / "yaml" / "practice").glob("*.yml")} == set(FILES)
