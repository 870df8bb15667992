"""muddformer.py against models of the authors' code (tests/data/README.md), and the package against muddformer.py."""

import dataclasses
import functools
import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from maxtext_mudd import muddformer
from maxtext_mudd.complexity import sizes
from maxtext_mudd.model import counts
from maxtext_mudd.muddformer import Config
from tests import models, runs
from tests.parameters import from_jax, from_pytorch, to_muddformer

GOLDEN = Config(layers=6, width=64, heads=4, ffn=256, vocabulary=128)
TOLERANCE = 2e-4  # of logits with a standard deviation of 1 to 2, and of intermediates; errors seen: up to 1.1e-4
GRADIENT_TOLERANCE = 1e-4  # of the largest entry of each gradient; errors seen: up to 1.6e-5

forward = jax.jit(muddformer.forward, static_argnums=2)


def close(found, expected, what: str) -> None:
  np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0, err_msg=what)


def abstract_parameters(config: Config) -> dict:
  return jax.eval_shape(functools.partial(muddformer.init, config=config), jax.random.key(0))


def assert_gradients(found, expected) -> None:
  assert set(found) == set(expected)
  for path, value in found.items():
    largest = np.abs(expected[path]).max()
    assert largest > 0, path
    error = np.abs(value - expected[path]).max() / largest
    assert error <= GRADIENT_TOLERANCE, (path, error)


@pytest.fixture(scope="module")
def pytorch():
  folder = models.DATA / "muddformer_tiny"
  params = to_muddformer(from_pytorch(load_file(folder / "model.safetensors")))
  return params, dataclasses.replace(GOLDEN, qk_norm=True), load_file(folder / "golden.safetensors")


def test_released_pytorch(pytorch):
  params, config, golden = pytorch
  logits, out = forward(params, golden["input_ids"], config)
  close(logits, golden["logits"], "logits")
  for i in range(config.layers + 1):
    close(out[f"X_{i}"], golden[f"hidden.{i}"], f"X_{i}")
  for i, da in enumerate(params["aggregates"], 1):
    weights = out[f"weights_{i}"].transpose(2, 0, 1, 3)
    close(weights, golden[f"dw.{i - 1}"], f"weights_{i}")
    close(weights - da["a"][:, None, None], golden[f"dw_dyn.{i - 1}"], f"dynamic part of weights_{i}")
    close(np.stack(out[f"streams_{i}"]), golden[f"streams.{i - 1}"], f"streams_{i}")


def test_forward_pass_in_readme(pytorch):
  """It runs as printed, with the names that muddformer.py defines."""
  params, config, golden = pytorch
  code = re.search(r"```python\n(.*?)```", (runs.ROOT / "README.md").read_text(), re.S)[1]
  assert len(code.splitlines()) == 10
  names = dict(vars(muddformer))
  exec(code, names)
  logits = jax.jit(names["forward"], static_argnums=2)(params, golden["input_ids"], config)
  close(logits, golden["logits"], "logits")


def test_the_wrong_gelu_is_noticed(pytorch):
  params, config, golden = pytorch
  logits, _ = forward(params, golden["input_ids"], dataclasses.replace(config, gelu_tanh=True))
  assert np.abs(logits - golden["logits"]).max() > TOLERANCE


def documents(golden):
  """(rows, columns, is_token): indices that unpack rows to one document each, as muddformer.py takes them, and a mask.

  Documents of a packed row do not attend to each other. Unpacked ones end in padding, which causal attention ignores.
  """
  segments = golden["inputs_segmentation"]
  places = [(row, np.flatnonzero(segments[row] == s)) for row in range(len(segments)) for s in set(segments[row]) - {0}]
  rows = np.array([[row] for row, _ in places])
  columns, is_token = np.zeros((2, len(places), segments.shape[1]), int)
  for n, (_, column) in enumerate(places):
    columns[n, : len(column)], is_token[n, : len(column)] = column, 1
  return rows, columns, is_token.astype(bool)


