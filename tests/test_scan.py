"""Scanned layers: the model of single layers; what they keep for the backward pass; padding that stays zero."""

import functools

from flax import nnx
import jax
from maxtext.trainers.pre_train import train
import numpy as np
import pytest

from maxtext_mudd.checkpoints import layout
from tests import models, steps
from tests.blocks import BLOCKS
from tests.steps import POLICIES

# Single and scanned layers add in another order. In float32 they may differ by RELATIVE of the largest logit and of the
# norm of all gradients together, and by OF_TENSOR of the largest entry of one gradient. A model that magnifies rounding
# more, as by a sum that cancels, may differ by so many times what moving all parameters to neighbouring numbers does.
RELATIVE, OF_TENSOR = 1e-6, 4e-6
OF_ROUNDING, OF_ROUNDING_TENSOR = 2, 10  # at most 0.8 and 3.2 were seen, in five of the cases
ZERO = 1e-7  # of the norm of all gradients together: what rounding leaves of a gradient that is zero
SMALL = {"base_num_decoder_layers": 3}
BOTH_NORMS = {"mudd_pre_norm": True, "mudd_post_norm": True}

DCA_SUM = "DCA with the sum of middle sources, groups"
CASES = {
  "MUDD": SMALL,
  "both norms": {"base_num_decoder_layers": 4, **BOTH_NORMS},
  "2x2, and norms of block 1": {
    "base_num_decoder_layers": 5,
    "mudd_source_dilation": 2,
    "mudd_block_period": 2,
    "mudd_first_block_norms": "separate",
  },
  "2x2, both norms": {"base_num_decoder_layers": 5, "mudd_source_dilation": 2, "mudd_block_period": 2, **BOTH_NORMS},
  "window, one way": {"base_num_decoder_layers": 4, "mudd_ways": 1, "mudd_window": 2},
  "one way, norms of block 1": {**SMALL, "mudd_ways": 1, "mudd_first_block_norms": "separate"},
  "two streams": {**SMALL, "mudd_dense_streams": "qv", "mudd_weight_norm_scale": True},
  "residual stream, in the upper half": {
    "base_num_decoder_layers": 4,
    "mudd_dense_streams": "r",
    "mudd_depth_start": 0.5,
  },
  "static": {**SMALL, "mudd_dynamic": False},
  "dynamic": {**SMALL, "mudd_static": False},
  "dynamic, both norms": {**SMALL, "mudd_static": False, **BOTH_NORMS},
  "pre-norm": {"base_num_decoder_layers": 4, "mudd_block_period": 3, "mudd_pre_norm": True},
  "one block": {"base_num_decoder_layers": 1},
  "a buffer of two parts": {"base_num_decoder_layers": 9, **BOTH_NORMS},
  "groups": {
    "base_num_decoder_layers": 5,
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
    **BOTH_NORMS,
  },
  "plain, groups": {
    "base_num_decoder_layers": 4,
    "depth_connection": "residual",
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
  },
  "hyper-connections": {"base_num_decoder_layers": 4, "depth_connection": "hyper_connections"},
  "hyper-connections, static part fixed": {
    "base_num_decoder_layers": 3,
    "depth_connection": "hyper_connections",
    "mudd_expansion_rate": 3,
    "mudd_static": False,
  },
  "hyper-connections, groups": {
    "base_num_decoder_layers": 4,
    "depth_connection": "hyper_connections",
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
    "decoder_block": "gpt3",
    **BLOCKS["gpt3"][0],
  },
  "mHC": {"base_num_decoder_layers": 3, "depth_connection": "mhc"},
  "mHC of permutations, groups": {
    "base_num_decoder_layers": 4,
    "depth_connection": "mhc",
    "mudd_expansion_rate": 3,
    "mudd_mhc_mixing": "permutations",
    "mudd_mhc_end": "sum",
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
  },
  "AttnRes": {"base_num_decoder_layers": 3, "depth_connection": "attnres"},
  "AttnRes of blocks of 2": {"base_num_decoder_layers": 4, "depth_connection": "attnres", "mudd_attnres_block": 2},
  "AttnRes of blocks of 3": {"base_num_decoder_layers": 4, "depth_connection": "attnres", "mudd_attnres_block": 3},
  "AttnRes of blocks of 4, fused, groups": {
    "base_num_decoder_layers": 4,
    "depth_connection": "attnres",
    "mudd_attnres_block": 4,
    "mudd_kernel": "pallas_interpret",
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
  },
  "DCA": {"base_num_decoder_layers": 3, "depth_connection": "dca"},
  "GRN-v1, first and last": {
    "base_num_decoder_layers": 5,
    "depth_connection": "dca",
    "mudd_dca_weights": "v1",
    "mudd_dca_sources": "first_and_last",
    "mudd_dca_k": 1,
  },
  DCA_SUM: {
    "base_num_decoder_layers": 5,
    "depth_connection": "dca",
    "mudd_dca_sources": "middle_sum",
    "mudd_dca_k": 2,
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
  },
  "fused": {**SMALL, **BOTH_NORMS, "mudd_kernel": "pallas_interpret"},
  "fused, 2x2": {
    "base_num_decoder_layers": 4,
    "mudd_source_dilation": 2,
    "mudd_block_period": 2,
    **BOTH_NORMS,
    "mudd_kernel": "pallas_interpret",
  },
  "blocks first in parameters": {**SMALL, **BOTH_NORMS, "param_scan_axis": 0},
  "multi-token prediction": {**SMALL, **BOTH_NORMS, "mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1},
  **{
    f"{family}, multi-token prediction": {
      **SMALL,
      "depth_connection": family,
      "mtp_num_layers": 1,
      "mtp_loss_scaling_factor": 0.1,
    }
    for family in ("attnres", "dca", "mhc")
  },
  "tiled vocabulary": {**SMALL, **BOTH_NORMS, "num_vocab_tiling": 4},
  **{name: {**SMALL, **BOTH_NORMS, "decoder_block": name, **keys} for name, (keys, _) in BLOCKS.items()},
}
FAST = ("MUDD", "hyper-connections", "AttnRes of blocks of 2", "DCA")


def run(cfg, *parameters):
  """For each set of parameters, (logits, loss, what MaxText returns with it, gradients by path) of the model."""
  model = models.build(cfg)
  graph, _, rest = nnx.split(model, nnx.Param, ...)
  data = models.batch(cfg)

  @jax.jit
  def gradients_of(params):
    def loss(params):
      return train.loss_fn(nnx.merge(graph, params, rest, copy=True), cfg, dict(data), None, None)

    return jax.value_and_grad(loss, has_aux=True)(params)

  results = []
  for values in parameters:
    models.set_parameters(model, values)
    (value, aux), gradients = gradients_of(nnx.state(model, nnx.Param))
    logits = np.asarray(models.jitted_logits(model, data)) if cfg.num_vocab_tiling == 1 else np.zeros(1)  # makes none
    results.append((logits, float(value), aux, by_path(gradients)))
  return results


def by_path(gradients):
  return {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(gradients)}


def neighbours(values):
  """Every parameter moved to the next number above or below it, at random; zeros stay, as padding has to."""
  rng = np.random.default_rng(5)
  ends = {path: rng.choice(np.array([-np.inf, np.inf], x.dtype), x.shape) for path, x in values.items()}
  return {path: np.where(x == 0, x, np.nextafter(x, ends[path])) for path, x in values.items()}


def with_dropout(model, data, enable: bool):
  return model(data["inputs"], data["inputs_position"], data["inputs_segmentation"], enable_dropout=enable)


def random_values(cfg):
  """Small enough for a well-conditioned model: with larger ones float32 rounding alone comes to more than 1e-6."""
  model = models.build(cfg)
  start = {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}
  values = models.randomise(model)
  for path, x in values.items():
    if path.endswith(("kernel", "w1", "w2", "embedding", "w_alpha", "w_beta")):
      values[path] = x / 2
    elif path.endswith("/a"):
      values[path] = start[path] + (x - start[path]) / 4
    elif path.endswith(("static_alpha", "static_beta")):
      values[path] = start[path] + x / 10
    elif "/phi" in path:
      values[path] = x / 16
    elif path.endswith(("alpha_scale", "beta_scale")):
      values[path] = x / 10
  return values


def largest(x):
  return np.abs(x).max()


# Without rotary embedding, what is added to all keys alike changes no attention weight.
UNFELT = {"gpt3": ("key/bias", "norm/k/bias")}


def norm_of(gradients):
  return np.sqrt(sum(np.square(x).sum() for x in gradients.values()))


def check_gradients(found, expected, rounded, unfelt: tuple[str, ...] = (), floor: float = 0.0):
  """Compares gradients.

  Args:
    rounded: gradients of the model of `expected` at neighbouring parameters.
    unfelt: ends of the paths whose gradients are zero.
    floor: an error that any tensor may have, of the norm.
  """
  errors, rounding = ({path: tree[path] - x for path, x in expected.items()} for tree in (found, rounded))
  norm = norm_of(expected)
  assert norm_of(errors) <= max(RELATIVE * norm, OF_ROUNDING * norm_of(rounding))
  zero = {path for path in expected if path.endswith(unfelt)} if unfelt else set()
  assert bool(zero) == bool(unfelt)
  for path, x in errors.items():
    if path in zero:
      assert max(largest(found[path]), largest(expected[path])) <= ZERO * norm, path
    else:
      of_rounding = OF_ROUNDING_TENSOR * largest(rounding[path])
      assert largest(x) <= max(OF_TENSOR * largest(expected[path]), of_rounding, floor * norm), path


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
  # The gradient of `alpha_scale` is one number: a sum over all tokens and streams, whose terms largely cancel.
  floor = ZERO if case.startswith("hyper") else 0.0
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
BY_POLICY = [("both norms", x) for x in POLICIES] + [("AttnRes of blocks of 3", x) for x in POLICIES]
BY_POLICY += [(case, policy) for case in ("mHC", DCA_SUM) for policy in ("minimal", "custom")]


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


def test_padding_stays_zero_in_training():
  """Weight decay included; everything else moves."""
  keys = {"mudd_block_period": 2, "mudd_weight_norm_scale": True}
  keys |= {"adam_weight_decay": 0.1, "learning_rate": 0.01, "warmup_steps_fraction": 0.0}
  cfg = models.config(mudd=True, base_num_decoder_layers=4, scan_layers=True, **keys)
  step, state = steps.prepare(cfg)

  def parameters(state):
    return {"/".join(map(str, path)): x for path, x in nnx.to_flat_state(state["model"].filter(nnx.Param))}

  single = models.build(models.config(mudd=True, base_num_decoder_layers=4, **keys))
  ones = {path: np.ones(x.shape) for path, x in models.parameters(single).items()}
  exists = {path: x > 0 for path, x in layout.stack(ones, cfg).items()}
  partly = [path for path, x in exists.items() if not x.all()]
  assert len(partly) == 6  # w1, w2, a, the norm's scale, LN_k and LN_v
  for path, variable in parameters(state).items():
    variable.set_value(np.where(exists[path], variable.get_value(), 0))
  start = {path: np.asarray(x.get_value()) for path, x in parameters(state).items()}
  for _ in range(3):
    state, _ = step(state, models.batch(cfg))
  for path, variable in parameters(state).items():
    moved = np.asarray(variable.get_value()) != start[path]
    assert not moved[~exists[path]].any(), path
    assert moved[exists[path]].mean() > 0.5, path


def test_a_new_model_is_the_plain_transformer():
  """And its padding is zero."""
  keys = {"base_num_decoder_layers": 4, "scan_layers": True}
  cfg = models.config(mudd=True, **keys, mudd_weight_norm_scale=True)
  model, stock = models.build(cfg), models.build(models.config(**keys))
  values = {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}
  for path, x in layout.stack(layout.unstack(values, cfg), cfg).items():
    np.testing.assert_array_equal(values[path], x)
  data = models.batch(cfg)
  for path, x in models.parameters(stock).items():
    if path in values:
      np.testing.assert_array_equal(values[path], x.get_value(), err_msg=path)
  np.testing.assert_allclose(models.jitted_logits(model, data), models.jitted_logits(stock, data), atol=2e-6)
  spread = np.asarray(model.decoder.layers.connection.depth_aggregate.w1[...])[:, 1:].std()
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


METRICS = {
  "MUDD": (
    {**BOTH_NORMS, "mudd_block_period": 2, "mudd_ffn_reallocation": True, "mudd_ffn_groups": 2, "mudd_ffn_round_to": 8},
    {"older_weight/q": (2,), "norm/k": (2,), "older_weight/r": (2, 4), "norm/r": (2, 4)},
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
  """And they are there for each block, or where there are sites. Nine in ten of the numbers differ from all others."""
  more, there = METRICS[family]
  keys = {"mudd": True, "base_num_decoder_layers": 4, "record_internal_nn_metrics": 1, **more}
  keys["depth_connection"] = "dense" if family == "MUDD" else family
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
  for key, x in expected.items():
    assert found[key] == pytest.approx(x, rel=1.5e-6, abs=1e-12), key  # the error seen is 2e-7
  numbers = [x for x in expected.values() if x]
  assert len(set(numbers)) >= 0.9 * len(numbers) > 5
