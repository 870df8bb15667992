"""Scanned layers: what they keep for the backward pass, policies of rematerialisation, and what they sow."""

import functools

from flax import nnx
from maxtext.trainers.pre_train import train
import pytest

from maxtext_mudd.checkpoints import layout
from tests import models, steps
from tests.scanning import (
  BOTH_NORMS,
  CASES,
  CONNECTED_MTP,
  DCA_SUM,
  RELATIVE,
  SMALL,
  check_gradients,
  neighbours,
  random_values,
  run,
)
from tests.steps import POLICIES


@pytest.fixture(scope="module")
def fully_rematerialised():
  """From the name of a case to (values, results, results at neighbouring values)."""

  @functools.cache
  def of(case):
    cfg = models.config(mudd=True, **CASES[case], scan_layers=True, remat_policy="full")
    values = layout.stack(random_values(models.config(mudd=True, **CASES[case])), cfg)
    return values, *run(cfg, values, neighbours(values))

  return of


# Residual streams are in MaxText's own loop, whatever the policy.
BY_POLICY = [
  (case, policy)
  for case in (
    "both norms",
    "multi-token prediction, connected",
    "AttnRes of blocks of 3",
    "AttnRes of blocks of 3, of heads, with a value route",
    DCA_SUM,
  )
  for policy in POLICIES
]
BY_POLICY += [(case, policy) for case in ("hyper-connections", "mHC") for policy in ("minimal", "custom")]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "policy"), BY_POLICY)
def test_remat_policies_change_nothing(case, policy, fully_rematerialised):
  values, (_, loss, _, gradients), (*_, rounded) = fully_rematerialised(case)
  keys = {"decoder_layer_input": "offload", "out_proj": "device"} if policy == "custom" else {}
  cfg = models.config(mudd=True, **CASES[case], scan_layers=True, remat_policy=policy, **keys)
  [(_, found_loss, _, found)] = run(cfg, values)
  assert found_loss == pytest.approx(loss, rel=RELATIVE)
  check_gradients(found, gradients, rounded)


def residuals(cfg, override: str | None = None):
  """Shapes of what goes from the forward to the backward pass of the model, as JAX's own `saved_residuals` has them."""
  from jax._src.ad_checkpoint import saved_residuals  # what jax.ad_checkpoint.print_saved_residuals prints

  model = models.build(cfg)
  if override:
    model.decoder.remat_policy_override = override
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  data = models.batch(cfg)

  def loss(params):
    return train.loss_fn(nnx.merge(graph, params, rest, copy=True), cfg, dict(data), None, None)[0]

  return [aval.shape for aval, _ in saved_residuals(loss, params)]


@pytest.mark.parametrize(
  ("policy", "norms", "of_blocks"),
  [
    ("full", False, 0),
    ("none", False, 0),
    (None, False, 0),
    ("full", True, 1),  # where sources are normed: X_i, which block i + 1 reads besides
    ("minimal", False, 1),  # attention's product; no streams
  ],
)
def test_the_history_is_kept_once(policy, norms, of_blocks):
  """Four blocks, so a buffer of five; batch, length and width are like nothing else's."""
  sizes = {"per_device_batch_size": 3, "max_target_length": 7, "base_emb_dim": 40, "base_num_decoder_layers": 4}
  keys = {**sizes, **(BOTH_NORMS if norms else {})}
  kept = residuals(models.config(mudd=True, **keys, scan_layers=True, remat_policy=policy))
  histories = [shape for shape in kept if shape[-3:] == (3, 7, 40) and len(shape) > 3]
  assert sorted(histories) == [(4, 3, 7, 40)] * of_blocks + [(5, 3, 7, 40)]


@pytest.mark.parametrize(("policy", "of_blocks"), [("full", 1), ("minimal", 2)])
def test_sources_of_sublayers_are_kept_once(policy, of_blocks):
  """Eight sublayers, so blocks of 2 make four sums, and there are five sources with logits of nine queries. Besides,
  the newest source of each block is kept, and attention's product where the policy keeps it."""
  sizes = {"per_device_batch_size": 3, "max_target_length": 7, "base_emb_dim": 40, "base_num_decoder_layers": 4}
  keys = {**sizes, "depth_connection": "attnres", "mudd_attnres_block": 2}
  kept = residuals(models.config(mudd=True, **keys, scan_layers=True, remat_policy=policy))
  sources = [shape for shape in kept if shape[-3:] == (3, 7, 40) and len(shape) > 3]
  assert sorted(sources) == [(4, 3, 7, 40)] * of_blocks + [(5, 3, 7, 40)]
  assert [shape for shape in kept if shape[-3:] == (9, 3, 7) and len(shape) > 3] == [(5, 9, 3, 7)]


