"""Depth connections on pipelines: losses and gradients of the model without one, and no array sent without need."""

from maxtext.common.common_types import DecoderBlockType
import numpy as np
import pytest

from maxtext_mudd import connections
from maxtext_mudd.checkpoints import layout, model_config
from maxtext_mudd.config import depth_connection
from maxtext_mudd.config.changed import changed
from maxtext_mudd.connections.keys import raise_first
from maxtext_mudd.connections.routes import routes
from tests import models, pipelines
from tests.pipelines import CASES

QUICK = "MUDD, two blocks a stage"
GRADIENTS, OF_TENSOR = 5e-6, 2e-5  # of the norm of all gradients, and of the largest entry of one
WIDTH = models.SMALL["base_emb_dim"]


def config(keys: dict, pipeline: dict):
  """The configuration of a pipeline, on whatever devices there are."""
  cfg = models.config(**{"mudd": True, "decoder_block": "llama2"} | keys)
  scans = pipeline.get("scan_layers_per_stage", False)
  return layout.with_stages(cfg, pipeline["ici_pipeline_parallelism"], scans=scans)


@pytest.mark.parametrize(
  "case", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in CASES]
)
def test_is_the_model_without_a_pipeline(case):
  keys, pipeline, crossing = CASES[case]
  found = pipelines.on_devices(keys, pipeline)
  assert found["loss"] == pytest.approx(found["expected"], rel=1e-6)
  assert found["error"] < GRADIENTS
  assert found["worst"][1] < OF_TENSOR, found["worst"]
  # Each turn, forward and backward: MaxText moves its inputs and results in a ring besides.
  ring = 8
  for backward in (False, True):
    sent = [x for x in found["permutes"] if x["backward"] == backward and x["shape"][-1] == WIDTH and x["pairs"] < ring]
    arrays = sum(x["pairs"] * (x["shape"][1] if len(x["shape"]) == 5 else 1) for x in sent)
    turns = 1 if pipeline.get("scan_pipeline_iterations", True) else turns_of(pipeline)
    assert arrays == sum(crossing) * pipeline["ici_fsdp_parallelism"] * turns


def turns_of(pipeline: dict) -> int:
  """Turns after which something is sent: all but the last."""
  number = pipeline["ici_pipeline_parallelism"]
  return 2 * number - 2


@pytest.mark.parametrize("case", CASES)
def test_what_crosses_boundaries(case):
  keys, pipeline, crossing = CASES[case]
  cfg = config(keys, pipeline)
  family, found = connections.family(cfg), routes(cfg)
  number, length = pipeline["ici_pipeline_parallelism"], pipeline["num_layers_per_pipeline_stage"]
  for stage in range(number - 1):
    boundary = (stage, stage + 1)
    given = [entry for pairs, entries in found.given.items() if boundary in pairs for entry in entries]
    made = [found.starts[stage] + k for k, pairs in enumerate(found.made) if boundary in pairs]
    assert len({*given, *made}) == len(given) + len(made)  # each entry once
    assert all(entry < found.starts[stage] for entry in given)
    whole = family.held(cfg, (stage + 1) * length).whole
    assert len(given) + len(made) + whole == crossing[stage]


