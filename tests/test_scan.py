"""Scanned layers: the model of single layers, new or with random values; padding that stays zero."""

from flax import nnx
import jax
from maxtext.trainers.pre_train import train
import numpy as np
import pytest

from maxtext_mudd.checkpoints import layout
from tests import models, steps
from tests.blocks import BLOCKS, KEYS, OTHERS, SINGLE
from tests.scanning import (
  BOTH_NORMS,
  CASES,
  DCA_SUM,
  OF_ROUNDING,
  RELATIVE,
  SMALL,
  UNFELT,
  ZERO,
  by_path,
  check_gradients,
  entries_of_blocks,
  largest,
  neighbours,
  norm_of,
  random_values,
  run,
)

FAST = ("MUDD", "placements", "extra embeddings", "hyper-connections", "AttnRes of blocks of 2", "DCA")


def test_no_case_replaces_another():
  """A model of a block whose name is that of a case would run in its place."""
  names = [*BLOCKS, *OTHERS]
  assert len({*names}) == len(names)
  for name in {*names} - {*SINGLE}:
    assert CASES[name]["decoder_block"] == KEYS[name].get("decoder_block", name)
  assert CASES["fused"]["mudd_kernel"] == "pallas_interpret"


def with_dropout(model, data, enable: bool):
  return model(data["inputs"], data["inputs_position"], data["inputs_segmentation"], enable_dropout=enable)


@pytest.mark.parametrize("case", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in CASES])
def test_same_as_single_layers(case):
  keys = {"mudd": True, **CASES[case]}
  single = models.config(**{key: value for key, value in keys.items() if key != "mudd_kernel"})
  scanned = models.config(**keys, scan_layers=True)
  values = random_values(single)
  stacked = layout.stack(values, scanned)
  back = layout.unstack(stacked, scanned)
  assert back.keys() == values.keys()
  assert all(np.array_equal(back[path], x) for path, x in values.items())

  (logits, loss, aux, gradients), (rounded_logits, *_, rounded) = run(single, values, neighbours(values))
  [(found_logits, found_loss, found_aux, found)] = run(scanned, stacked)
  assert found_loss == pytest.approx(loss, rel=RELATIVE)
  assert float(found_aux["moe_lb_loss"]) == pytest.approx(float(aux["moe_lb_loss"]), rel=RELATIVE)
  tolerance = max(RELATIVE * largest(logits), OF_ROUNDING * largest(rounded_logits - logits))
  np.testing.assert_allclose(found_logits, logits, atol=tolerance, rtol=0)
  # The gradient of `alpha_scale` is one number: a sum over all tokens and streams, whose terms largely cancel. The
  # error seen of MaxText's mHC is 1.4e-9 of the norm.
  floor = ZERO if case.startswith("hyper") else ZERO / 10 if case == "deepseek, mHC" else 0.0
  check_gradients(layout.unstack(found, scanned), gradients, rounded, UNFELT.get(case, ()), floor)
  for path, x in layout.stack(layout.unstack(found, scanned), scanned).items():
    np.testing.assert_array_equal(found[path], x, err_msg=f"padding of {path} has a gradient")


SOWN_ALONE = {  # and a parameter of the second block, which has a gradient
  "MUDD": (BOTH_NORMS, "decoder/layers_1/connection/depth_aggregate/w1"),
  "attnres": ({"mudd_attnres_block": 2}, "decoder/layers_0/connection/depth_queries/query"),
  "dca": ({"mudd_dca_sources": "middle_sum", "mudd_dca_k": 1}, "decoder/layers_1/connection/depth_aggregate/b"),
}


@pytest.mark.parametrize("family", [pytest.param(x, marks=pytest.mark.slow) if x != "MUDD" else x for x in SOWN_ALONE])
def test_gradients_of_what_is_sown_alone(family):
  """A router's loss reads no hidden state behind the last block; its gradients need the history all the same."""
  keys, _ = BLOCKS["mixtral"]
  more, has_gradient = SOWN_ALONE[family]
  keys = {"mudd": True, **SMALL, **more, "decoder_block": "mixtral", **keys}
  keys["depth_connection"] = "dense" if family == "MUDD" else family
  single = models.config(**keys)
  scanned = models.config(**keys, scan_layers=True)
  values = random_values(single)

  def gradients(cfg, *parameters):
    model = models.build(cfg)
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradients_of(params):
      aux = train.loss_fn(nnx.merge(graph, params, rest, copy=True), cfg, dict(models.batch(cfg)), None, None)[1]
      return aux["moe_lb_loss"]

    results = []
    for values in parameters:
      models.set_parameters(model, values)
      results.append(by_path(gradients_of(nnx.state(model, nnx.Param))))
    return results

  [found] = gradients(scanned, layout.stack(values, scanned))
  found = layout.unstack(found, scanned)
  expected, rounded = gradients(single, values, neighbours(values))
  assert largest(expected[has_gradient]) > 0
  check_gradients(found, {path: x for path, x in expected.items() if x.any()}, rounded)
  assert not any(found[path].any() for path, x in expected.items() if not x.any())


@pytest.mark.slow
def test_dropout_is_the_same_in_both_passes():
  """The derivative along the gradient is that of the loss, whose masks are made again in the backward pass."""
  cfg = models.config(mudd=True, **SMALL, **BOTH_NORMS, scan_layers=True, dropout_rate=0.3, enable_dropout=True)
  model = models.build(cfg)
  models.randomise(model)
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  data = models.batch(cfg)

  @jax.jit
  def loss(params):
    return train.loss_fn(nnx.merge(graph, params, rest, copy=True), cfg, dict(data), None, None)[0]

  gradient = jax.jit(jax.grad(loss))(params)
  norm = np.sqrt(sum(float(np.square(x).sum()) for x in jax.tree.leaves(gradient)))
  step = 0.01 / norm
  ahead, behind = (
    float(loss(jax.tree.map(lambda x, g, sign=sign: x + sign * step * g / norm, params, gradient))) for sign in (1, -1)
  )
  assert (ahead - behind) / (2 * step) == pytest.approx(norm, rel=0.01)
  on, off = (np.asarray(with_dropout(model, data, enable)) for enable in (True, False))
  assert np.abs(on - off).max() > 0.01


