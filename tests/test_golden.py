"""The models of the authors' released code, to the last intermediate. Data: tests/data/README.md."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.trainers.pre_train import train
import numpy as np
import pytest
from safetensors.numpy import load_file

from maxtext_mudd.kernels import reference
from tests import models

LOGITS_TOLERANCE = 2e-4

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


def from_pytorch(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The parameters of the PyTorch model by MaxText's paths."""
  heads, width = 4, 16
  last = max(int(key.split(".")[1]) for key in weights if key.startswith("layers."))
  found = {
    "token_embedder/embedding": weights["tok_embeddings.weight"],
    "decoder/decoder_norm/scale": weights["norm.weight"],
    "decoder/logits_dense/kernel": weights["output.weight"].T,
  }
  for i in range(last + 1):
    layer = {key.removeprefix(f"layers.{i}."): w for key, w in weights.items() if key.startswith(f"layers.{i}.")}
    to = f"decoder/layers_{i}"
    for name, path in (("wq", "query"), ("wk", "key"), ("wv", "value")):
      kernel = layer[f"attention.{name}.weight"].T.reshape(-1, heads, width)
      found[f"{to}/self_attention/{path}/kernel"] = kernel
    found[f"{to}/self_attention/out/kernel"] = layer["attention.wo.weight"].T.reshape(heads, width, -1)
    found[f"{to}/self_attention/query_norm/scale"] = layer["attention.q_norm.weight"]
    found[f"{to}/self_attention/key_norm/scale"] = layer["attention.k_norm.weight"]
    for name, path in (("w1", "wi_0"), ("w3", "wi_1"), ("w2", "wo")):
      found[f"{to}/mlp/{path}/kernel"] = layer[f"feed_forward.{name}.weight"].T
    found[f"{to}/post_self_attention_layer_norm/scale"] = layer["ffn_norm.weight"]
    norm = f"{to}/pre_self_attention_layer_norm"
    if i == 0:
      found[f"{norm}/scale"] = layer["attention_norm.weight"]
    else:
      for c, stream in enumerate("qkv"):
        found[f"{norm}/{stream}/scale"] = layer[f"attention_norms.{c}.weight"]
    da = f"decoder/layers_{i}/connection/final_depth_aggregate"
    if i < last:
      da = f"decoder/layers_{i + 1}/connection/depth_aggregate"
    ways, sources = weights[f"dense_bs.{i}"].shape
    w2 = weights[f"dynamic_dense.{i}.w2.weight"].T
    found[f"{da}/w1"] = weights[f"dynamic_dense.{i}.w1.weight"].T
    found[f"{da}/w2"] = w2.reshape(-1, ways, sources)
    found[f"{da}/a"] = weights[f"dense_bs.{i}"]
  return found


def from_jax(weights: dict[str, np.ndarray], *, query_scale: float) -> dict[str, np.ndarray]:
  """The parameters of the authors' JAX model by MaxText's paths.

  Attention divides by sqrt(head_dim) there, and in MaxText's llama2 the query kernel carries that factor: parameters
  need `query_scale` head_dim**-0.5, gradients its inverse.
  """
  found = {}
  last = max(int(key.split("/")[1].split("_")[1]) for key in weights if "/layers_" in key)
  moved = {"dynamic_dense_conn1/kernel": "w1", "dynamic_dense_conn2/kernel": "w2", "dense_proj2.bias": "a"}
  moved |= {"pre_dense_proj1_norm/scale": "weight_norm_scale"}
  for key, value in weights.items():
    path = key.split("/")
    if path[0] == "decoder" and path[1].startswith("layers_"):
      i, rest = int(path[1].split("_")[1]), "/".join(path[2:])
      if rest in moved:
        key = aggregate_path(i, last) + moved[rest]
      else:
        for stream in "qkv":
          key = key.replace(f"pre_self_attention_layer_norm_{stream}", f"pre_self_attention_layer_norm/{stream}")
    elif key == "decoder/mudd_prenorm/scale":
      key = "decoder/layers_0/connection/embedding_norm/scale"
    elif path[1].startswith("mudd_prenorm_"):
      key = f"decoder/layers_{path[1].split('_')[-1]}/connection/output_norm/scale"
    elif path[1].startswith("mudd_postnorm_"):
      key = aggregate_path(int(path[1].split("_")[-1]), last) + "post_norm_r/scale"
    found[key] = value * query_scale if key.endswith("query/kernel") else value
  return found


