"""What MaxText does around the layers keeps working with MUDD connections on."""

import math
import types

from flax import nnx
import jax
from jax._src.ad_checkpoint import saved_residuals  # public only as print_saved_residuals
from maxtext.layers.nnx_decoders import NNXDecoder
from maxtext.trainers.pre_train import train
from maxtext.utils import maxtext_utils
import numpy as np
import pytest
import scipy.special

from maxtext_mudd import kernels
from maxtext_mudd.config.stock_checks import REMAT_POLICIES
from maxtext_mudd.model import counts
from tests import models, steps
from tests.blocks import MOE, config_of
from tests.steps import POLICIES, value_and_gradients

TINY = {"mudd": True, "base_num_decoder_layers": 2}


@pytest.fixture(scope="module")
def fully_rematerialised():
  return value_and_gradients(models.config(**TINY, remat_policy="full"))


def test_every_policy_of_maxtext_is_known():
  """Of all words in MaxText's function, the known policies are those that it takes."""
  constants = NNXDecoder.get_remat_policy.__code__.co_consts
  words = {x for constant in constants for x in (constant if isinstance(constant, frozenset) else [constant])}
  config = {"scan_layers": False, "tensors_on_device": [], "tensors_to_offload": []}

  def takes(word) -> bool:
    decoder = types.SimpleNamespace(
      config=types.SimpleNamespace(remat_policy=word, **config), minimal_policy=lambda **_: None
    )
    try:
      NNXDecoder.get_remat_policy(decoder)
    except AssertionError:
      return False
    return True

  assert {word for word in words if isinstance(word, str) and takes(word)} == set(REMAT_POLICIES)


FAST = ("none", "custom")


@pytest.mark.parametrize(
  "policy", [policy if policy in FAST else pytest.param(policy, marks=pytest.mark.slow) for policy in POLICIES]
)
def test_remat_policies_change_nothing(policy, fully_rematerialised):
  keys = {"decoder_layer_input": "offload", "out_proj": "device"} if policy == "custom" else {}
  loss, _, gradients = value_and_gradients(models.config(**TINY, remat_policy=policy, **keys))
  expected_loss, _, expected = fully_rematerialised
  assert loss == pytest.approx(expected_loss, abs=1e-6)  # two roundings of a float32 loss of 4.5; none was seen
  assert_gradients(gradients, expected, 1e-4)  # up to 1.7e-5 seen, where XLA fuses two policies differently


def assert_gradients(found, expected, budget) -> None:
  """In float32; the budget is of the largest entry of each gradient."""
  for path, gradient in found.items():
    largest = np.abs(expected[path]).max()
    assert largest > 0, path
    np.testing.assert_allclose(gradient, expected[path], atol=budget * largest, rtol=0, err_msg=str(path))


def loss_of_parameters(**keys):
  """(the loss of a training step as a function of parameters, the parameters, the shape of a [B,T,D] array)."""
  cfg = models.config(**keys, base_num_decoder_layers=4, max_target_length=24)
  graph, params, rest = nnx.split(models.build(cfg), nnx.Param, ...)
  data = models.batch(cfg)

  def loss(params):
    return train.loss_fn(nnx.merge(graph, params, rest, copy=True), cfg, dict(data), None, None)[0]

  return loss, params, (2, cfg.max_target_length, cfg.emb_dim)


def saved_outputs(**keys) -> list[str]:
  """Where each [B,T,D] array comes from that the forward pass of a training step keeps for the backward pass."""
  loss, params, shape = loss_of_parameters(**keys)
  return [why for aval, why in saved_residuals(loss, params) if aval.shape == shape]


def saved_arrays(**keys) -> int:
  """How many different [B,T,D] arrays the forward pass keeps; zeros take no memory in a compiled step."""
  loss, params, shape = loss_of_parameters(**keys)
  _, vjp = jax.vjp(loss, params)
  kept = {np.asarray(x).tobytes() for x in jax.tree.leaves(vjp) if getattr(x, "shape", None) == shape}
  return len(kept - {bytes(len(next(iter(kept))))})