OF_STREAMS = [
  {"block": 1, "sources": "all", "streams": "x"},
  {"block": 2, "sources": "all", "streams": "vr"},
  {"block": "L", "sources": "all", "streams": "r"},
]
PADDED = {  # keys, and how many parameters have padding
  "2x": ({"mudd_block_period": 2, "mudd_weight_norm_scale": True}, 6),  # w1, w2, a, the norm's scale, LN_k and LN_v
  "placements": ({"mudd_placements": OF_STREAMS, "mudd_post_norm": True}, 7),  # w1, w2, a, two post-norms, LN_k, LN_v
}


@pytest.mark.parametrize("case", [x if x == "2x" else pytest.param(x, marks=pytest.mark.slow) for x in PADDED])
def test_padding_stays_zero_in_training(case):
  """Weight decay included; everything else moves."""
  keys, number = PADDED[case]
  keys = keys | {"adam_weight_decay": 0.1, "learning_rate": 0.01, "warmup_steps_fraction": 0.0}
  cfg = models.config(mudd=True, base_num_decoder_layers=4, scan_layers=True, **keys)
  step, state = steps.prepare(cfg)

  def parameters(state):
    return {"/".join(map(str, path)): x for path, x in nnx.to_flat_state(state["model"].filter(nnx.Param))}

  exists = entries_of_blocks(cfg, parameters(state))
  partly = [path for path, x in exists.items() if not x.all()]
  assert len(partly) == number
  for path, variable in parameters(state).items():
    variable.set_value(np.where(exists[path], variable.get_value(), 0))
  start = {path: np.asarray(x.get_value()) for path, x in parameters(state).items()}
  for _ in range(3):
    state, _ = step(state, models.batch(cfg))
  for path, variable in parameters(state).items():
    moved = np.asarray(variable.get_value()) != start[path]
    assert not moved[~exists[path]].any(), path
    assert moved[exists[path]].mean() > 0.5, path


STARTS = [{"mudd_placements": OF_STREAMS}, {"mudd_post_norm": True, "mudd_static_start": "zero"}]


@pytest.mark.parametrize("more", [{}, *(pytest.param(x, marks=pytest.mark.slow) for x in STARTS)])
def test_a_new_model_is_the_plain_transformer(more):
  """And its padding is zero."""
  keys = {"base_num_decoder_layers": 4, "scan_layers": True}
  cfg = models.config(mudd=True, **keys, mudd_weight_norm_scale=True, **more)
  model, stock = models.build(cfg), models.build(models.config(**keys))
  values = {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}
  for path, x in layout.stack(layout.unstack(values, cfg), cfg).items():
    np.testing.assert_array_equal(values[path], x)
  data = models.batch(cfg)
  for path, x in models.parameters(stock).items():
    if path in values:
      np.testing.assert_array_equal(values[path], x.get_value(), err_msg=path)
  np.testing.assert_allclose(models.jitted_logits(model, data), models.jitted_logits(stock, data), atol=2e-6)
  w1 = layout.unstack({path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}, cfg)
  spread = w1["decoder/layers_2/connection/depth_aggregate/w1"].std()
  assert spread == pytest.approx(cfg.emb_dim**-0.5, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("family", "keys"),
  [("attnres", {"mudd_attnres_block": 3}), ("dca", {}), ("dca", {"mudd_dca_sources": "middle_sum"})],
)
def test_a_new_model_of_another_family(family, keys):
  """It is the plain model, its parameters are those of new single layers, and padding is zero."""
  keys = {"base_num_decoder_layers": 4, "scan_layers": True, "mudd": True, "depth_connection": family, **keys}
  cfg, stock = models.config(**keys), models.config(base_num_decoder_layers=4, scan_layers=True)
  model = models.build(cfg)
  values = {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}
  for path, x in layout.stack(layout.unstack(values, cfg), cfg).items():
    np.testing.assert_array_equal(values[path], x)
  data = models.batch(cfg)
  found, plain = (np.asarray(models.jitted_logits(m, data)) for m in (model, models.build(stock)))
  # The epsilon of norms weighs more where their input is divided by the number of sources.
  np.testing.assert_allclose(found, plain, atol=(1e-4 if family == "attnres" else 2e-6) * largest(plain))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["AttnRes", "AttnRes of blocks of 3", "DCA", DCA_SUM])
def test_bfloat16(case):
  """Losses and gradients of scanned layers are as near those in float32 as those of single layers."""
  keys = {"mudd": True, **CASES[case]}
  single = models.config(**keys)
  values = random_values(single)
  [(_, exact, _, expected)] = run(single, values)
  errors = []
  for scan in (False, True):
    cfg = models.config(**keys, dtype="bfloat16", scan_layers=scan)
    [(_, loss, _, found)] = run(cfg, layout.stack(values, cfg) if scan else values)
    found = layout.unstack(found, cfg) if scan else found
    assert loss == pytest.approx(exact, rel=0.01)
    errors.append(norm_of({path: found[path] - x for path, x in expected.items()}))
  assert 0 < errors[1] <= 1.5 * errors[0] < 0.15 * norm_of(expected)
