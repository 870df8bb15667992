"""The models of the authors' released code, to the last intermediate. Data: tests/data/README.md."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.trainers.pre_train import train
import numpy as np
import pytest
from safetensors.numpy import load_file

import maxtext_mudd
from tests import models
from tests.parameters import from_jax, from_pytorch
from tests.published import LOGITS_TOLERANCE

RELEASED = {
  "mudd": True,
  "mudd_ffn_reallocation": True,
  "base_emb_dim": 64,
  "base_num_query_heads": 4,
  "base_num_kv_heads": 4,
  "head_dim": 16,
  "base_mlp_dim": 256,
  "base_num_decoder_layers": 6,
  "vocab_size": 128,
  "rope_max_timescale": 10000,
  "logits_via_embedding": False,
  "mudd_last_hidden_expansion": 4.0,
  "mudd_hidden_round_to": 64,
}


def close(found, expected, what: str) -> None:
  np.testing.assert_allclose(found, expected, atol=LOGITS_TOLERANCE, rtol=0, err_msg=what)


def run(model, data):
  """(logits, X_i from the embedding on, and of each DA its weights and streams)."""
  arrays = maxtext_mudd.inspect(
    model, data["inputs"], positions=data["inputs_position"], segment_ids=data["inputs_segmentation"]
  )
  last = model.decoder.config.num_decoder_layers
  aggregates = []
  for i in range(1, last + 1):
    names = [f"{stream}/da_{i:03d}" for stream in ("qkvr" if i < last else "r")]
    weights = np.stack([arrays[f"weights/{name}"] for name in names], axis=2)
    aggregates.append((weights, [arrays[f"streams/{name}"] for name in names]))
  return arrays["logits"], [arrays[f"history/{i:03d}"] for i in range(last + 1)], aggregates


PYTORCH = {
  "muddformer_tiny": {"decoder_block": "qwen3"},
  "muddpythia_tiny": {
    "decoder_block": "gpt3",
    "mudd_decoder_layer": "pythia",
    "mlp_activations": ["gelu"],
    "base_num_decoder_layers": 5,
    "normalization_layer_epsilon": 1e-5,
  },
}


@pytest.fixture(scope="module", params=PYTORCH)
def released(request):
  folder = models.DATA / request.param
  golden, weights = load_file(folder / "golden.safetensors"), load_file(folder / "model.safetensors")
  rows, length = golden["input_ids"].shape
  keys = RELEASED | PYTORCH[request.param]
  cfg = models.config(**keys, use_qk_norm=True, max_target_length=length, per_device_batch_size=rows)
  model = models.build(cfg)
  models.set_parameters(model, from_pytorch(weights))
  data = models.batch(cfg) | {"inputs": golden["input_ids"]}
  return model, data, golden, keys


def test_released_logits_and_intermediates(released):
  model, data, golden, _ = released
  logits, hidden, aggregates = run(model, data)
  close(logits, golden["logits"], "logits")
  for i, x in enumerate(hidden):
    close(x, golden[f"hidden.{i}"], f"hidden.{i}")
  for i, (weights, streams) in enumerate(aggregates):
    expected = golden[f"dw.{i}"].transpose(1, 2, 0, 3)
    close(weights, expected, f"dw.{i}")
    da = aggregate_of(model, i)
    dynamic = weights - da.a[...]
    expected = golden[f"dw_dyn.{i}"].transpose(1, 2, 0, 3)
    close(dynamic, expected, f"dw_dyn.{i}")
    assert len(streams) == len(golden[f"streams.{i}"])
    for c, stream in enumerate(streams):
      close(stream, golden[f"streams.{i}"][c], f"streams.{i}, way {c}")


def aggregate_of(model, i):
  following = getattr(model.decoder, f"layers_{i + 1}", None)
  if following is None:
    return getattr(model.decoder, f"layers_{i}").connection.final_depth_aggregate
  return following.connection.depth_aggregate


def muddjax(name):
  golden = load_file(models.DATA / name / "golden.safetensors")
  weights = load_file(models.DATA / name / "params.safetensors")
  rows, length = golden["inputs"].shape
  normed = name == "muddjax_prepost"
  cfg = models.config(
    **RELEASED,
    decoder_block="llama2",
    max_target_length=length,
    per_device_batch_size=rows,
    mudd_activation="gelu_tanh",
    mudd_first_block_norms="separate",
    mudd_pre_norm=normed,
    mudd_post_norm=normed,
    mudd_weight_norm_scale=normed,
    normalize_embedding_logits=True,
    remat_policy="full",
  )
  model = models.build(cfg)
  models.set_parameters(model, from_jax(weights, query_scale=cfg.head_dim**-0.5))
  data = {key: golden[key] for key in models.batch(cfg) if key in golden}
  return cfg, model, data | {"targets_position": golden["inputs_position"]}, golden


@pytest.fixture(scope="module", params=["muddjax_plain", "muddjax_prepost"])
def fork(request):
  return muddjax(request.param)


def test_fork_logits_and_intermediates(fork):
  _, model, data, golden = fork
  logits, hidden, aggregates = run(model, data)
  close(logits, golden["logits"], "logits")
  for i, x in enumerate(hidden[1:], 1):
    close(x, golden[f"hidden.{i}"], f"hidden.{i}")
  for i, (weights, _) in enumerate(aggregates):
    close(weights, golden[f"dw.{i}"], f"dw.{i}")


def test_fork_loss_and_gradients(fork):
  cfg, model, data, golden = fork
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  @functools.partial(jax.jit)
  def loss_and_gradients(params):
    def loss(params):
      return train.loss_fn(nnx.merge(graph, params, rest, copy=True), cfg, dict(data), None, None)[0]

    return jax.value_and_grad(loss)(params)

  loss, gradients = loss_and_gradients(params)
  assert abs(float(loss) - float(golden["loss"][0])) <= 8e-6  # of about 5, in float32; the errors seen are up to 1.4e-6
  expected = {key.removeprefix("grad/"): value for key, value in golden.items() if key.startswith("grad/")}
  expected = from_jax(expected, query_scale=cfg.head_dim**0.5)
  found = {"/".join(map(str, path)): value.get_value() for path, value in gradients.flat_state()}
  assert set(found) == set(expected)
  for path, value in found.items():
    largest = np.abs(expected[path]).max()
    assert largest > 0, path
    assert np.abs(value - expected[path]).max() <= 1e-4 * largest, path  # float32; the errors seen are up to 2.2e-5


def test_the_wrong_gelu_is_noticed(released):
  """The tolerance tells the two GELUs apart, so it tells smaller mistakes apart too."""
  model, data, golden, keys = released
  other = models.config(
    **keys, use_qk_norm=True, max_target_length=golden["input_ids"].shape[1], mudd_activation="gelu_tanh"
  )
  changed = models.build(other)
  models.set_parameters(changed, {path: value.get_value() for path, value in models.parameters(model).items()})
  found = nnx.jit(models.logits)(changed, data)
  assert jnp.abs(found - golden["logits"]).max() > LOGITS_TOLERANCE