def test_full_rematerialisation_saves_no_streams():
  """As many arrays as the stock model saves: X_0..X_L, and what the final norm keeps; the normed sources as well where
  there is a pre-norm, as `complexity` counts them."""
  full = {"remat_policy": "full"}
  stock = saved_arrays(**full)
  assert stock > 4  # blocks
  assert saved_arrays(mudd=True, **full) == stock
  assert saved_arrays(mudd=True, mudd_pre_norm=True, mudd_post_norm=True, **full) == stock + 4
  assert saved_arrays(mudd=True, remat_policy="minimal") > stock


@pytest.mark.parametrize("kernel", ["xla", "pallas_interpret"])
def test_streams_are_kept_by_name(kernel):
  """What the aggregates make is MaxText's `decoder_layer_input`: four streams for each of the blocks 2 to 4, the
  embedding for block 1."""
  custom = {"mudd": True, "mudd_kernel": kernel, "remat_policy": "custom"}
  named = {
    where: sum("named 'decoder_layer_input'" in why for why in saved_outputs(**custom, decoder_layer_input=where))
    for where in ("remat", "device")
  }
  assert named == {"remat": 0, "device": 13}


def test_load_balance_loss():
  loss, aux, gradients = value_and_gradients(models.config(**TINY, decoder_block="mixtral", **MOE))
  assert float(aux["moe_lb_loss"]) > 0
  assert loss > float(aux["xent_sum"]) / float(aux["total_weights"])
  gate = gradients[("decoder", "layers_1", "MoeBlock_0", "gate", "kernel")]
  assert np.abs(gate).max() > 0


def test_vocabulary_tiling():
  whole, _, expected = value_and_gradients(models.config(**TINY))
  tiled, _, found = value_and_gradients(models.config(**TINY, num_vocab_tiling=4))
  assert tiled == pytest.approx(whole, abs=2e-6)  # float32; the error seen is one rounding of 4.5, 4.8e-7
  assert_gradients(found, expected, 5e-6)  # up to 8.5e-7 seen


def test_dropout_is_applied_and_moves_the_generator():
  cfg = models.config(**TINY, dropout_rate=0.2, enable_dropout=True)
  model = models.build(cfg)
  data = models.batch(cfg)
  forward = nnx.jit(
    lambda model, on: model(data["inputs"], data["inputs_position"], data["inputs_segmentation"], enable_dropout=on),
    static_argnums=1,
  )
  first, second, off = forward(model, True), forward(model, True), forward(model, False)
  assert np.abs(first - off).max() > 0.01
  assert np.abs(first - second).max() > 0.01
  np.testing.assert_array_equal(off, forward(model, False))


@pytest.mark.slow
def test_multi_token_prediction():
  cfg = models.config(**TINY, mtp_num_layers=1, mtp_loss_scaling_factor=0.1)
  loss, aux, gradients = value_and_gradients(cfg)
  assert float(aux["mtp_loss"]) > 0
  # Two roundings of a float32 loss of 5; the error seen is 9e-8.
  assert loss == pytest.approx(float(aux["xent_sum"]) / float(aux["total_weights"]) + float(aux["mtp_loss"]), abs=8e-7)
  assert any("mtp_block" in path and np.abs(g).max() > 0 for path, g in gradients.items())


