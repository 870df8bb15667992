"""Multi-token prediction (MTP) through aggregates: a restatement, initial values, policies, counts, decoding.

Scanned layers and meshes are tested in test_scan.py, test_scan_backward.py, test_model_backward.py and test_meshes.py.
"""

import math

import jax
import numpy as np
import pytest

import maxtext_mudd
from maxtext_mudd import connections
from maxtext_mudd.checkpoints import layout, model_config
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.model import counts
from maxtext_mudd.model.instability import GRADIENT_NORM, LARGEST_WEIGHT, TOTALS
from tests import models, mtp_oracle, steps
from tests.blocks import KEYS, config_of
from tests.mtp_oracle import Arch
from tests.scanning import BOTH_NORMS, CONNECTED_MTP, random_values, run

MTP = {"mudd": True, "base_num_decoder_layers": 3, **CONNECTED_MTP}

CASES = {
  "MUDD": ({}, Arch()),
  "both norms, two MTP blocks": (
    {"base_num_decoder_layers": 4, "mtp_num_layers": 2, **BOTH_NORMS},
    Arch(layers=4, mtp=2, pre_norm=True, post_norm=True),
  ),
  "window, Eq. 10": (
    {"base_num_decoder_layers": 5, "mudd_window": 2, **BOTH_NORMS, "mudd_post_norm_streams": "qkvr"},
    Arch(layers=5, window=2, pre_norm=True, post_norm=True, post_norm_streams="qkvr"),
  ),
  "one way, both norms": (
    {"mudd_ways": 1, **BOTH_NORMS},
    Arch(one_way=True, pre_norm=True, post_norm=True),
  ),
  "one way, pre-norm": ({"mudd_ways": 1, "mudd_pre_norm": True}, Arch(one_way=True, pre_norm=True)),
}
FAST = ("MUDD", "both norms, two MTP blocks")


@pytest.mark.parametrize("case", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in CASES])
def test_loss_and_gradients(case):
  keys, arch = CASES[case]
  cfg = models.config(**MTP | keys)
  values = random_values(cfg)
  [(_, loss, aux, gradients)] = run(cfg, values)
  restated = jax.jit(jax.value_and_grad(lambda values: mtp_oracle.loss(values, models.batch(cfg), arch), has_aux=True))
  (expected_loss, expected_mtp), expected = restated(values)
  # Some roundings of float32; the errors seen are up to 1e-6 of 5.7 and 1.2e-7 of 1.3.
  assert loss == pytest.approx(float(expected_loss), abs=5e-6)
  assert float(aux["mtp_loss"]) == pytest.approx(float(expected_mtp), abs=1e-6)
  assert gradients.keys() == expected.keys()
  for path, x in expected.items():
    largest = np.abs(x).max()
    assert largest > 0, path
    np.testing.assert_allclose(gradients[path], x, atol=2e-5 * largest, rtol=0, err_msg=path)  # up to 2.3e-6 seen


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("norms", [{}, BOTH_NORMS], ids=["no norms", "both norms"])
def test_starts_as_mtp_of_the_hidden_state(norms, scan):
  """At initial values a stream of MTP is the newest block output, from which MaxText's MTP continues."""
  logits, losses = {}, {}
  for mtp in ("head", "connected"):
    cfg = models.config(**MTP | {"mudd_mtp": mtp, "mtp_num_layers": 2, "scan_layers": scan}, **norms)
    model = models.build(cfg)
    initial = {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}
    [(logits[mtp], _, aux, _)] = run(cfg, initial)
    losses[mtp] = float(aux["mtp_loss"])
  np.testing.assert_array_equal(logits["connected"], logits["head"])
  assert losses["head"] > 0
  assert losses["connected"] == pytest.approx(losses["head"], rel=1e-6)


WITHOUT_MTP = ("qwen2", "qwen3", "qwen3_moe", "pythia", "gpt_oss", "olmo3", "deepseek, mHC", "deepseek4")
WITHOUT_MTP += ("qwen3_next", "qwen3_5", "qwen3_custom_moe")
SINGLE_ONLY = ("gemma4", "gemma4, experts", "gemma4, tied values", "gemma4_small", "llama4", "envy")


WITH_FAST_TEST = ("qwen3", "gemma3", "llama4")


@pytest.mark.parametrize("block", [x if x in WITH_FAST_TEST else pytest.param(x, marks=pytest.mark.slow) for x in KEYS])
def test_blocks_have_mtp_or_refuse_it(block):
  """Whether MaxText can build the layer shows when it does; shapes are enough for that."""
  for scan in (False, True):
    keys = {"mudd": True, "mtp_num_layers": 1, "scan_layers": scan}
    if block in WITHOUT_MTP or (scan and block in SINGLE_ONLY):
      of_maxtext = {"deepseek4": "does not support MTP", "gemma4_small": "requires scan_layers=False"}
      with pytest.raises(ValueError, match=of_maxtext.get(block, "^mtp_num_layers=1 does not work with")):
        config_of(block, **keys)
    else:
      assert any(path.startswith("mtp_block/") for path in model_config.parameter_shapes(config_of(block, **keys)))