@pytest.mark.parametrize(
  ("name", "norms"), [("muddjax_plain", {}), ("muddjax_prepost", {"pre_norm": True, "post_norm": "r"})]
)
def test_released_jax(name, norms):
  """Gradients are of the authors' own parameters. `to_muddformer` multiplies W1 by the scale before it."""
  golden = load_file(models.DATA / name / "golden.safetensors")
  weights = load_file(models.DATA / name / "params.safetensors")
  config = dataclasses.replace(GOLDEN, gelu_tanh=True, **norms)
  rows, columns, is_token = documents(golden)
  tokens, targets = golden["inputs"][rows, columns], golden["targets"][rows, columns]

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss_and_gradients(weights):
    params = to_muddformer(from_jax(weights, query_scale=(config.width // config.heads) ** -0.5))
    logits, out = muddformer.forward(params, tokens, config)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.mean(picked, where=is_token), (logits, out)

  (loss, (logits, out)), gradients = jax.jit(loss_and_gradients)(weights)
  expected = {"logits": golden["logits"]}
  expected |= {f"X_{i}": golden[f"hidden.{i}"] for i in range(1, config.layers + 1)}
  expected |= {f"weights_{i + 1}": golden[f"dw.{i}"] for i in range(config.layers)}
  for what, value in expected.items():
    close((out | {"logits": logits})[what][is_token], value[rows, columns][is_token], what)
  assert abs(loss - golden["loss"][0]) <= 1e-5  # of about 5, in float32; the errors seen are up to 1.4e-6
  assert_gradients(gradients, {key.removeprefix("grad/"): g for key, g in golden.items() if key.startswith("grad/")})


VARIANTS = {
  "MUDD": ({}, {}),
  "released PyTorch": (
    {"decoder_block": "qwen3", "use_qk_norm": True, "base_mlp_dim": 256, "mudd_ffn_reallocation": True},
    {"qk_norm": True, "ffn": 256, "reallocate_ffn": True},
  ),
  "pre- and post-norm, Eq. 10": (
    {"mudd_pre_norm": True, "mudd_post_norm": True, "mudd_post_norm_streams": "qkvr"},
    {"pre_norm": True, "post_norm": "qkvr"},
  ),
  "pre- and post-norm, released JAX": (
    {
      "mudd_pre_norm": True,
      "mudd_post_norm": True,
      "mudd_weight_norm_scale": True,
      "mudd_first_block_norms": "separate",
      "mudd_activation": "gelu_tanh",
    },
    {"pre_norm": True, "post_norm": "r", "gelu_tanh": True},
  ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_package(variant):
  """Shapes, logits and the gradient of every parameter, with random values."""
  keys, options = VARIANTS[variant]
  config = Config(
    **{"layers": 3, "width": 32, "heads": 2, "ffn": 64, "vocabulary": 64, "reallocate_ffn": False} | options
  )
  cfg = models.config(mudd=True, **keys)
  model = models.build(cfg)
  values = models.randomise(model)
  shapes = jax.tree.map(jnp.shape, to_muddformer(values))
  assert shapes == jax.tree.map(jnp.shape, abstract_parameters(config))

  data = models.batch(cfg)
  cotangent = np.random.default_rng(1).standard_normal((*data["inputs"].shape, config.vocabulary))
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def of_package(params):
    logits = models.logits(nnx.merge(graph, params, rest, copy=True), data)
    return (logits * cotangent).mean(), logits

  def of_muddformer(values):
    logits, _ = muddformer.forward(to_muddformer(values), data["inputs"], config)
    return (logits * cotangent).mean(), logits

  (_, logits), gradients = jax.jit(jax.value_and_grad(of_package, has_aux=True))(params)
  (_, expected), expected_gradients = jax.jit(jax.value_and_grad(of_muddformer, has_aux=True))(values)
  close(logits, expected, "logits")
  found = {"/".join(map(str, path)): value.get_value() for path, value in gradients.flat_state()}
  assert_gradients(found, expected_gradients)


@pytest.mark.parametrize("norms", [{}, {"pre_norm": True, "post_norm": "qkvr"}])
def test_starts_as_a_plain_transformer(norms):
  config = Config(layers=2, width=64, heads=4, ffn=256, vocabulary=512, **norms)
  params = muddformer.init(jax.random.key(0), config)
  tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, config.vocabulary)
  _, out = forward(params, tokens, config)
  for i in range(1, config.layers + 1):
    for stream in out[f"streams_{i}"]:
      np.testing.assert_array_equal(stream, out[f"X_{i}"])


def test_deviations():
  config = Config(layers=1, width=128, heads=4, ffn=256, vocabulary=512, reallocate_ffn=False)
  params = muddformer.init(jax.random.key(0), config)
  block, (da,) = params["blocks"][0], params["aggregates"]
  fans = {"query": 256, "key": 256, "value": 256, "out": 256, "gate": 384, "up": 384, "down": 384}
  expected = {name: (block[name], math.sqrt(2 / fan)) for name, fan in fans.items()}
  expected |= {name: (params[name], math.sqrt(2 / 640)) for name in ("embedding", "unembedding")}
  expected["w1"] = (da["w1"], math.sqrt(1 / 128))
  for name, (value, deviation) in expected.items():
    assert np.std(value) == pytest.approx(deviation, rel=0.04), name  # of numbers drawn; 0.5% seen


# Block 1 has three attention norms in muddformer.py and one in these models. With pre-norm, these scale before each W1.
@pytest.mark.parametrize(
  ("config", "name", "difference"),
  [
    (Config(), "mudd_405m", 2 * 1024),
    (Config(layers=32, width=2560, heads=32, ffn=6912, qk_norm=True), "mudd_2p8b", 2 * 2560),
    (
      Config(layers=34, width=1280, heads=20, ffn=3584, pre_norm=True, post_norm="r"),
      "mudd_deep_797m",
      2 * 1280 - 34 * 1280,
    ),
  ],
)
def test_parameters_at_the_papers_sizes(config, name, difference):
  params = abstract_parameters(config)
  expected = counts.parameters(sizes.read(["", str(runs.ROOT / "yaml" / f"{name}.yml")]))
  assert sum(x.size for x in jax.tree.leaves(params)) == expected + difference
