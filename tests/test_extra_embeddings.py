"""Extra embeddings as sources: which DAs mix them, initial values, counts, training, decoding, mistakes.

Elsewhere: values and gradients against the oracle (test_connections.py), gradients of many aggregates
(test_history.py), scanned layers against single ones (test_scan.py), meshes, optimizers, upcycling.
"""

import dataclasses
import types

from flax import nnx
import numpy as np
import pytest

import maxtext_mudd
from maxtext_mudd import connections
from maxtext_mudd.checkpoints import layout
from maxtext_mudd.checkpoints.hugging_face import config_json
from maxtext_mudd.complexity import __main__ as complexity
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.config.keys import MuddKeys
from maxtext_mudd.connections.base import Plan
from maxtext_mudd.model import counts
from tests import models, runs, steps
from tests.blocks import BLOCKS, TOLERANCE, config_of, expected, packed
from tests.oracle import Oracle
from tests.placements import OF_EXTRA, OF_EXTRA_DAS
from tests.scanning import BOTH_NORMS, CONNECTED_MTP, EXTRA

TABLES = [f"decoder/extra_embeddings/table_{k}/embedding" for k in range(1, 5)]


def plan(blocks: int = 6, **keys) -> Plan:
  sizes = {"num_decoder_layers": blocks, "mtp_num_layers": 1}
  return connections.plan(
    types.SimpleNamespace(**sizes, decoder_block=models.LLAMA2, **MuddKeys(mudd=True, **keys).model_dump())
  )


GROUPS = {  # keys, and the extra embeddings that each DA mixes
  "all": ({"mudd_extra_embeddings": 2}, dict.fromkeys(range(1, 7), (-2, -1))),
  "two groups": (EXTRA, {1: (-2, -1), 2: (-2, -1), 3: (-2, -1), 4: (-4, -3), 5: (-4, -3), 6: (-4, -3)}),
  "runs of two lengths": (
    {"mudd_extra_embeddings": 4, "mudd_embedding_groups": 4},
    {1: (-1,), 2: (-1,), 3: (-2,), 4: (-3,), 5: (-3,), 6: (-4,)},
  ),
  "every second block": (
    {"mudd_extra_embeddings": 3, "mudd_embedding_groups": 3, "mudd_block_period": 2},
    {2: (-1,), 4: (-2,), 6: (-3,)},
  ),
  "connected MTP": (
    {"mudd_extra_embeddings": 2, "mudd_embedding_groups": 2, "mudd_mtp": "connected"},
    {1: (-1,), 2: (-1,), 3: (-1,), 4: (-2,), 5: (-2,), 6: (-2,), 7: ()},
  ),
  "placements": (
    {"mudd_extra_embeddings": 3, "mudd_placements": [{"block": "1..L", "sources": "all", "streams": "x"}]},
    dict.fromkeys(range(1, 7), (-3, -2, -1)),
  ),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups(case):
  keys, by_block = GROUPS[case]
  found = {block: tuple(j for j in site.sources if j < 0) for block, site in plan(**keys).sites.items()}
  assert found == by_block


def test_other_sources_are_as_without():
  for keys in ({"mudd_window": 2}, {"mudd_source_dilation": 2, "mudd_block_period": 2}, {"mudd_depth_start": 0.5}):
    without, found = plan(**keys), plan(**keys, **EXTRA)
    assert found.sites.keys() == without.sites.keys()
    for block, site in found.sites.items():
      assert tuple(j for j in site.sources if j >= 0) == without.sites[block].sources


def test_groups_are_a_shorthand():
  table = [
    {"block": "1..3", "sources": ["-2..-1", 0, "last:2"], "streams": "qkvr"},
    {"block": "4..5", "sources": ["-4..-3", 0, "last:2"], "streams": "qkvr"},
    {"block": "L", "sources": ["-4..-3", 0, "last:2"], "streams": "r"},
  ]
  assert plan(**EXTRA, mudd_window=2) == plan(mudd_extra_embeddings=4, mudd_placements=table)
  found = plan(4, mudd_extra_embeddings=3, mudd_placements=OF_EXTRA).sites
  assert {block: (site.sources, site.streams) for block, site in found.items()} == OF_EXTRA_DAS


def test_the_printed_table_can_be_read():
  cfg = models.config(mudd=True, base_num_decoder_layers=6, **EXTRA)
  _, *rows = complexity.placements(cfg)
  assert rows[1] == ("2", "-2..2", "qkvr", "64")
  assert rows[4][1] == "-4, -3, 0..5"
  table = [
    {"block": int(block), "sources": sources.split(", "), "streams": streams} for block, sources, streams, _ in rows
  ]
  assert plan(mudd_extra_embeddings=4, mudd_placements=table).sites == connections.plan(cfg).sites


@pytest.mark.parametrize("scan", [False, True], ids=["single", "scanned"])
def test_every_table_reaches_its_group(scan):
  """The model is that of the oracle, and not the oracle's with two tables of one group, or of two, exchanged."""
  single = config_of("llama2", mudd=True, **EXTRA)
  values = models.randomise(models.build(single))
  cfg = config_of("llama2", mudd=True, **EXTRA, scan_layers=scan)
  model = models.build(cfg)
  models.set_parameters(model, layout.stack(values, cfg) if scan else values)
  data = packed(cfg)
  found = np.asarray(models.jitted_logits(model, data))
  oracle = Oracle(dataclasses.replace(BLOCKS["llama2"][1], ways=4, extra=4, groups=2), values)
  assert np.abs(found - expected(oracle, data)).max() <= TOLERANCE
  for first, second in ((0, 1), (0, 2), (1, 3)):
    exchanged = values | {TABLES[first]: values[TABLES[second]], TABLES[second]: values[TABLES[first]]}
    oracle = Oracle(oracle.arch, exchanged)
    assert np.abs(found - expected(oracle, data)).max() > 10 * TOLERANCE, (first, second)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["single", "scanned"])
