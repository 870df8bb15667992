"""What `python3 -m maxtext_mudd.complexity` prints: the paper's tables, and exact counts."""

import re

from flax import nnx
import jax
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils
import pytest

from maxtext_mudd import connections, plugin
from maxtext_mudd.complexity import __main__ as command
from maxtext_mudd.complexity import paper
from maxtext_mudd.model import counts
from tests import models, runs


@pytest.fixture(autouse=True)
def restore_reading():
  yield
  plugin.install(plugin.Reading())


def printed(capsys, *arguments) -> list[list[str]]:
  command.main(list(arguments))
  return [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]


def extra_activations(config) -> int:
  return counts.connections_cost(config).activations


def test_table_1(capsys):
  """The formulas give what the paper prints, rounded as it rounds; the released rule what the golden notes say."""
  rows = {row[0]: row for row in printed(capsys, "--table", "1") if row[0].endswith("B")}
  assert set(rows) == {"1.4B", "1.34B", "2.8B", "6.9B"}
  for row in rows.values():
    for stated, formula in ((row[1], row[2]), (row[5], row[6])):
      digits = len(stated.rstrip("%").split(".")[1])
      assert round(float(formula.rstrip("%")), digits) == float(stated.rstrip("%"))
  assert rows["2.8B"][4] == "0.349%"


def test_table_6(capsys):
  """By hand, from L, the number of heads, and D."""
  rows = {row[0]: row for row in printed(capsys, "--table", "6")}
  sizes = {"405M": (24, 16, 1024), "834M": (24, 24, 1536), "1.4B": (24, 32, 2048), "2.8B": (32, 32, 2560)}
  for model, (blocks, heads, width) in (sizes | {"6.9B": (32, 32, 4096)}).items():
    plain = 2 * blocks + 34 + 6 * heads * 2048 / width
    assert rows[model][1:4] == [f"{plain:.0f}", f"{plain + 2 * blocks:.0f}", f"{plain + 2 * blocks + 6:.0f}"]
    assert rows[model][4] == f"{100 * 2 * blocks / plain:.3f}%"
    assert rows[model][5] == rows[model][6] == f"{100 * (2 * blocks + 6) / plain:.3f}%"


def test_one_model(capsys):
  rows = printed(capsys, str(runs.ROOT / "yaml" / "mudd_2p8b.yml"), "mudd_hidden_round_to=0")
  (total,) = [row[1] for row in rows if row[0] == "parameters"]
  assert total == f"{2_795_937_280 + 8_934_429 - dropped_by_exact_widths():,}"
  (w1_and_w2,) = [row for row in rows if "W1 and W2 alone, over 12LD²" in row]
  assert "0.236% (Eq. 13), 0.228% (η/6)" in w1_and_w2


TABLE = "mudd_placements=[{block: 1, sources: all, streams: rv, hidden: 8}, {block: L, sources: all, streams: r}]"


def test_placements(capsys):
  """They are printed on request, and of a model that has a table of its own."""
  header = ["block", "sources", "streams", "hidden"]
  by_keys = printed(capsys, "--placements", runs.RUN_YML, "mudd_hidden_round_to=0", "base_num_decoder_layers=3")
  assert by_keys[-4:] == [header, ["1", "0, 1", "qkvr", "8"], ["2", "0..2", "qkvr", "12"], ["3", "0..3", "r", "16"]]
  assert by_keys[:-5] == printed(capsys, runs.RUN_YML, "mudd_hidden_round_to=0", "base_num_decoder_layers=3")
  assert printed(capsys, runs.RUN_YML, TABLE, "mudd_hidden_round_to=0")[-3:] == [
    header,
    ["1", "0, 1", "vr", "8"],
    ["2", "0..2", "r", "12"],
  ]
  rows = "[{block: 1..2, sources: last:1, streams: r, hidden: 8, mlp: late}, {block: 3, sources: 3, streams: r}]"
  shared = f"mudd_placements={rows}"
  assert printed(capsys, runs.RUN_YML, shared, "base_num_decoder_layers=3", "mudd_hidden_round_to=0")[-4:] == [
    [*header, "mlp"],
    ["1", "1", "r", "8", "late"],
    ["2", "2", "r", "8", "late"],
    ["3", "3", "r", "4", "-"],
  ]
  static = printed(capsys, runs.RUN_YML, "mudd_dynamic=false", "--placements")
  assert static[-2:] == [["1", "0, 1", "qkvr", "-"], ["2", "0..2", "r", "-"]]
  plain = printed(capsys, runs.RUN_YML, "--placements", "mudd=false", "mudd_ffn_reallocation=false", "mudd_init=stock")
  assert plain[-1] == ["no depth-wise aggregates between blocks"]


def test_plain_flops():
  """By hand: 2 heads of 16, T 16, and two FFN matrices in, one out."""
  cfg = models.config()
  attention = 2 * (4 * 32 * 32) + 2 * 16 * 32  # projections; scores and sums over T/2 positions
  assert counts.plain_flops(cfg) == 3 * (attention + 2 * 3 * 32 * 64)


