"""Feed-forward blocks in parts of their width: the same function and gradients, and nothing wide at once."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.common.common_types import MODEL_MODE_AUTOREGRESSIVE, MODEL_MODE_TRAIN
from maxtext.layers.linears import MlpBlock
import numpy as np
import pytest

from maxtext_mudd.blocks.feed_forward import split_feed_forward
from tests import models

WIDTH, LENGTH = 80, 5
BLOCKS = {
  "gated": {"activations": ["silu", "linear"]},
  "fused": {"activations": ["silu", "linear"], "fused": True},
  "biases": {"activations": ["gelu"], "use_bias": True},
  "bias of two": {"activations": ["silu", "linear"], "use_bias": True, "fused": True},
}


class Layer(nnx.Module):
  def __init__(self, fused=False, model_mode=MODEL_MODE_TRAIN, dropout=0.0, **keys):
    config = models.config(mudd=True, mudd_ffn_parts=3, fused_mlp=fused, matmul_precision="highest")
    self.mlp = MlpBlock(
      config=config,
      mesh=jax.make_mesh((1,), ("fsdp",)),
      in_features=config.emb_dim,
      intermediate_dim=WIDTH,
      intermediate_dropout_rate=dropout,
      model_mode=model_mode,
      rngs=nnx.Rngs(params=0, dropout=1),
      **keys,
    )


def reference(values: dict, x, activations) -> np.ndarray:
  """The whole block in float64."""
  names = ["wi"] if len(activations) == 1 else [f"wi_{i}" for i in range(len(activations))]
  if "wi_0/kernel" not in values and len(activations) > 1:  # fused
    for i, name in enumerate(names):
      values |= {f"{name}/kernel": values["wi/kernel"][:, i]}
      values |= {f"{name}/bias": values["wi/bias"][i]} if "wi/bias" in values else {}
  product = 1
  for name, activation in zip(names, activations):
    h = x @ values[f"{name}/kernel"] + values.get(f"{name}/bias", 0)
    if activation == "silu":
      h = h / (1 + np.exp(-h))
    elif activation == "gelu":  # MaxText's is the approximation by tanh
      h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    product = product * h
  return product @ values["wo/kernel"] + values.get("wo/bias", 0)


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
  layer = Layer(**BLOCKS[name])
  values = models.randomise(layer.mlp)
  x, cotangent = np.random.default_rng(3).standard_normal((2, 2, LENGTH, layer.mlp.in_features), np.float32)
  exact = reference(
    {k: v.astype(np.float64) for k, v in values.items()}, x.astype(np.float64), BLOCKS[name]["activations"]
  )

  def loss(layer, x):
    y = layer.mlp(x, deterministic=True)
    return (y * cotangent).sum(), y

  def run():
    return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

  (_, whole), whole_grads = run()
  split_feed_forward(layer)
  (_, parts), parts_grads = run()
  # Of the largest entry, float32 sums; the errors seen are up to 3.5e-7 of outputs and 5.1e-7 of gradients.
  for y in (whole, parts):
    np.testing.assert_allclose(y, exact, rtol=0, atol=2e-6 * np.abs(exact).max())
  for a, b in zip(jax.tree.leaves(whole_grads), jax.tree.leaves(parts_grads), strict=True):
    np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max())
  wide = re.compile(rf"\[2,{LENGTH},(\d+,)?{WIDTH}\]")
  assert not wide.search(str(jax.make_jaxpr(lambda x: loss(layer, x))(x)))


def test_decoding_computes_the_whole():
  layer = Layer(activations=["silu", "linear"], model_mode=MODEL_MODE_AUTOREGRESSIVE)
  split_feed_forward(layer)
  jaxpr = str(jax.make_jaxpr(lambda x: layer.mlp(x, deterministic=True))(jnp.ones((2, 1, layer.mlp.in_features))))
  assert f"[2,1,{WIDTH}]" in jaxpr


def test_each_part_draws_its_own_dropout():
  """Where all columns are alike, output i is the number that part i kept."""
  layer = Layer(activations=["linear"], dropout=0.5)
  split_feed_forward(layer)
  x = jnp.ones((1, 1, layer.mlp.in_features))
  models.set_parameters(
    layer.mlp,
    {
      "wi/kernel": np.full((layer.mlp.in_features, WIDTH), 1 / layer.mlp.in_features, np.float32),
      "wo/kernel": np.repeat(np.eye(3, layer.mlp.in_features, dtype=np.float32), [26, 27, 27], axis=0),
    },
  )
  sums = np.stack([np.asarray(layer.mlp(x, deterministic=False))[0, 0, :3] for _ in range(8)])
  assert (sums[:, 1] != sums[:, 2]).any()  # both of 27 columns
  assert len(np.unique(sums[:, 1])) > 1  # and each call draws anew


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["single", "scanned"])
def test_model(scan):
  """In a model, its backward pass too; one group of layers is wider than the other."""
  found = []
  for parts in (1, 2):
    keys = {"base_num_decoder_layers": 4, "base_mlp_dim": 40, "mudd_ffn_round_to": 4, "mudd_ffn_groups": 2}
    config = models.config(
      decoder_block="llama2", mudd=True, mudd_ffn_reallocation=True, mudd_ffn_parts=parts, scan_layers=scan, **keys
    )
    model = models.build(config)
    values = models.randomise(model)
    models.set_parameters(
      model, {k: v / 2 if k.endswith(("kernel", "w1", "w2", "embedding")) else v for k, v in values.items()}
    )
    data = models.batch(config)

    def loss(model, data):
      logits = models.logits(model, data)
      return -jnp.take_along_axis(jax.nn.log_softmax(logits), data["targets"][..., None], -1).mean()

    with jax.set_mesh(model.mesh):
      run = nnx.jit(nnx.value_and_grad(loss)).lower(model, data)
      widths = {int(x) for x in re.findall(r"tensor<\d+x16x(\d+)xf32>", run.as_text())}
      value, grads = run.compile()(model, data)
    found.append((float(value), nnx.pure(grads), widths))
  (a, a_grads, whole), (b, b_grads, half) = found
  assert whole - half == {28, 52} and {14, 26} <= half
  assert abs(a - b) <= 5e-7 * a  # some roundings of a float32 loss; none was seen
  a, b = (np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(g)]) for g in (a_grads, b_grads))
  assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a)  # 4.2e-7 seen
