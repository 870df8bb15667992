"""Writes the table of decoder blocks and features in docs/decoders.md from the results of tests.

PYTEST_ADDOPTS=--junitxml=fast.xml make test
PYTEST_ADDOPTS=--junitxml=slow.xml make test-slow
.venv/bin/python docs/decoders.py fast.xml slow.xml

A field that these results say nothing of stays as it is, so that the tests of one feature can be run alone. Give all
results of that feature: a field says "yes" when those that are given passed.
"""

import collections
import pathlib
import sys
import xml.etree.ElementTree as ET

PAGE = pathlib.Path(__file__).parent / "decoders.md"
BEGIN, END = "<!-- written by docs/decoders.py -->", "<!-- end -->"
EACH_STREAM = "each stream matters"
# By feature, the tests that show it.
FEATURES = {
  "starts as stock": [
    "test_blocks.test_starts_as_the_stock_model",
    "test_simple_blocks.test_starts_as_the_stock_model",
  ],
  "equals the float64 reference": ["test_blocks.test_equals_the_oracle", "test_simple_blocks.test_equals_the_oracle"],
  EACH_STREAM: [
    "test_block_layers.test_each_stream_of_a_layer_matters",
    "test_blocks.test_equals_the_oracle",  # which swaps streams
  ],
  "gradient by finite differences": ["test_block_layers.test_gradient"],
  "scanned = single": ["test_scan.test_same_as_single_layers"],
  "trains": [
    "test_block_layers.test_trains",
    "test_simple_blocks.test_trains",
    "test_block_runs.test_trains_by_the_launcher",
  ],
  "decodes": [
    "test_block_layers.test_generates_what_teacher_forcing_says",
    "test_simple_blocks.test_generates_what_teacher_forcing_says",
  ],
  "mesh of 8 = one device": ["test_meshes.test_other_blocks"],
  "quantized as stock": ["test_quantization.test_starts_as_the_quantized_stock_model"],
  "upcycles": ["test_upcycle.test_upcycled_blocks"],
}
PASSED, FAILED, MISSING = "yes", "**no**", ""


def results(files: list[pathlib.Path]) -> dict[tuple[str, str], bool]:
  """Whether a test passed, by (its file and function, its parameters). A test that was skipped has no result."""
  found = {}
  for file in files:
    for case in ET.parse(file).getroot().iter("testcase"):
      name, _, parameters = (case.get("name") or "").partition("[")
      if case.find("skipped") is None:
        passed = case.find("failure") is None and case.find("error") is None
        file = case.get("classname").rpartition(".")[2]
        found[f"{file}.{name}", parameters.removesuffix("]")] = passed
  return found


def fields(rows: list[str]) -> dict[tuple[str, str], str]:
  """The fields of a table that `table` wrote, by block and feature."""
  split = [[field.strip() for field in row.strip("|").split("|")] for row in rows]
  features = split[0][1:]
  return {(block, feature): field for block, *row in split[2:] for feature, field in zip(features, row)}


def table(
  found: dict[tuple[str, str], bool],
  blocks: list[str],
  of_one_stream: tuple[str, ...] = (),
  before: dict[tuple[str, str], str] | None = None,
) -> list[str]:
  """Rows of Markdown: for each block and feature, whether all its tests passed.

  Args:
    of_one_stream: blocks that read one stream, so that no other can matter.
    before: fields to keep where no test ran; without it they are empty.
  """
  of_block = collections.defaultdict(list)
  for (name, parameters), passed in found.items():
    for block in blocks:
      if parameters == block or parameters.startswith(f"{block}-"):
        of_block[name, block].append(passed)
  rows = [f"| block | {' | '.join(FEATURES)} |", "|---" * (len(FEATURES) + 1) + "|"]
  for block in blocks:
    cells = []
    for feature, tests in FEATURES.items():
      if feature == EACH_STREAM and block in of_one_stream:
        tests = []
      passed = [x for name in tests for x in of_block[name, block]]
      kept = (before or {}).get((block, feature), MISSING)
      cells.append(kept if not passed else PASSED if all(passed) else FAILED)
    rows.append(f"| {block} | {' | '.join(cells)} |")
  return rows


def main(files: list[str]) -> None:
  from tests.blocks import KEYS, SIMPLE

  start, rest = PAGE.read_text().split(f"{BEGIN}\n")
  rows, end = rest.split(f"\n{END}")
  rows = table(results([pathlib.Path(file) for file in files]), [*KEYS, *SIMPLE], SIMPLE, fields(rows.splitlines()))
  PAGE.write_text("\n".join([f"{start}{BEGIN}", *rows, f"{END}{end}"]))


if __name__ == "__main__":
  sys.path.insert(0, str(PAGE.parents[1]))
  main(sys.argv[1:])
