"""`mudd_placements`: what a table says, the shorthands for tables, and tables that are refused.

Models with a table are compared with the oracle in test_connections.py, and scanned with single ones in test_scan.py.
"""

import types

from maxtext.configs import pyconfig
import pytest

from maxtext_mudd import connections, plugin
from maxtext_mudd.complexity import __main__ as complexity
from maxtext_mudd.complexity import sizes
from maxtext_mudd.config import files as config_files
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.config.keys import MuddKeys
from maxtext_mudd.connections.base import Site
from maxtext_mudd.connections.mudd import placements
from maxtext_mudd.model import counts
from tests import models, runs
from tests.placements import BLOCKS, IRREGULAR, IRREGULAR_DAS, SHARED, SHARED_DAS, SHARING
from tests.refusals import refuse


@pytest.fixture(autouse=True)
def restore_reading():
  yield
  plugin.install(plugin.Reading())


def sites(rows, blocks: int = 6, **keys) -> dict[int, Site]:
  values = MuddKeys(mudd=True, mudd_placements=rows, **keys).model_dump()
  return dict(
    connections.plan(types.SimpleNamespace(num_decoder_layers=blocks, decoder_block=models.LLAMA2, **values)).sites
  )


def test_a_table_of_different_aggregates():
  found = sites(IRREGULAR, BLOCKS)
  assert {block: (site.sources, site.streams) for block, site in found.items()} == IRREGULAR_DAS
  assert list(found) == sorted(found)


@pytest.mark.parametrize(
  ("block", "expected"),
  [
    (3, [3]),
    ("3", [3]),
    ("L-2", [4]),
    ("2..4", [2, 3, 4]),
    ("1..L-1 step 2", [1, 3, 5]),
    ("2..L-1 step 2", [2, 4]),
    ("L-2..L-1", [4, 5]),
    ([1, "3..4"], [1, 3, 4]),
  ],
)
def test_blocks(block, expected):
  found = sites([{"block": block, "sources": "all", "streams": "qr"}])
  assert list(found) == expected
  assert all(site.sources == tuple(range(i + 1)) and site.streams == "qr" for i, site in found.items())


@pytest.mark.parametrize(
  ("sources", "expected"),
  [
    ("all", (0, 1, 2, 3, 4, 5)),
    ("last:2", (4, 5)),
    ("last:9", (1, 2, 3, 4, 5)),  # the embedding is not a block output
    ([0, "last:2"], (0, 4, 5)),
    ("every:2", (1, 3, 5)),
    ("every:5", (0, 5)),
    (5, (5,)),
    ([5, 2, "0"], (0, 2, 5)),
    ("1..5 step 2", (1, 3, 5)),
    ([0, "L-3", "L-1"], (0, 3, 5)),
    (["every:3", "last:2"], (2, 4, 5)),
  ],
)
def test_sources(sources, expected):
  assert sites([{"block": 5, "sources": sources, "streams": "vr"}])[5].sources == expected


def test_hidden_widths():
  """The rule gives C·N; in a row of its own, four times as much to the last DA."""
  rows = [
    {"block": "1..2", "sources": "all", "streams": "vr"},
    {"block": 3, "sources": "all", "streams": "vr", "hidden": 7},
    {"block": "L", "sources": "every:2", "streams": "r"},
  ]
  assert [site.hidden for site in sites(rows, mudd_hidden_round_to=0).values()] == [4, 6, 7, 16]
  del rows[1]["hidden"]
  assert [site.hidden for site in sites(rows, mudd_dynamic=False).values()] == [0, 0, 0, 0]


