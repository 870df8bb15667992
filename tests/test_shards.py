"""Parts of the tests: each test is in exactly one, and a wrong part is refused."""

import subprocess
import sys

import pytest

from tests import runs, shards

TESTS = [
  f"tests/test_{file}.py::test_{i}[{case}]" for file in "abc" for i in range(40) for case in ("single", "scanned")
]


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_every_test_is_in_one_part(parts):
  found = [[x for x in TESTS if shards.holds(shards.parse(f"{part}/{parts}"), x)] for part in range(1, parts + 1)]
  assert sorted(x for part in found for x in part) == sorted(TESTS)
  assert min(map(len, found)) > len(TESTS) / parts / 2


@pytest.mark.parametrize("shard", ["", "2", "0/6", "7/6", "a/b", "1/0", "-1/6", "2/6/7"])
def test_what_is_no_part(shard):
  with pytest.raises(
    ValueError, match=f"^SHARD={shard} is not a part of the tests; write k/n with k from 1 to n, as 2/6."
  ):
    shards.parse(shard)


def test_pytest_runs_a_part():
  """Here of the tests of this file; and it refuses a wrong part in one sentence, before it imports anything."""

  def collect(shard):
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/test_shards.py", f"--shard={shard}"]
    return subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True)

  found = [x for x in collect("1/2").stdout.splitlines() if "::" in x]
  assert 0 < len(found) < 3 + 8 + 1
  assert all(shards.holds((1, 2), x) for x in found)
  wrong = collect("3/2")
  assert wrong.returncode == pytest.ExitCode.USAGE_ERROR
  assert wrong.stderr.strip() == "ERROR: SHARD=3/2 is not a part of the tests; write k/n with k from 1 to n, as 2/6."
