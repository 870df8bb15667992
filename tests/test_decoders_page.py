"""The table of docs/decoders.md, from made-up results of tests."""

import pathlib
import runpy

from tests.blocks import KEYS, SIMPLE

ROOT = pathlib.Path(__file__).parents[1]
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_block_layers" name="test_trains[qwen3-adamw-single]"/>
<testcase classname="tests.test_block_layers" name="test_trains[qwen3-adamw-scanned]"><failure/></testcase>
<testcase classname="tests.test_block_layers" name="test_trains[qwen3_moe-adamw-single]"/>
<testcase classname="tests.test_multimodal" name="test_trains[deepseek]"/>
<testcase classname="tests.test_block_layers" name="test_gradient[deepseek, indexer]"/>
<testcase classname="tests.test_block_layers" name="test_gradient[deepseek]"><skipped/></testcase>
</testsuite></testsuites>"""


def test_table(tmp_path):
  (tmp_path / "results.xml").write_text(JUNIT)
  page = runpy.run_path(str(ROOT / "docs" / "decoders.py"))
  found = page["results"]([tmp_path / "results.xml"])
  blocks = ["qwen3", "qwen3_moe", "deepseek", "deepseek, indexer"]
  _, _, *rows = page["table"](found, blocks)
  cells = {block: dict(zip(page["FEATURES"], row.split(" | ")[1:])) for block, row in zip(blocks, rows)}
  assert cells["qwen3"]["trains"] == "**no**"
  assert cells["qwen3_moe"]["trains"] == "yes"
  assert cells["deepseek"]["trains"] == "", "the test of another file counts for another feature"
  feature = "gradient by finite differences"
  assert [cells[block][feature] for block in blocks] == ["", "", "", "yes"]


def test_fields_without_results_stay():
  page = runpy.run_path(str(ROOT / "docs" / "decoders.py"))
  blocks, trains = ["qwen3", "qwen3_moe"], "test_block_layers.test_trains"
  first = {(trains, "qwen3"): True, (trains, "qwen3_moe"): True, ("test_upcycle.test_upcycled_blocks", "qwen3"): True}
  rows = page["table"](first, blocks)
  before = page["fields"](rows)
  assert page["table"]({}, blocks, before=before) == rows
  after = page["fields"](page["table"]({(trains, "qwen3"): False}, blocks, before=before))
  assert {place for place, field in after.items() if field != before[place]} == {("qwen3", "trains")}
  assert after["qwen3", "trains"] == "**no**"


def test_the_page_has_every_block():
  page = runpy.run_path(str(ROOT / "docs" / "decoders.py"))
  text = page["PAGE"].read_text().split(page["BEGIN"])[1]
  assert text.splitlines()[1] == page["table"]({}, [])[0], "the table has other columns; write it again"
  for block in (*KEYS, *SIMPLE):
    assert f"| {block} | yes |" in text