LAST = {"block": "L", "sources": "all", "streams": "r"}
MULTIWAY = [{"block": "1..L-1", "sources": "all", "streams": "qkvr"}, LAST]
SHORTHANDS = {  # an ablation, and the table that its keys stand for
  "static": [{"block": "1..L", "sources": "all", "streams": "x"}],
  "dynamic": [{"block": "1..L", "sources": "all", "streams": "x"}],
  "multiway_static": MULTIWAY,
  "multiway_dynamic": MULTIWAY,
  "mudd": MULTIWAY,
  "without_dense_q": [{"block": "1..L-1", "sources": "all", "streams": "kvr"}, LAST],
  "without_dense_k": [{"block": "1..L-1", "sources": "all", "streams": "qvr"}, LAST],
  "without_dense_v": [{"block": "1..L-1", "sources": "all", "streams": "qkr"}, LAST],
  "without_dense_r": [{"block": "1..L-1", "sources": "all", "streams": "qkv"}],
  "sparse_1x1": MULTIWAY,
  "sparse_1x2": [{"block": "2..L-1 step 2", "sources": "all", "streams": "qkvr"}, LAST],
  "sparse_2x1": [
    {"block": "1..L-1", "sources": "every:2", "streams": "qkvr"},
    {"block": "L", "sources": "every:2", "streams": "r"},
  ],
  "sparse_2x2": [
    {"block": "2..L-1 step 2", "sources": "every:2", "streams": "qkvr"},
    {"block": "L", "sources": "every:2", "streams": "r"},
  ],
  "sparse_4x4": [
    {"block": "4..20 step 4", "sources": "every:4", "streams": "qkvr"},
    {"block": 24, "sources": "0..24 step 4", "streams": "r"},
  ],
  "sparse_sw8": [
    {"block": "1..L-1", "sources": [0, "last:8"], "streams": "qkvr"},
    {"block": "L", "sources": [0, "last:8"], "streams": "r"},
  ],
  "trimmed": [{"block": "13..L-1", "sources": "all", "streams": "vr"}, LAST],
}
KEYS = [f"mudd_{key}" for key in ("ways", "dense_streams", "source_dilation", "block_period", "depth_start", "window")]


def read(name: str, **overrides):
  return sizes.read(["", str(runs.ROOT / "yaml" / f"{name}.yml")], **overrides)


@pytest.mark.parametrize("name", SHORTHANDS)
def test_shorthands_are_tables(name):
  by_keys = read(f"ablation/{name}")
  defaults = {key: MuddKeys.model_fields[key].default for key in KEYS}
  by_table = read(f"ablation/{name}", mudd_placements=SHORTHANDS[name], **defaults)
  assert connections.plan(by_keys) == connections.plan(by_table)


def test_every_ablation_has_its_table():
  names = {name.removesuffix(".yml") for name in config_files.packaged() if name.startswith("ablation/")}
  assert {f"ablation/{name}" for name in SHORTHANDS} == {
    name for name in names if (config := read(name)).mudd and connections.plan(config).sites
  }


def test_shared_mlps():
  found = sites(SHARED, BLOCKS)
  assert {block: (site.sources, site.streams) for block, site in found.items()} == SHARED_DAS
  groups = (tuple(i for i in found if found[i].mlp == name) for name in ("middle", "end"))
  assert tuple(groups) == SHARING and found[1].mlp is None


NORMS = {"mudd_pre_norm": True, "mudd_post_norm": True, "mudd_post_norm_streams": "kv", "mudd_weight_scale": True}


def test_counts_of_shared_mlps():
  """By hand: W1, W2, s and the scale of the norm of two MLPs exist once less. FLOPs are the same."""
  keys = {"mudd": True, "base_num_decoder_layers": BLOCKS, **NORMS, "mudd_weight_norm_scale": True}
  separate = [{column: x for column, x in row.items() if column != "mlp"} for row in SHARED]
  shared, separate = (models.config(mudd_placements=rows, **keys) for rows in (SHARED, separate))
  assert sum(x.get_value().size for x in models.parameters(models.build(shared)).values()) == counts.parameters(shared)
  costs = [counts.connections_cost(cfg) for cfg in (separate, shared)]
  of_mlps = 64 * (32 + 2 * 3) + 5 * (32 + 2)
  assert costs[0].weight_parameters - costs[1].weight_parameters == of_mlps
  assert costs[0].parameters - costs[1].parameters == of_mlps + (2 * 3 + 32) + (2 + 32)
  assert costs[0].flops == costs[1].flops