def dropped_by_exact_widths() -> int:
  """W1 and W2 of the 2.8B model at K = (C·N // 64 + 1)·64 less those at K = C·N."""
  total = 0
  for block in range(1, 33):
    ways, factor = (4, 1) if block < 32 else (1, 4)
    exact = ways * (block + 1) * factor
    total += ((exact // 64 + 1) * 64 - exact) * (2560 + ways * (block + 1))
  return total


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "name a configuration file, as in: python3 -m maxtext_mudd.complexity yaml/mudd_2p8b.yml"),
    (["--table", "2"], "--table 2: the tables are 1 (parameters and FLOPs) and 6 (activation memory)."),
    (["absent.yml"], "absent.yml: no such configuration file"),
    ([runs.RUN_YML, "mudd_way=1"], "mudd_way is not a configuration key; the nearest is mudd_ways."),
    ([runs.RUN_YML, "base_emb_dim=wide"], "base_emb_dim='wide' is not valid: input should be a valid integer"),
    ([runs.RUN_YML, "base_emb_dim=0"], "base_emb_dim=0 is not valid: input should be greater than 0."),
    ([runs.RUN_YML, "mudd_ffn_groups=3"], "mudd_ffn_groups=3 is more than the model has blocks; use at most 2"),
    ([runs.RUN_YML, "mudd_source_dilation=3"], "mudd_source_dilation=3 leaves every DA without sources"),
    ([runs.RUN_YML, "decoder_block=llama"], "decoder_block='llama' is not valid: input should be 'default', "),
  ],
)
def test_mistakes(arguments, message, capsys):
  with pytest.raises(SystemExit) as ended:
    command.main(arguments)
  assert ended.value.code == 2
  assert capsys.readouterr().err.splitlines()[-1].startswith(f"maxtext-mudd: {message}")


@pytest.mark.parametrize(
  "arguments",
  [
    ["global_parameter_scale=8"],
    [
      "mudd=false",
      "mudd_ffn_reallocation=false",
      "mudd_init=stock",
      "model_name=llama2-7b",
      "override_model_config=true",
    ],
    ["decoder_block=qwen3_moe", "num_experts=4", "num_experts_per_tok=2", "base_moe_mlp_dim=512"],
    ["base_emb_dim=${base_mlp_dim}"],
  ],
)
def test_sizes_that_maxtext_derives(arguments):
  argv = [runs.RUN_YML, *arguments]
  config = pyconfig.initialize_pydantic(["", *argv, "run_name=x"])
  assert command.describe(command.read(argv)) == command.describe(config)


def test_sizes_from_the_environment(monkeypatch):
  monkeypatch.setenv("M_BASE_NUM_DECODER_LAYERS", "4")
  assert command.read([runs.RUN_YML]).num_decoder_layers == 4


@pytest.mark.parametrize("family", ["attnres", "dca", "mhc", "hyper_connections", "residual"])
def test_families_are_counted_without_maxtext(family, capsys):
  arguments = [runs.RUN_YML, f"depth_connection={family}"]
  rows = printed(capsys, *arguments)
  config = pyconfig.initialize_pydantic(["", *arguments, "run_name=x"])
  assert rows == [re.split(r"\s{2,}", line) for line in command.align(command.describe(config))]


def test_list(capsys):
  rows = printed(capsys, "--list")
  assert ["mudd_2p8b.yml", "MUDDFormer-2.8B, as released and in Table 4."] in rows


def test_counts_of_hyper_connections():
  """By hand: n = 2, D = 32, two sublayers in each of 3 blocks."""
  cfg = models.config(mudd=True, depth_connection="hyper_connections", mudd_expansion_rate=2)
  assert counts.connections_cost(cfg).parameters == 6 * (2 * 3 + 2 + 32 * 3 + 32 + 2 + 32)
  assert counts.connections_cost(cfg).flops == 6 * 2 * (2 * (3 + 1) * 32 + 2 * 3 * 32 + 2 * 32)
  assert extra_activations(cfg) == 3


def test_extra_activations_follow_what_aggregates_see():
  shape = {"mudd": True, "base_num_decoder_layers": 6}
  assert extra_activations(models.config(**shape)) == 6 + 3
  assert extra_activations(models.config(**shape, mudd_ways=1)) == 6
  assert extra_activations(models.config(**shape, mudd_source_dilation=6, mudd_block_period=6)) == 1
  assert extra_activations(models.config(**shape, depth_connection="residual")) == 0
  assert extra_activations(models.config(**shape, mudd_pre_norm=True, mudd_post_norm=True)) == 6 + 3 + 6
  cfg = models.config(**shape)
  expected = extra_activations(cfg) / paper.plain_activations(cfg)
  assert paper.memory_ratio(cfg) == expected


SPARSE = [{}, {"mudd_block_period": 2}, {"mudd_source_dilation": 2}, {"mudd_window": 2}]


def test_sparse_models_of_single_layers_compute_less():
  """As much less as their formula says, by FLOPs of the function that is compiled."""

  def flops(**keys):
    cfg = models.config(base_num_decoder_layers=8, **keys)
    mesh = maxtext_utils.get_mesh_from_config(cfg)
    graph, state = nnx.split(nnx.eval_shape(lambda: models.construct(cfg, mesh)))
    data = models.batch(cfg)
    lowered = jax.jit(lambda state: models.logits(nnx.merge(graph, state), data)).lower(state)
    return lowered.cost_analysis()["flops"] / data["inputs"].size, connections.family(cfg).cost(cfg).flops

  plain, _ = flops()
  ratios = []
  for keys in SPARSE:
    total, by_formula = flops(mudd=True, **keys)
    ratios.append((total - plain) / by_formula)
  # Norms and sums of static and dynamic weights are not in the formula.
  assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=0.02)
  assert 1 < ratios[0] < 1.1