@pytest.mark.parametrize("norms", [{}, BOTH_NORMS], ids=["no norms", "both norms"])
def test_starts_as_the_plain_model(norms, scan):
  """And its stock parameters are those of the plain model."""
  cfg, stock = models.config(mudd=True, **EXTRA, **norms, scan_layers=scan), models.config(scan_layers=scan)
  model, plain = models.build(cfg), models.build(stock)
  found = models.parameters(model)
  for path, x in models.parameters(plain).items():
    if path in found:
      np.testing.assert_array_equal(found[path].get_value(), x.get_value(), err_msg=path)
  assert "token_embedder/embedding" in found
  data = models.batch(cfg)
  # Compiled as one loop, scanned layers round otherwise; 1.4e-6 of logits of up to 3 was seen.
  atol = 5e-6 if scan else 0
  np.testing.assert_allclose(models.jitted_logits(model, data), models.jitted_logits(plain, data), atol=atol, rtol=0)


@pytest.mark.parametrize("rule", ["stock", "xavier_normal", "normal"])
def test_tables_start_as_the_token_embedding(rule):
  """Drawn from the same distribution, each by a random key of its own, and laid out on a mesh in the same way."""
  cfg = models.config(mudd=True, **EXTRA, mudd_init=rule, vocab_size=512, base_num_decoder_layers=2)
  found = models.parameters(models.build(cfg))
  token = found["token_embedder/embedding"]
  tables = [found[path] for path in TABLES]
  drawn = np.stack([np.asarray(x.get_value()) for x in (token, *tables)]).reshape(5, -1)
  np.testing.assert_allclose(drawn.std(1), drawn[0].std(), rtol=0.04)  # of 16384 numbers; four standard errors of 0.6%
  np.testing.assert_allclose(np.corrcoef(drawn), np.eye(5), atol=0.04)  # five standard errors of 0.8%
  assert ("vocab", "embed_vocab") in token.get_metadata().values()
  for table in tables:
    assert table.get_metadata() == token.get_metadata()
    assert table.get_value().dtype == token.get_value().dtype