def test_counts_are_those_of_the_model():
  """And of FLOPs, by hand: W1, W2 and the sums of each DA."""
  cfg = models.config(mudd=True, mudd_placements=IRREGULAR, base_num_decoder_layers=BLOCKS, **NORMS)
  assert sum(x.get_value().size for x in models.parameters(models.build(cfg)).values()) == counts.parameters(cfg)
  width, weights = 32, [len(sources) * len(streams) for sources, streams in IRREGULAR_DAS.values()]
  hidden = [64, 64, 5, 64, 64]  # C·N is below 64
  flops = sum(2 * width * n + 2 * k * (width + n) for n, k in zip(weights, hidden))
  assert counts.connections_cost(cfg).flops == flops
  assert counts.connections_cost(cfg).activations == BLOCKS + 3 + BLOCKS  # all sources are mixed, at most four streams


TABLE = "[{block: 1, sources: all, streams: vr}, {block: L, sources: all, streams: r}]"


def test_a_table_in_a_file(tmp_path, monkeypatch):
  """The configuration has the rows themselves, so that it does not depend on the file."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "table.yml").write_text(TABLE)
  by_name, by_value = (
    pyconfig.initialize(["", runs.RUN_YML, "run_name=x", f"mudd_placements={value}"]) for value in ("table.yml", TABLE)
  )
  by_keys = MuddKeys(mudd=True, mudd_placements="table.yml")
  assert by_name.mudd_placements == by_value.mudd_placements == by_keys.mudd_placements
  assert connections.plan(by_name).sites[1].streams == "vr"


def row(**changes) -> str:
  columns = {"block": "L", "sources": "all", "streams": "r"} | changes
  return f"[{{{', '.join(f'{key}: {value}' for key, value in columns.items() if value is not None)}}}]"


REFUSED = {  # a table for two blocks, and the sentence
  "no list": ("5", "mudd_placements=5 is not valid: input should be a valid list."),
  "no row": ("[3]", "mudd_placements: row 1 is 3; write a mapping, such as {block: L, sources: all, streams: r}."),
  "a column": (
    row(width="5"),
    "mudd_placements: row 1 has the column 'width', which does not exist; use block, sources, streams, hidden, mlp.",
  ),
  "no block": (
    row(block=None),
    "mudd_placements: row 1 has no block; add it, as in {block: L, sources: all, streams: r}.",
  ),
  "a block": (
    row(block="last"),
    "mudd_placements: row 1 has block: 'last'; use a number, L, L-1, 1..L-1, 1..L-1 step 2, or a list of these.",
  ),
  "a rule of sources for blocks": (row(block="every:2"), "mudd_placements: row 1 has block: 'every:2'; use a number"),
  "a truth value": (row(block="true"), "mudd_placements: row 1 has block: True; use a number"),
  "sources": (
    row(sources="[0, last:0]"),
    "mudd_placements: row 1 has sources: [0, 'last:0']; use a number, L, L-1, 1..L-1, 1..L-1 step 2, all, last:8, "
    "every:2, or a list of these.",
  ),
  "a step of zero": (row(block="1..L step 0"), "mudd_placements: row 1 has block: '1..L step 0'; use a number"),
  "no sources": (row(sources="[]"), "mudd_placements: row 1 has an empty list of sources; name at least one."),
  "a stream": (
    row(streams="rz"),
    "mudd_placements: row 1 has streams: 'rz'; use some of the letters q, k, v and r, each at most once, or x.",
  ),
  "a stream twice": (row(streams="rr"), "mudd_placements: row 1 has streams: 'rr'; use some of the letters"),
  "one stream among several": (row(streams="xr"), "mudd_placements: row 1 has streams: 'xr'; use some of the letters"),
  "no streams": (row(streams="''"), "mudd_placements: row 1 has streams: ''; use some of the letters"),
  "a width": (
    row(hidden=0),
    "mudd_placements: row 1 has hidden: 0; use a width of 1 or more, or leave it out.",
  ),
  "a width that is no number": (row(hidden="wide"), "mudd_placements: row 1 has hidden: 'wide'; use a width of 1"),
  "a name that is a number": (
    row(mlp=3),
    "mudd_placements: row 1 has mlp: 3; use a name, such as late, or leave it out.",
  ),
  "no name": (row(mlp="''"), "mudd_placements: row 1 has mlp: ''; use a name"),
  "a weight MLP shared with none": (
    row(mlp="late"),
    "mudd_placements: mlp: late is of DA_2 alone; give another DA the same name, or remove mlp.",
  ),
  "other streams": (
    "[{block: 1, sources: last:1, streams: v, mlp: late}, {block: 2, sources: last:1, streams: r, mlp: late}]",
    "mudd_placements: mlp: late is of DA_1 with streams v, N=1 and K=64, and of DA_2 with streams r, N=1 and K=64; "
    "streams, the number N of sources and the width K (hidden) have to be the same, so change them or use another "
    "name.",
  ),
  "another number of sources": (
    row(block="1..2", sources="all", hidden=8, mlp="late"),
    "mudd_placements: mlp: late is of DA_1 with streams r, N=2 and K=8, and of DA_2 with streams r, N=3",
  ),
  "another width": (
    "[{block: 1, sources: last:1, streams: r, mlp: a}, {block: 2, sources: last:1, streams: r, hidden: 5, mlp: a}]",
    "mudd_placements: mlp: a is of DA_1 with streams r, N=1 and K=64, and of DA_2 with streams r, N=1 and K=5;",
  ),
  "a block beyond the last": (
    row(block=3, streams="qr"),
    "mudd_placements: row 1 places DA_3, and the model has L=2 blocks; use blocks from 1 to L.",
  ),
  "the embedding": (row(block=0), "mudd_placements: row 1 places DA_0, and the model has L=2 blocks"),
  "a range of no block": (
    row(block="L..1"),
    "mudd_placements: row 1 has block: L..1, which is no block of a model with L=2; use positions from 1 to L, the "
    "lower one first.",
  ),
  "a block twice": (
    "[{block: 1..2, sources: all, streams: r}, {block: L, sources: all, streams: r}]",
    "mudd_placements: rows 1 and 2 both place DA_2; name each block once.",
  ),
  "a source that is not there yet": (
    row(block=1, sources="[0, 1, 2]"),
    "mudd_placements: row 1 gives DA_1 the source X_2, which does not exist there; use sources from 0 to 1.",
  ),
  "a source before the embedding": (
    row(sources="[L-3, L]"),
    "mudd_placements: L-3 is below 0 in a model with L=2 blocks; use L-2 to L.",
  ),
  "without the newest source": (
    row(sources="[0, 1]"),
    "mudd_placements: row 1 gives DA_2 the sources [0, 1], without X_2, its newest one; add last:1.",
  ),
  "no residual stream at the end": (
    row(streams="v"),
    "mudd_placements: row 1 gives DA_2, which follows the last block, the streams v; it makes the residual stream "
    "only, so place it in another row, with streams: r.",
  ),
  "several streams at the end": (
    row(block="1..L", streams="vr"),
    "mudd_placements: row 1 gives DA_2, which follows the last block, the streams vr;",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_tables(case):
  table, sentence = REFUSED[case]
  with pytest.raises(ConfigError) as error:
    complexity.read([runs.RUN_YML, f"mudd_placements={table}"])
  found = str(error.value)
  assert found == sentence if sentence.endswith(".") else found.startswith(sentence)
  assert "\n" not in found


def test_positions_from_the_end_name_no_extra_embedding():
  table = "[{block: 1..2, sources: all, streams: r, hidden: 8}, {block: L, sources: [L-4, L], streams: r}]"
  with pytest.raises(ConfigError, match="L-4 is below 0 in a model with L=3 blocks; use L-3 to L"):
    complexity.read([runs.RUN_YML, "base_num_decoder_layers=3", "mudd_extra_embeddings=1", f"mudd_placements={table}"])


def test_scanned_layers_share_no_mlp():
  rows = row(block="1..2", sources="last:1", mlp="late")
  with pytest.raises(ConfigError) as error:
    complexity.read([runs.RUN_YML, f"mudd_placements={rows}", "scan_layers=true", "mudd_ffn_groups=2"])
  assert str(error.value) == (
    "mudd_placements: mlp: late needs scan_layers=False; scanned layers have a weight MLP each."
  )


@pytest.mark.parametrize(
  ("table", "key"),
  [
    (row(hidden=8), "mudd_last_hidden_expansion=2.0"),
    (row(), "mudd_hidden_expansion=2.0"),
    (row(hidden=8), "mudd_hidden_round_to=0"),
    (row(block="1", streams="vr"), "mudd_last_hidden_expansion=2.0"),
  ],
)
def test_a_rule_of_widths_that_no_row_reads(table, key):
  with pytest.raises(
    ConfigError, match=rf"{key} does nothing with mudd_placements: no row leaves out the hidden width"
  ):
    complexity.read([runs.RUN_YML, f"mudd_placements={table}", key])


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (
      [f"mudd_placements={TABLE}", "mudd_window=2"],
      "mudd_window=2 does nothing with mudd_placements=[{'block': 1, 'sources': 'all', 'streams': 'vr'}, {'block"
      "...; leave it at 0, or set mudd_placements=[].",
    ),
    (
      [f"mudd_placements={TABLE}", "mudd=false", "mudd_ffn_reallocation=false"],
      "mudd_placements=[{'block': 1, 'sources': 'all', 'streams': 'vr'}, {'block... does nothing with mudd=False; "
      "leave it at [], or set mudd=True.",
    ),
    (
      [f"mudd_placements={row(hidden=8)}", "mudd_dynamic=false"],
      "mudd_placements: row 1 has hidden, and mudd_dynamic=False leaves no weight MLP; remove hidden.",
    ),
    (
      [f"mudd_placements={row(block='1..2', sources='last:1', mlp='late')}", "mudd_dynamic=false"],
      "mudd_placements: row 1 has mlp, and mudd_dynamic=False leaves no weight MLP; remove mlp.",
    ),
    (
      ["mudd_placements=absent.yml"],
      "mudd_placements='absent.yml' is not valid: there is no such file here or in this package; use the path of a "
      "YAML file with rows, or the list itself.",
    ),
  ],
)
def test_refused_by_the_launcher(arguments, sentence, monkeypatch, capsys):
  assert refuse([runs.RUN_YML, *arguments], monkeypatch, capsys) == sentence


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("block: L", "the file holds no list of rows, such as - {block: L, sources: all, streams: r}"),
    ("", "the file holds no list of rows"),
    ("[", "the file cannot be read ("),
  ],
)
def test_refused_files(text, sentence, tmp_path):
  (tmp_path / "table.yml").write_text(text)
  with pytest.raises(ConfigError) as error:
    complexity.read([runs.RUN_YML, f"mudd_placements={tmp_path / 'table.yml'}"])
  assert f" is not valid: {sentence}" in str(error.value)


@pytest.mark.parametrize(
  ("numbers", "text"),
  [
    ((0,), "0"),
    ((0, 1), "0, 1"),
    ((0, 1, 2), "0..2"),
    ((0, 4, 8), "0..8 step 4"),
    ((0, 5, 6, 7, 9), "0, 5..7, 9"),
  ],
)
def test_ranges_in_print(numbers, text):
  assert placements.span(numbers) == text
