"""`convert upcycle`: a trained plain model with connections computes what it computed."""

import pytest

from maxtext_mudd import connections
from maxtext_mudd.checkpoints import layout
from tests import models
from tests.blocks import FUSED, LAYOUTS, config_of, packed
from tests.published import hugging_face, refusal
from tests.upcycling import (
  check_logits,
  check_parameters,
  config_file,
  convert_as_maxtext,
  keys_of,
  op_by_op,
  save,
  trained,
  upcycle,
  written,
)

BOTH_NORMS = {"mudd_pre_norm": True, "mudd_post_norm": True}
# Initial values of some of the families depend on the seed, and in part on the number of sources.
FAMILIES = {
  "MUDD": {},
  "both norms, norms of block 1": {**BOTH_NORMS, "mudd_first_block_norms": "separate"},
  "post-norm alone, static weights from zero": {"mudd_post_norm": True, "mudd_static_start": "zero"},
  "value stream, in the upper half": {"mudd_dense_streams": "vr", "mudd_depth_start": 0.5},
  "DDFormer, scaled weights": {"mudd_ways": 1, "mudd_weight_scale": True},
  "shared weight MLPs": {
    "mudd_placements": [{"block": "1..2", "sources": [0, "last:1"], "streams": "vr", "mlp": "both"}]
  },
  "DenseFormer": {"mudd_ways": 1, "mudd_dynamic": False},
  "extra embeddings, both norms": {**BOTH_NORMS, "mudd_extra_embeddings": 2, "mudd_embedding_groups": 2},
  "hyper-connections": {"depth_connection": "hyper_connections"},
  "hyper-connections, static": {
    "depth_connection": "hyper_connections",
    "mudd_dynamic": False,
    "mudd_expansion_rate": 3,
  },
  "residual": {"depth_connection": "residual"},
}
# Those whose new models are not exactly the plain one: what the command says of each.
REFUSED = {
  "mudd_pre_norm=True with mudd_post_norm=False": {"mudd_pre_norm": True},
  "mudd_pre_norm=False with mudd_post_norm=True": {"mudd_post_norm": True},
  "mudd_hyper_end=sum": {"depth_connection": "hyper_connections", "mudd_hyper_end": "sum"},
  "mudd_hyper_scaled_init=True": {"depth_connection": "hyper_connections", "mudd_hyper_scaled_init": True},
  "depth_connection=mhc": {"depth_connection": "mhc"},
  "depth_connection=attnres": {"depth_connection": "attnres"},
  "depth_connection=dca": {"depth_connection": "dca"},
  "mudd_dca_sources=first_and_last": {
    "depth_connection": "dca",
    "mudd_dca_sources": "first_and_last",
    "mudd_dca_k": 1,
  },
}


def slow_but(fast, cases):
  """Parameters of a test, of which those that are not in `fast` are left to the slow tests."""
  marks = {True: (), False: pytest.mark.slow}
  return [pytest.param(*(x if isinstance(x, tuple) else [x]), marks=marks[x in fast]) for x in cases]


@pytest.mark.parametrize("family", slow_but(["both norms, norms of block 1"], FAMILIES))
def test_families(family, tmp_path):
  plain, values = trained()
  source, target = save(tmp_path / "stock", values), tmp_path / "m"
  upcycle(source, target, config_file(tmp_path), *written({"mudd": True, "init_weights_seed": 7, **FAMILIES[family]}))
  check_logits(target, plain)
  check_parameters(target, values, seed=7)


# model.yml cannot hold the name of the model, which its layers read: the command writes the parameters alone.
WITHOUT_MODEL_YML = ("gemma3", "gemma4_small")
# The router biases and tables of deepseek4 are no parameters: it is upcycled as a run.
UPCYCLED = [case for case in LAYOUTS if case[0] != "deepseek4"]


@pytest.mark.parametrize(("block", "layout"), slow_but([("pythia", "single")], UPCYCLED))
def test_upcycled_blocks(block, layout, tmp_path):
  keys = {"scan_layers": layout == "scanned"}
  plain, values = trained(block=block, **keys)
  source, target = save(tmp_path / "stock", values), tmp_path / "m"
  cfg, sizes = None, []
  if block in WITHOUT_MODEL_YML:
    cfg = config_of(block, mudd=True, remat_policy="none", **keys)
    sizes = written(keys_of(block, **keys))  # which win over those of a model's name on the command line only
  upcycle(source, target, config_file(tmp_path, block, **keys), "mudd=true", *sizes)
  assert (target / "model.yml").exists() == (cfg is None)
  check_logits(target, plain, 5e-5 if block in FUSED else 0, cfg)  # as tests/test_blocks.py


@pytest.mark.parametrize(("before", "after"), slow_but([(True, True)], [(True, True), (True, False), (False, True)]))
def test_layouts(before, after, tmp_path):
  """Scanned and single layers, of the checkpoint and of the new model."""
  plain, values = trained(scan_layers=before)
  singles = layout.unstack(values, plain.config) if before else values
  source, target = convert_as_maxtext(tmp_path / "stock", values), tmp_path / "m"
  upcycle(source, target, config_file(tmp_path), "mudd=true", *written({"scan_layers": after}))
  check_logits(target, plain)
  check_parameters(target, singles)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hyper-connections", "DenseFormer", "extra embeddings, both norms"])