def test_a_policy_for_one_step_goes_before_the_configuration():
  """MaxText does a step again with "full" where `moe_dropless_fallback` asks for it."""
  cfg = models.config(mudd=True, **SMALL, scan_layers=True, remat_policy="minimal")
  full = models.config(mudd=True, **SMALL, scan_layers=True, remat_policy="full")
  assert sorted(residuals(cfg, "full")) == sorted(residuals(full)) != sorted(residuals(cfg))


METRICS = {
  "MUDD": (
    {**BOTH_NORMS, "mudd_block_period": 2, "mudd_ffn_reallocation": True, "mudd_ffn_groups": 2, "mudd_ffn_round_to": 8},
    {"older_weight/q": (2,), "norm/k": (2,), "older_weight/r": (2, 4), "norm/r": (2, 4)},
  ),
  "placements": (
    {
      "mudd_placements": [
        {"block": 1, "sources": "all", "streams": "x"},
        {"block": 3, "sources": [0, "last:2"], "streams": "vr"},
        {"block": "L", "sources": "all", "streams": "r"},
      ]
    },
    {"older_weight/x": (1,), "norm/v": (3,), "older_weight/r": (3, 4)},
  ),
  "MTP": (
    {**CONNECTED_MTP, **BOTH_NORMS, "mudd_block_period": 2},
    {"older_weight/q": (2,), "norm/r": (2, 4), "older_weight/m": (4, 5), "dynamic_weight_max/m": (4, 5)},
  ),
  "hyper_connections": ({}, {"read_weight/ffn": (0, 1, 2, 3), "column_sum/attention": (0, 1, 2, 3)}),
  "mhc": ({}, {"row_sum/ffn": (0, 1, 2, 3), "norm/attention": (0, 1, 2, 3), "write_weight/ffn": (0, 1, 2, 3)}),
  "attnres": (
    {"mudd_attnres_block": 3},
    {"older_weight/attention": (1, 2, 3), "older_weight/ffn": (0, 1, 2, 3), "older_weight/x": (4,), "norm/x": (4,)},
  ),
  "dca": (
    {"mudd_dca_sources": "middle_sum"},
    {"older_weight/q": (1, 2, 3), "older_weight/v": (1, 2, 3), "norm/k": (0, 1, 2, 3), "norm/x": (4,)},
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", METRICS)
def test_metrics_are_those_of_single_layers(family):
  """And they are there for each block, or where there are sites, for the streams that these make. MUDD's numbers differ
  from each other, nine in ten of the others' do: sums of mixing matrices of mHC are all near 1."""
  more, there = METRICS[family]
  keys = {"mudd": True, "base_num_decoder_layers": 4, "record_internal_nn_metrics": 1, **more}
  is_dense = family in ("MUDD", "placements", "MTP")
  keys["depth_connection"] = "dense" if is_dense else family
  single, scanned = (models.config(**keys, scan_layers=scan) for scan in (False, True))
  values = random_values(single)
  logged = []
  for cfg, own in ((single, values), (scanned, layout.stack(values, scanned))):
    step, state = steps.prepare(cfg)
    for path, variable in nnx.to_flat_state(state["model"].filter(nnx.Param)):
      variable.set_value(own["/".join(map(str, path))])
    logged.append(step(state, models.batch(cfg))[1]["scalar"])
  expected, found = ({key: float(x) for key, x in scalars.items() if key.startswith("mudd/")} for scalars in logged)
  assert found.keys() == expected.keys()
  assert {f"mudd/{name}/da_{after:03d}" for name, afters in there.items() for after in afters} <= found.keys()
  afters = {after for numbers in there.values() for after in numbers}
  totals = {"mudd/grad_norm"} | ({"mudd/max_weight"} if is_dense or family == "dca" else set())
  assert totals <= expected.keys()
  assert {key.rsplit("/", 1)[1] for key in expected.keys() - totals} == {f"da_{after:03d}" for after in afters}
  for key, x in expected.items():
    assert found[key] == pytest.approx(x, rel=1.5e-6, abs=1e-12), key  # the error seen is 2e-7
  numbers = [x for key, x in expected.items() if x and key not in totals]
  assert len(set(numbers)) >= (1 if is_dense else 0.9) * len(numbers) > 5