@pytest.mark.parametrize("keys", [{}, BOTH_NORMS, {"mudd_ways": 1, "mudd_dynamic": False}, CONNECTED_MTP])
def test_counts(keys):
  """Parameters are those of the model; FLOPs and arrays by hand."""
  cfg, without = (models.config(mudd=True, **keys, **more) for more in (EXTRA, {}))
  assert counts.connections_cost(cfg).embedding_parameters == 4 * 64 * 32
  sizes = [sum(x.get_value().size for x in models.parameters(models.build(c)).values()) for c in (cfg, without)]
  costs = [counts.connections_cost(c) for c in (cfg, without)]
  assert costs[0].parameters - costs[1].parameters == sizes[0] - sizes[1]
  if not keys:
    # Two sources more in two DAs with C = 4 and in one with C = 1, each with K = 64 with and without them.
    assert costs[0].flops - costs[1].flops == (4 + 4 + 1) * 2 * (2 * 32 + 2 * 64)
  # Four more sources are kept, and have gradients; where they are normed, as they are besides.
  assert costs[0].activations - costs[1].activations == 4 * (3 if "mudd_pre_norm" in keys else 2)


def test_complexity_counts_tables_apart():
  rows = {row[0].strip(): row[1] for row in complexity.describe(complexity.read([runs.RUN_YML, *arguments(**EXTRA)]))}
  without = {row[0].strip(): row[1] for row in complexity.describe(complexity.read([runs.RUN_YML]))}
  cfg = complexity.read([runs.RUN_YML])
  assert rows["of extra embeddings"] == f"{4 * cfg.vocab_size * cfg.emb_dim:,}"
  assert "of extra embeddings" not in without
  cost = counts.connections_cost(complexity.read([runs.RUN_YML, *arguments(**EXTRA)]))
  assert rows["of the connections"] == f"{cost.parameters - 4 * cfg.vocab_size * cfg.emb_dim:,}"


def arguments(**keys) -> list[str]:
  return [f"{key}={value}" for key, value in keys.items()]


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["single", "scanned"])
def test_training(scan):
  """Every table learns; the norm of the gradients of connections leaves tables out."""
  rate = {"learning_rate": 0.01, "warmup_steps_fraction": 0.0}
  cfg = models.config(mudd=True, **EXTRA, **BOTH_NORMS, **rate, scan_layers=scan)
  gradients = steps.value_and_gradients(cfg)[2]
  of_tables, of_connections = (
    np.sqrt(sum(np.square(x).sum() for path, x in gradients.items() if name in path))
    for name in ("extra_embeddings", "connection")
  )
  step, state = steps.prepare(cfg, donate_argnums=())
  after, metrics = step(state, models.batch(cfg))
  assert float(metrics["scalar"]["mudd/grad_norm"]) == pytest.approx(of_connections, rel=1e-5)
  assert of_tables > 0.1 * of_connections
  before, after = (dict(nnx.to_flat_state(x["model"].filter(nnx.Param))) for x in (state, after))
  tables = [path for path in before if "extra_embeddings" in path]
  assert len(tables) == 4
  for path in tables:
    assert np.any(before[path].get_value() != after[path].get_value()), path


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 4], ids=["whole", "chunks"])
@pytest.mark.parametrize("scan", [False, True], ids=["single", "scanned"])
def test_decoding(scan, chunk):
  """Greedy tokens are those of one pass over all, and others than without the tables."""
  chunks = {"use_chunked_prefill": True, "prefill_chunk_size": chunk} if chunk else {}
  cfg = models.config(mudd=True, **EXTRA, scan_layers=scan, max_target_length=24, **chunks)
  model = models.build(cfg)
  values = models.randomise(model)
  found = maxtext_mudd.generate(model, cfg, [[5, 9, 3, 7, 1, 8], [2, 4]], 6)
  logits = []
  for row, prompt in zip(found, (6, 2)):
    logits.append(np.asarray(maxtext_mudd.logits(model, row[None, : prompt + 6]))[0])
    np.testing.assert_array_equal(logits[-1][prompt - 1 : -1].argmax(-1), row[prompt : prompt + 6])
  models.set_parameters(model, values | {path: np.zeros_like(values[path]) for path in TABLES})
  without = np.asarray(maxtext_mudd.logits(model, found[:1, :12]))[0]
  assert np.abs(without - logits[0]).max() > 0.1