def test_router_bias_is_refused_by_name():
  """MaxText has router biases in its deepseek block only."""
  with pytest.raises(ValueError, match="only supported for the DeepSeek decoder block"):
    models.config(**TINY, decoder_block="mixtral", **MOE, routed_bias=True, routed_bias_update_rate=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("block", ["deepseek", "deepseek4"])
def test_router_biases_are_updated_as_in_stock(block, scan):
  """Of single layers of deepseek MaxText updates those of the first layer of experts alone."""
  keys = {"model_name": "deepseek3-tiny", "override_model_config": True} if block == "deepseek" else {}

  def moves(**more):
    cfg = config_of(block, routed_bias=True, routed_bias_update_rate=0.5, scan_layers=scan, **keys, **more)
    step, state = steps.prepare(cfg)

    def biases(state):
      flat = {"/".join(map(str, path)): x for path, x in nnx.to_flat_state(state["model"])}
      return {path: np.asarray(x.get_value()) for path, x in flat.items() if path.endswith("gate/bias")}

    before = biases(state)
    after = biases(step(state, models.batch(cfg))[0])
    return {path: np.abs(x - before[path]).max(-1).tolist() for path, x in after.items()}  # of each layer

  stock, found = moves(), moves(mudd=True)
  assert found == stock
  of_layers = np.concatenate([np.atleast_1d(x) for x in stock.values()])
  assert of_layers.tolist() == ([0.5, 0] if block == "deepseek" and not scan else [0.5, 0.5])


def train_step_metrics(cfg, data=None):
  """Scalars of one train step of a random model on a batch, random if not given, as MaxText logs them."""
  step, state = steps.prepare(cfg)
  return step(state, data or models.batch(cfg))[1]["scalar"]


def test_activation_and_connection_metrics():
  cfg = models.config(mudd=True, record_internal_nn_metrics=1)
  scalars = train_step_metrics(cfg)
  assert {f"activ_mean/layer_{i:03d}" for i in range(3)} <= scalars.keys()
  dynamic = [f"dynamic_weight_{x}" for x in ("max", "mean", "deviation")]
  for statistic in ("older_weight", "norm", *dynamic):
    made = {f"mudd/{statistic}/{c}/da_{i:03d}" for i in (1, 2) for c in "qkvr"} | {f"mudd/{statistic}/r/da_003"}
    assert made == {key for key in scalars if key.startswith(f"mudd/{statistic}/")}
  assert {f"mudd/output_norm/all/da_{i:03d}" for i in (1, 2, 3)} == {key for key in scalars if "/output_norm/" in key}
  assert all(0 < scalars[key] < 1 for key in scalars if "older_weight" in key)
  assert all(scalars[key] > 0 for key in scalars if "/norm/" in key)
  off = models.config(mudd=True)
  step, state = steps.prepare(off)
  scalars = jax.eval_shape(step, state, models.batch(off))[1]["scalar"]
  assert {key for key in scalars if key.startswith("mudd/")} == {"mudd/max_weight", "mudd/grad_norm"}


def test_connection_metrics_are_what_they_say():
  """The shares and norms of one DA, computed from its inputs in NumPy."""
  cfg = models.config(mudd=True, record_internal_nn_metrics=1)
  model = models.build(cfg)
  models.randomise(model)
  connection = model.decoder.layers_2.connection
  da = connection.depth_aggregate
  rng = np.random.default_rng(0)
  xs = [rng.standard_normal((2, 16, 32)).astype(np.float32) for _ in range(3)]
  sources = list(map(jax.numpy.asarray, xs))
  connection.read(3, kernels.mix(sources, da.weights(sources[-1], -1, None)), sources[-1])
  sown = {path[-1]: float(value.get_value()[0]) for path, value in nnx.to_flat_state(nnx.pop(da, nnx.Intermediate))}

  normed = xs[-1] / np.sqrt(np.square(xs[-1]).mean(-1, keepdims=True) + 1e-6)
  hidden = normed @ np.asarray(da.w1[...])
  hidden = hidden * scipy.special.ndtr(hidden)
  dynamic = np.einsum("btk,kcn->btcn", hidden, np.asarray(da.w2[...]))
  weights = dynamic + np.asarray(da.a[...])
  assert sown["mudd_output_norm_all"] == pytest.approx(np.sqrt(np.square(xs[-1]).mean()), rel=2e-6)
  for c, stream in enumerate("qkvr"):
    share = np.abs(weights[:, :, c])
    older = (share[..., :2].sum(-1) / share.sum(-1)).mean()
    # Of float32, in another order; the errors seen are up to 6.2e-8 and 2.8e-7.
    assert sown[f"mudd_older_weight_{stream}"] == pytest.approx(older, rel=5e-7)
    mixed = sum(weights[:, :, c, j, None] * x for j, x in enumerate(xs))
    assert sown[f"mudd_norm_{stream}"] == pytest.approx(np.sqrt(np.square(mixed).mean()), rel=2e-6)
    of_stream = dynamic[:, :, c]
    assert sown[f"mudd_dynamic_weight_max_{stream}"] == pytest.approx(np.abs(of_stream).max(), rel=2e-6)
    assert sown[f"mudd_dynamic_weight_mean_{stream}"] == pytest.approx(of_stream.mean(), rel=2e-6, abs=2e-7)
    assert sown[f"mudd_dynamic_weight_deviation_{stream}"] == pytest.approx(of_stream.std(), rel=2e-6)


@pytest.mark.slow
def test_gradient_accumulation():
  """Two microbatches give the mean of their losses and gradients, and the statistics of the whole batch."""
  shape = {"mudd": True, "base_num_decoder_layers": 2}
  accumulated = models.config(
    **shape,
    per_device_batch_size=2,
    gradient_accumulation_steps=2,
    gradient_clipping_threshold=0.0,
    record_internal_nn_metrics=1,
  )
  found = train_step_metrics(accumulated)
  half = models.config(**shape, per_device_batch_size=2)
  data = models.batch(accumulated)
  halves = [value_and_gradients(half, {key: x[i : i + 2] for key, x in data.items()}) for i in (0, 2)]
  # In float32; the errors seen are 5.2e-7, 1e-7 and, of the statistics below, 0.
  squares = (np.square((halves[0][2][path] + halves[1][2][path]) / 2).sum() for path in halves[0][2])
  assert float(found["learning/grad_norm"]) == pytest.approx(np.sqrt(sum(squares)), rel=4e-6)
  assert float(found["learning/loss"]) == pytest.approx((halves[0][0] + halves[1][0]) / 2, rel=1e-6)

  whole = train_step_metrics(models.config(**shape, per_device_batch_size=4, record_internal_nn_metrics=1))
  for key in ("mudd/older_weight/q/da_001", "mudd/older_weight/r/da_002"):
    assert float(found[key]) == pytest.approx(float(whole[key]), rel=5e-7)
  of_halves = [train_step_metrics(half, {key: x[i : i + 2] for key, x in data.items()}) for i in (0, 2)]
  largest = max(float(x["mudd/max_weight"]) for x in of_halves)
  assert largest / 2 < float(found["mudd/max_weight"]) <= largest * (1 + 1e-6)
  squares = (
    np.square((halves[0][2][path] + halves[1][2][path]) / 2).sum() for path in halves[0][2] if "connection" in path
  )
  assert float(found["mudd/grad_norm"]) == pytest.approx(np.sqrt(sum(squares)), rel=4e-6)


def test_reported_flops_count_aggregates_and_reallocated_ffns():
  shape = {"base_num_decoder_layers": 4, "base_mlp_dim": 256, "gradient_accumulation_steps": 2}
  plain, *_ = maxtext_utils.calculate_tflops_training_per_device(models.config(**shape), log=False)
  keys = {"mudd_ffn_reallocation": True, "mudd_ffn_last": 2.0, "mudd_ffn_round_to": 8, "mudd_hidden_round_to": 0}
  cfg = models.config(**shape, mudd=True, **keys)
  found, *_ = maxtext_utils.calculate_tflops_training_per_device(cfg, log=False)
  # By hand: DA_1..3 with C = 4, DA_4 with C = 1 and K four times as wide; widths 0.5, 1.0, 1.5, 2.0 of 256.
  d = 32
  extra = sum(2 * (d * k + k * c * n + d * c * n) for c, n, k in ((4, 2, 8), (4, 3, 12), (4, 4, 16), (1, 5, 20)))
  extra += 2 * 3 * d * (0.5 + 1.0 + 1.5 + 2.0 - 4) * 256
  tokens = 2 * 16 * 2
  # Sums in float64, some of which cancel; no error was seen.
  assert found - plain == pytest.approx(3 * tokens * extra / 1e12, rel=1e-14, abs=0)


def test_reported_flops_count_every_residual_stream():
  """Aggregates mix each of the residual streams of MaxText's mHC."""

  def extra(streams):
    configs = [config_of("deepseek, mHC", mhc_expansion_rate=streams, mudd=mudd) for mudd in (True, False)]
    (mudd, *_), (stock, *_) = (maxtext_utils.calculate_tflops_training_per_device(x, log=False) for x in configs)
    return mudd - stock

  assert extra(3) == pytest.approx(3 * extra(1), rel=1e-12)


def test_parameter_count():
  """Of the connections, against K, C and N written out."""
  cfg = models.config(mudd=True)
  plain = models.config()

  def count(cfg):
    return sum(math.prod(v.get_value().shape) for v in models.parameters(models.build(cfg)).values())

  d, wide = 32, 64
  extra = sum(d * wide + wide * c * n + c * n for c, n in ((4, 2), (4, 3), (1, 4)))
  extra += 2 * 2 * d  # two more attention norms in each block but the first
  assert count(cfg) - count(plain) == extra
  assert counts.connections_cost(cfg).flops > 0