def aggregate_path(i: int, last: int) -> str:
  """Where DA parameters after block i (from 0) live."""
  if i == last:
    return f"decoder/layers_{i}/connection/final_depth_aggregate/"
  return f"decoder/layers_{i + 1}/connection/depth_aggregate/"


def walk(model, data):
  """Runs the decoder layer by layer: yields X_i (from 0: the embedding), and (weights, streams) of DA_i."""
  decoder = model.decoder
  rest = (data["inputs_segmentation"], data["inputs_position"], True, "train")
  x = model.token_embedder(data["inputs"], model_mode="train")
  hidden, aggregates = [x], []
  carry = x
  for i in range(decoder.config.num_decoder_layers):
    layer = getattr(decoder, f"layers_{i}")
    following = getattr(decoder, f"layers_{i + 1}", None)
    if following is None:
      history = carry
      output, _ = type(layer).__mro__[1].__call__(layer, layer.connection.read(history), *rest)
      history = layer.connection.write(history, output)
      da = layer.connection.final_depth_aggregate
    else:
      history, _ = layer(carry, *rest)
      da = following.connection.depth_aggregate
    carry = history
    hidden.append(history.newest)
    weights = reference.mixing_weights(
      history.newest,
      *da.operands(),
      activation=decoder.config.mudd_activation,
      epsilon=decoder.config.normalization_layer_epsilon,
    )
    aggregates.append((weights, da(history)))
  return hidden, aggregates


@pytest.fixture(scope="module")
def muddformer():
  golden = load_file(models.DATA / "muddformer_tiny" / "golden.safetensors")
  weights = load_file(models.DATA / "muddformer_tiny" / "model.safetensors")
  rows, length = golden["input_ids"].shape
  cfg = models.config(
    **RELEASED, decoder_block="qwen3", use_qk_norm=True, max_target_length=length, per_device_batch_size=rows
  )
  model = models.build(cfg)
  models.set_parameters(model, from_pytorch(weights))
  data = models.batch(cfg) | {"inputs": golden["input_ids"]}
  return model, data, golden


def test_muddformer_logits(muddformer):
  model, data, golden = muddformer
  found = nnx.jit(models.logits)(model, data)
  assert np.abs(found - golden["logits"]).max() <= LOGITS_TOLERANCE


def test_muddformer_intermediates(muddformer):
  model, data, golden = muddformer
  hidden, aggregates = nnx.jit(walk)(model, data)
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
    for c, stream in enumerate(da.aggregate.streams):
      close(streams[stream], golden[f"streams.{i}"][c], f"streams.{i}, way {c}")


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
  found = nnx.jit(models.logits)(model, data)
  assert np.abs(found - golden["logits"]).max() <= LOGITS_TOLERANCE
  hidden, aggregates = nnx.jit(walk)(model, data)
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
  assert abs(float(loss) - float(golden["loss"][0])) <= 1e-5
  expected = {key.removeprefix("grad/"): value for key, value in golden.items() if key.startswith("grad/")}
  expected = from_jax(expected, query_scale=cfg.head_dim**0.5)
  found = {"/".join(map(str, path)): value.get_value() for path, value in gradients.flat_state()}
  assert set(found) == set(expected)
  for path, value in found.items():
    largest = np.abs(expected[path]).max()
    assert largest > 0, path
    assert np.abs(value - expected[path]).max() <= 1e-4 * largest, path


def test_the_wrong_gelu_is_noticed(muddformer):
  """The tolerance tells the two GELUs apart, so it tells smaller mistakes apart too."""
  model, data, golden = muddformer
  other = models.config(
    **RELEASED,
    decoder_block="qwen3",
    use_qk_norm=True,
    max_target_length=golden["input_ids"].shape[1],
    mudd_activation="gelu_tanh",
  )
  changed = models.build(other)
  models.set_parameters(changed, {path: value.get_value() for path, value in models.parameters(model).items()})
  found = nnx.jit(models.logits)(changed, data)
  assert jnp.abs(found - golden["logits"]).max() > LOGITS_TOLERANCE