REFUSED = {
  "a negative number": (
    {"mudd_extra_embeddings": -1},
    "mudd_extra_embeddings=-1 is not valid: input should be greater than or equal to 0.",
  ),
  "no groups": (
    {"mudd_extra_embeddings": 2, "mudd_embedding_groups": 0},
    "mudd_embedding_groups=0 is not valid: input should be greater than or equal to 1.",
  ),
  "groups without tables": (
    {"mudd_embedding_groups": 2},
    "mudd_embedding_groups=2 does nothing with mudd_extra_embeddings=0; leave it at 1, or set mudd_extra_embeddings=2 "
    "or another multiple.",
  ),
  "groups of different sizes": (
    {"mudd_extra_embeddings": 4, "mudd_embedding_groups": 3},
    "mudd_embedding_groups=3 does not divide mudd_extra_embeddings=4; make the number of tables a multiple of the "
    "number of groups.",
  ),
  "more groups than aggregates": (
    {"mudd_extra_embeddings": 4, "mudd_embedding_groups": 4},
    "mudd_embedding_groups=4 leaves groups without a DA, of which the model has 3; use at most 3.",
  ),
  "groups beside a table": (
    {**EXTRA, "mudd_placements": [{"block": "L", "sources": "all", "streams": "r"}]},
    "mudd_embedding_groups=2 does nothing with mudd_placements=[{'block': 'L', 'sources': 'all', 'streams': 'r'}]; "
    "leave it at 1, or set mudd_placements=[].",
  ),
  "a table of embeddings that nothing mixes": (
    {"mudd_extra_embeddings": 2, "mudd_placements": [{"block": "L", "sources": [-1, "L"], "streams": "r"}]},
    "mudd_extra_embeddings=2 makes the source -2, which no row of mudd_placements mixes; add it to the sources of a "
    "row, or lower mudd_extra_embeddings.",
  ),
  "an extra embedding that does not exist": (
    {"mudd_extra_embeddings": 1, "mudd_placements": [{"block": "L", "sources": ["-2..L"], "streams": "r"}]},
    "mudd_placements: row 1 gives DA_3 the source X_-2, which does not exist there; use sources from -1 to 3.",
  ),
  "another family": (
    {"mudd_extra_embeddings": 2, "depth_connection": "dca"},
    "mudd_extra_embeddings=2 does nothing with depth_connection=dca; leave it at 0, or set depth_connection=dense.",
  ),
  "no connections": (
    {"mudd_extra_embeddings": 2, "mudd": False},
    "mudd_extra_embeddings=2 does nothing with mudd=False; leave it at 0, or set mudd=True.",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
  keys, sentence = REFUSED[case]
  with pytest.raises(ConfigError) as refused:
    models.config(**{"mudd": True, **keys})
  assert str(refused.value) == sentence


def test_the_authors_pytorch_model_has_none():
  keys = {"decoder_block": "qwen3", "base_mlp_dim": 256, "mudd_ffn_reallocation": True}
  cfg = models.config(mudd=True, **keys, mudd_extra_embeddings=2)
  with pytest.raises(ConfigError, match=r"^mudd_extra_embeddings=2 is not in the authors' MUDDFormer, which has "):
    config_json.fields(cfg, {})