@pytest.mark.slow
@pytest.mark.parametrize("block", [x for x in KEYS if x not in WITHOUT_MTP and x != "llama2"])
def test_other_blocks_train_mtp(block):
  """Gradients reach all of the DA behind the MTP block and all that it reads; scanned layers give the same loss."""
  keys = {"mudd": True, **CONNECTED_MTP}
  cfg = config_of(block, **keys)
  values = random_values(cfg)
  [(_, loss, aux, gradients)] = run(cfg, values)
  assert np.isfinite(loss) and float(aux["mtp_loss"]) > 0
  of_mtp = [path for path in gradients if path.startswith("mtp_block/") and "/connection/" in path]
  assert any(path.endswith("/w1") for path in of_mtp)
  for path in of_mtp:
    assert np.abs(gradients[path]).max() > 0, path
  if block not in SINGLE_ONLY:
    scanned = config_of(block, **keys, scan_layers=True)
    [(_, of_scanned, of_mtp, _)] = run(scanned, layout.stack(values, scanned))
    assert of_scanned == pytest.approx(loss, rel=1e-5)
    assert float(of_mtp["mtp_loss"]) == pytest.approx(float(aux["mtp_loss"]), rel=1e-5)


def test_the_rule_of_the_last_width_is_that_of_mtp():
  """Whose DAs are in no row."""
  table = [{"block": "1..L", "sources": "all", "streams": "r", "hidden": 8}]
  keys = {"mudd": True, "base_num_decoder_layers": 2, "mudd_placements": table, "mudd_last_hidden_expansion": 2.0}
  with pytest.raises(ConfigError, match=r"mudd_last_hidden_expansion=2\.0 does nothing with mudd_placements"):
    models.config(**keys)
  plan = connections.plan(models.config(**keys, mudd_mtp="connected", mtp_num_layers=1))
  assert [site.hidden for site in plan.sites.values()] == [8, 8, (2 * 4 // 64 + 1) * 64]


@pytest.fixture(scope="module")
def fully_rematerialised():
  cfg = models.config(**MTP, **BOTH_NORMS, remat_policy="full")
  values = random_values(cfg)
  return values, *run(cfg, values)


@pytest.mark.parametrize(
  "policy", [x if x == "minimal" else pytest.param(x, marks=pytest.mark.slow) for x in steps.POLICIES]
)
def test_remat_policies_change_nothing(policy, fully_rematerialised):
  values, (_, expected_loss, _, expected) = fully_rematerialised
  keys = {"decoder_layer_input": "offload", "out_proj": "device"} if policy == "custom" else {}
  [(_, loss, _, gradients)] = run(models.config(**MTP, **BOTH_NORMS, remat_policy=policy, **keys), values)
  assert loss == pytest.approx(expected_loss, abs=1e-6)
  for path, x in expected.items():
    np.testing.assert_allclose(gradients[path], x, atol=2e-5 * np.abs(x).max(), rtol=0, err_msg=path)


@pytest.mark.parametrize(
  "keys",
  [
    {},
    {"mudd_ways": 1, **BOTH_NORMS},
    {"mtp_num_layers": 2, "mudd_window": 2, "mudd_weight_norm_scale": True, "mudd_weight_scale": True, **BOTH_NORMS},
    {"mudd_dynamic": False, "mudd_post_norm": True, "mudd_post_norm_streams": "qkv"},
  ],
)
def test_counts(keys):
  """Parameters of the connections are those of the model; FLOPs by hand."""
  cfg = models.config(**MTP | keys)
  head = models.config(**MTP | keys | {"mudd_mtp": "head"})

  def parameters(cfg):
    return sum(math.prod(x.get_value().shape) for x in models.parameters(models.build(cfg)).values())

  cost, cost_of_head = counts.connections_cost(cfg), counts.connections_cost(head)
  assert cost.parameters - cost_of_head.parameters == parameters(cfg) - parameters(head) > 0
  if not keys:
    # DA_3 with C = 2 and not 1, K = (2·4·4 // 64 + 1)·64 = 64 either way; DA_4 with C = 1, N = 5.
    d, k = 32, 64
    assert cost.flops - cost_of_head.flops == 2 * (k * 4 + d * 4) + 2 * (d * k + k * 5 + d * 5)
    assert cost.activations == cost_of_head.activations + 1  # the gradient of X_4


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_totals_have_parts_of_mtp(scan):
  """Those of DA_5 are after the MTP block; a change of its parameters alone changes these."""
  cfg = models.config(**MTP | {"base_num_decoder_layers": 4}, scan_layers=scan)
  step, state = steps.prepare(cfg, donate_argnums=())
  steps.set_zero(state, "mtp_layer_1/connection/final_depth_aggregate/w2")
  parts = step(state, models.batch(cfg))[1][TOTALS]
  assert parts[GRADIENT_NORM].keys() - {0} == parts[LARGEST_WEIGHT].keys() == {1, 2, 3, 4, 5}
  assert float(parts[GRADIENT_NORM][5]) > 0
  assert [block for block, x in parts[LARGEST_WEIGHT].items() if not float(x)] == [5]


@pytest.mark.slow
@pytest.mark.parametrize("mtp", ["head", "connected"])
def test_decoding_leaves_mtp_out(mtp):
  """Greedy tokens of single and of scanned layers are those of the logits in training mode."""
  values, found = None, {}
  for scan in (False, True):
    cfg = models.config(**MTP | {"mudd_mtp": mtp}, scan_layers=scan)
    model = models.build(cfg)
    if scan:
      models.set_parameters(model, layout.stack(values, cfg))
    else:
      values = models.randomise(model)
    found[scan] = maxtext_mudd.generate(model, cfg, [[1, 2, 3, 4]], 6)
    logits = maxtext_mudd.logits(model, found[scan][:, :-1])
    np.testing.assert_array_equal(np.argmax(logits[:, 3:], -1), found[scan][:, 4:])
  np.testing.assert_array_equal(found[True], found[False])