@pytest.mark.parametrize(
  ("keys", "reads"),
  [
    ({}, lambda block: {*range(block + 1)}),
    ({"mudd_window": 3}, lambda block: {0, *range(max(block - 2, 0), block + 1)}),
    ({"mudd_source_dilation": 3}, lambda block: {j for j in range(block + 1) if (block - j) % 3 == 0}),
    (
      {"mudd_source_dilation": 4, "mudd_block_period": 4},
      lambda block: set(range(0, block + 1, 4)) if block % 4 == 0 and block else {block},
    ),
    (
      {"mudd_source_dilation": 2, "mudd_block_period": 2, "mudd_depth_start": 0.5},
      lambda block: set(range(0, block + 1, 2)) if block % 2 == 0 and block > 8 else {block},
    ),
  ],
  ids=["dense", "window", "dilation", "4x4", "2x2 above the middle"],
)
@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_the_lower_bound(keys, reads, stages):
  """A source crosses a boundary if, and only if, a block behind it reads the source.

  Args:
    reads: the sources that are read after a block: by the next one, or by the hidden state.
  """
  cfg = config({"base_num_decoder_layers": 16} | keys, pipelines.stages(stages, 16 // stages))
  found, length = routes(cfg), 16 // stages
  for stage in range(stages - 1):
    end, boundary = (stage + 1) * length, (stage, stage + 1)
    needed = {j for block in range(end, 17) for j in reads(block) if j <= end}
    given = {entry for pairs, entries in found.given.items() if boundary in pairs for entry in entries}
    made = {found.starts[stage] + k for k, pairs in enumerate(found.made) if boundary in pairs}
    assert given | made == needed


@pytest.mark.parametrize("case", ["MUDD, two blocks a stage", "both norms, blocks first", "placements", "DCA", "mHC"])
def test_layouts(case):
  """From single layers to a pipeline, to another one, to scanned layers, and back, without a change."""
  keys, pipeline, _ = CASES[case]
  cfg = config(keys, pipeline)
  single = layout.with_stages(cfg, 1, scans=False)
  rng = np.random.default_rng(0)
  shapes = model_config.parameter_shapes(models.config(**{"mudd": True, "decoder_block": "llama2"} | keys))
  values = {path: rng.standard_normal(x.shape).astype(np.float32) for path, x in shapes.items()}
  scanned = changed(single, scan_layers=True)
  others = (cfg, layout.with_stages(cfg, 2, scans=True), scanned, single)
  moved = values
  for to in others:
    moved = layout.convert(moved, to)
    if to is not single:
      assert any("layers/" in path for path in moved)
  assert moved.keys() == values.keys()
  for path, x in values.items():
    np.testing.assert_array_equal(moved[path], x)


@pytest.mark.parametrize(
  ("keys", "sentence"),
  [
    ({"num_pipeline_repeats": 2}, "set num_layers_per_pipeline_stage=2 and num_pipeline_repeats=-1"),
    ({"pipeline_parallel_layers": 2}, "set it to 4"),
    ({"mudd_ffn_reallocation": True}, "mudd_ffn_reallocation=True"),
    ({"mudd_extra_embeddings": 1}, "mudd_extra_embeddings=1"),
    ({"mudd_mtp": "connected", "mtp_num_layers": 1}, "use mudd_mtp=head"),
    ({"record_internal_nn_metrics": 1}, "set it to 0"),
    ({"opt_type": "muon"}, "use adamw"),
    ({"mudd_placements": [{"block": 1, "sources": "all", "streams": "r", "mlp": "x"}]}, "leave mlp out"),
    ({"num_experts": 4, "load_balance_loss_weight": 0.01}, "set it to 0"),
    ({"eval_interval": 5, "eval_per_device_batch_size": 1.0}, "batches of one size; set it to 2"),
    ({"decoder_block": "gemma2"}, "use default,"),
  ],
)
def test_refusals(keys, sentence):
  block = {"decoder_block": DecoderBlockType(keys["decoder_block"])} if "decoder_block" in keys else {}
  cfg = changed(config({"base_num_decoder_layers": 4}, pipelines.stages(2, 2)), **keys | block)
  refused = [x for x in depth_connection.of_pipeline(cfg) if x.applies]
  assert len(refused) == 1
  assert sentence in f"{refused[0].setting}: {refused[0].reason}"


def test_configurations_are_refused():
  with pytest.raises(ValueError, match="num_layers_per_pipeline_stage=2 and num_pipeline_repeats=-1"):
    models.config(mudd=True, base_num_decoder_layers=4, ici_pipeline_parallelism=2)
  with pytest.raises(ValueError, match="ici_pipeline_parallelism=-1 does not work with mudd=True"):
    models.config(mudd=True, ici_pipeline_parallelism=-1)


def test_layers_that_no_stages_divide():
  cfg = changed(config({"base_num_decoder_layers": 4}, pipelines.stages(2, 2)), ici_pipeline_parallelism=3)
  with pytest.raises(ValueError, match=r"num_decoder_layers=4 does not work .* use a multiple of the number of stages"):
    raise_first(depth_connection.of_pipeline(cfg))