def test_families_in_scanned_layers(family, tmp_path):
  plain, values = trained(scan_layers=True)
  source, target = convert_as_maxtext(tmp_path / "stock", values), tmp_path / "m"
  upcycle(source, target, config_file(tmp_path), *written({"mudd": True, "scan_layers": True, **FAMILIES[family]}))
  check_logits(target, plain)


def test_every_family_is_upcycled_or_refused():
  cases = [*FAMILIES.values(), *REFUSED.values()]
  of_package = {name for name, family in connections.FAMILIES.items() if family.__module__.startswith("maxtext_mudd.")}
  assert {keys.get("depth_connection", connections.DEFAULT) for keys in cases} == of_package


@pytest.mark.parametrize("setting", REFUSED)
def test_refused_families_change_logits(setting):
  """Of a plain model, even if its parameters are initial ones."""
  keys = {"remat_policy": "none"}
  stock, cfg = config_of("llama2", **keys), config_of("llama2", **keys, mudd=True, **REFUSED[setting])
  assert connections.family(cfg).why_not_plain(cfg).startswith(setting)
  data = packed(cfg)
  assert (op_by_op(models.build(cfg), data) != op_by_op(models.build(stock), data)).any()


def test_refusals(tmp_path, capsys):
  """One sentence each, nothing written."""
  _, values = trained()
  stock, file = save(tmp_path / "stock", values), config_file(tmp_path)
  connected = models.build(config_of("llama2", mudd=True))
  connected = save(tmp_path / "connected", models.randomise(connected))
  target, exists = tmp_path / "m", tmp_path / "exists"
  exists.mkdir()
  advice = "name the keys that the model was trained with."

  def said(*keys, checkpoint=stock, option="--maxtext-dir", target=target):
    return refusal(capsys, "upcycle", "--checkpoint", checkpoint, option, target, file, *keys)

  assert said() == "mudd=False: upcycling adds depth connections to a model; set mudd=true."
  assert said("mudd=true", "mudd_ffn_reallocation=true", "mudd_ffn_round_to=8") == (
    "mudd_ffn_reallocation=True: the FFNs of the new model would have other widths than those of the checkpoint; set "
    "mudd_ffn_reallocation=false."
  )
  assert said("mudd=true", "mudd_pre_norm=true") == (
    "mudd_pre_norm=True with mudd_post_norm=False: with one of the two norms alone, a model does not start as the "
    "plain model, and neither does the released code; turn both on or both off, or set "
    "mudd_static_start=zero with mudd_post_norm alone."
  )
  assert said("mudd=true", "mudd_rope_table=bfloat16") == (
    "mudd_rope_table=bfloat16: the checkpoint was trained with MaxText's rotary table, which has other values; set "
    "mudd_rope_table=stock."
  )
  assert said("mudd=true", "depth_connection=dca").startswith("depth_connection=dca adds the outputs of blocks in ")
  assert "attention_type='mla' does not work with decoder_block='llama2'" in said("mudd=true", "attention_type=mla")
  assert said("mudd=true", checkpoint=connected).startswith(
    f"{connected} has decoder/layers_1/connection/depth_aggregate/a: its model has depth connections already"
  )
  assert said("mudd=true", "base_mlp_dim=128") == (
    f"{stock}: decoder/layers_0/mlp/wi_0/kernel is [32, 64], and this configuration needs [32, 128]; {advice}"
  )
  assert said("mudd=true", "base_num_decoder_layers=2") == (
    f"{stock} has decoder/layers_2/mlp/wi_0/kernel, which this configuration does not have; {advice}"
  )
  assert said("mudd=true", checkpoint=tmp_path / "none") == (
    f"{tmp_path / 'none'}: there is no such folder; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP."
  )
  assert said("mudd=true", checkpoint=hugging_face(tmp_path / "hf")) == (
    f"{tmp_path / 'hf'} is a Hugging Face folder; convert it by python3 -m maxtext.checkpoint_conversion.to_maxtext."
  )
  assert said("mudd=true", target=exists) == f"{exists} exists already; name a folder that does not."
  assert said("mudd=true", option="--run", target=exists) == f"{exists} exists already; name a run that does not."
  assert said("mudd=true", option="--run") == (
    f"{stock} is not a checkpoint of a run, which --run needs; name OUTPUT/RUN/checkpoints/STEP."
  )
  step = tmp_path / "run" / "checkpoints" / "3"
  save(step / "items", values)
  assert said("mudd=true", option="--run", checkpoint=step) == (
    f"{step / 'items'} has no optimizer state, which --run keeps; write the parameters with --maxtext-dir."
  )
  assert said("mudd=true", checkpoint=tmp_path / "run") == (
    f"{tmp_path / 'run'} is the folder of a run; name one of its checkpoints, such as {step}."
  )
  assert not target.exists() and not list(exists.iterdir()) and not list(tmp_path.glob(".*"))
