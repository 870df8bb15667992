"""Attention Residuals in models: how they start, what they count, which settings they refuse. Their maths:
test_golden_connections.py; scanned layers: test_scan.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_mudd.model import counts
from tests import golden_connections, models, steps
from tests.blocks import BLOCKS, config_of, packed

ATTNRES = {"mudd": True, "depth_connection": "attnres"}
BOTH = {"mudd_attnres_heads": 4, "mudd_attnres_value_route": True}


@pytest.mark.parametrize("block", [x if x == "llama2" else pytest.param(x, marks=pytest.mark.slow) for x in BLOCKS])
@pytest.mark.parametrize("keys", [{}, {"mudd_attnres_block": 2, **BOTH}])
def test_starts_as_the_plain_model(block, keys):
  """With equal weights a sublayer reads the plain residual stream, divided by the number of sources."""
  if block == "pythia":
    with pytest.raises(ValueError, match="mudd_decoder_layer=pythia does not work with depth_connection=attnres"):
      config_of(block, **ATTNRES)
    return
  stock = config_of(block)
  data = packed(stock)
  plain = models.jitted_logits(models.build(stock), data)
  found = models.jitted_logits(models.build(config_of(block, **ATTNRES, **keys)), data)
  # The epsilon of norms weighs up to 49 times as much with 7 sources: 1.2e-5 was seen.
  np.testing.assert_allclose(found, plain, atol=1e-4 * np.abs(plain).max(), rtol=0)


B, T, D, BLOCKS_OF_MODEL = 2, 5, 16, 2
EPSILON = 1e-6


def sublayer(w, q, v, xp):
  """Stands in for a sublayer, so that what reads q and what reads v differ."""
  return xp.tanh(q @ w) * (1 + v @ w.T)


def restated(arguments, xp, size: int, heads: int, has_route: bool):
  """The hidden state, by the formulas: sources, one softmax for each head, one query for each stream."""
  embedding, query, key_norm, w = arguments
  numbers = iter(range(len(query)))

  def aggregate(sources):
    s = next(numbers)
    parts = []
    for channels in np.split(np.arange(D), heads):
      logits = []
      for x in sources:
        normed = x / xp.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * key_norm[s]
        logits.append((normed * query[s])[..., channels].sum(-1))
      p = xp.exp(xp.stack(logits) - xp.max(xp.stack(logits), axis=0))
      p = p / p.sum(0)
      parts.append(sum(p[j][..., None] * x[..., channels] for j, x in enumerate(sources)))
    return xp.concatenate(parts, axis=-1)

  finished, newest = [embedding], None
  for s in range(2 * BLOCKS_OF_MODEL):
    sources = [*finished, newest] if newest is not None else finished
    q = aggregate(sources)
    v = aggregate(sources) if has_route and s % 2 == 0 else q
    output = sublayer(w[s], q, v, xp)
    newest = output if newest is None else newest + output
    if (s + 1) % size == 0:
      finished, newest = [*finished, newest], None
  return aggregate([*finished, newest] if newest is not None else finished)


def by_family(arguments, size: int, heads: int, has_route: bool):
  """The same by the family."""
  embedding, query, key_norm, w = arguments
  keys = {"mudd_attnres_block": size, "mudd_attnres_heads": heads, "mudd_attnres_value_route": has_route}
  keys |= {"depth_connection": "attnres", "normalization_layer_epsilon": EPSILON}
  _, blocks = golden_connections.build("float32", BLOCKS_OF_MODEL, D, **keys)
  golden_connections.set_parameters(blocks[0].depth_queries, {"query": query, "key_norm": key_norm})
  carry = blocks[0].start(embedding)
  for number, connection in enumerate(blocks):

    def block(_, carry, __, number=number, connection=connection):
      x = connection.read(carry)
      q, v = (x.q, x.v) if has_route else (x.read, x.read)
      x = x + sublayer(w[2 * number], q, v, jnp)
      x = x + sublayer(w[2 * number + 1], x.read, x.read, jnp)
      return connection.write(x), None, None

    carry = connection.through(block, None, carry, None)[0]
  return blocks[-1].finish(carry)[0]


@pytest.mark.parametrize(
  ("size", "heads", "has_route"), [(1, 1, False), (1, 4, False), (1, 1, True), (3, 2, True), (4, 16, True)]
)
def test_heads_and_value_route(size, heads, has_route):
  """Values by NumPy in float64, gradients by JAX of the same formulas."""
  rng = np.random.default_rng(0)
  queries = 2 * BLOCKS_OF_MODEL + 1 + BLOCKS_OF_MODEL * has_route
  shapes = (B, T, D), (queries, D), (queries, D), (2 * BLOCKS_OF_MODEL, D, D)
  scales = 1, 0.5, 1, D**-0.5
  arguments = [(k * rng.standard_normal(shape)).astype(np.float32) for k, shape in zip(scales, shapes)]
  form = {"size": size, "heads": heads, "has_route": has_route}
  expected = restated([x.astype(np.float64) for x in arguments], np, **form)
  with jax.default_matmul_precision("highest"):
    family, formulas = functools.partial(by_family, **form), functools.partial(restated, xp=jnp, **form)
    arguments = [jnp.asarray(x) for x in arguments]
    np.testing.assert_allclose(jax.jit(family)(arguments), expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    of_family, of_formulas = (
      jax.jit(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x)))))(arguments) for f in (family, formulas)
    )
  for found, right in zip(of_family, of_formulas):
    np.testing.assert_allclose(found, right, rtol=0, atol=3e-6 * np.abs(right).max())


@pytest.mark.parametrize("keys", [{}, {"mudd_attnres_block": 4}, {"mudd_attnres_block": 3, "scan_layers": True}, BOTH])
def test_parameters_are_counted(keys):
  cfg = models.config(**ATTNRES, **keys)
  connected, plain = (
    sum(x.get_value().size for x in models.parameters(models.build(c)).values())
    for c in (cfg, models.config(scan_layers=cfg.scan_layers))
  )
  assert counts.connections_cost(cfg).parameters == connected - plain


@pytest.mark.parametrize(
  ("size", "mixed", "kept"),
  [
    # gradients of 7 sources but one; outputs of three attentions; 7 × 7 logits and as many gradients in arrays of 32
    (1, 1 + 2 + 3 + 4 + 5 + 6 + 7, 6 + 3 + 4),
    (2, 1 + 2 + 2 + 3 + 3 + 4 + 4, 3 + 2),
    (3, 1 + 2 + 2 + 2 + 3 + 3 + 3, 2 + 1 + 2),  # a block of 3 ends after an attention
    (6, 1 + 2 + 2 + 2 + 2 + 2 + 2, 1 + 1),
  ],
)
def test_counts(size, mixed, kept):
  """By hand: three blocks of width 32, so six sublayers and the final aggregate."""
  cost = counts.connections_cost(models.config(**ATTNRES, mudd_attnres_block=size))
  assert cost.parameters == 2 * 7 * 32
  assert cost.flops == 2 * 7 * 7 * 32 + 2 * mixed * 32
  assert cost.activations == kept


@pytest.mark.parametrize(
  ("keys", "sentence"),
  [
    ({"mudd_attnres_block": 0}, "mudd_attnres_block=0 is not valid: input should be greater than or equal to 1."),
    (
      {"mudd_attnres_block": 7},
      "mudd_attnres_block=7 is more than the 6 sublayers of 3 Transformer blocks; use at most 6.",
    ),
    (
      {"mudd_attnres_heads": 5},
      "mudd_attnres_heads=5 does not divide emb_dim=32; use a divisor of it.",
    ),
    (
      {"mudd_attnres_heads": 2, "mudd_kernel": "pallas_interpret"},
      "mudd_attnres_heads=2 does not work with mudd_kernel=pallas_interpret: the fused kernels mix with one head; use "
      "mudd_kernel=auto or xla.",
    ),
    (
      {"depth_connection": "dense", "mudd_attnres_value_route": True},
      "mudd_attnres_value_route=True does nothing with depth_connection=dense; leave it at False, or set "
      "depth_connection=attnres.",
    ),
    (
      {"mudd_ways": 1},
      "mudd_ways=1 does nothing with depth_connection=attnres; leave it at 4, or set depth_connection=dense.",
    ),
    (
      {"mudd_expansion_rate": 2},
      "mudd_expansion_rate=2 does nothing with depth_connection=attnres; leave it at 4, or set "
      "depth_connection=hyper_connections or mhc.",
    ),
    (
      {"depth_connection": "dense", "mudd_attnres_block": 2},
      "mudd_attnres_block=2 does nothing with depth_connection=dense; leave it at 1, or set depth_connection=attnres.",
    ),
    (
      {"enable_dropout": True, "dropout_rate": 0.1},
      "dropout_rate=0.1 does not work with depth_connection=attnres: MaxText drops parts of one residual stream, which "
      "this family does not have; set dropout_rate=0.",
    ),
  ],
)
def test_settings_that_do_not_work(keys, sentence):
  with pytest.raises(ValueError) as error:
    models.config(**(ATTNRES | keys))
  assert str(error.value) == sentence


def test_counts_of_a_value_route():
  """By hand: three blocks of width 32, so nine queries and the final one; each attention has two norms more."""
  cost = counts.connections_cost(models.config(**ATTNRES, **BOTH))
  assert cost.parameters == 2 * 10 * 32 + 3 * 2 * 32
  assert cost.flops == 2 * 10 * 7 * 32 + 2 * (2 * 1 + 2 + 2 * 3 + 4 + 2 * 5 + 6 + 7) * 32
  assert cost.activations == 6 + 3 + 1 + 18  # 7 × 10 × 4 logits and as many gradients in arrays of 32


def test_metrics():
  """With equal weights all but one of N goes to older sources."""
  step, state = steps.prepare(models.config(**ATTNRES, record_internal_nn_metrics=1))
  steps.set_zero(state, "depth_queries/query")
  scalars = step(state, models.batch(models.config()))[1]["scalar"]
  found = {key: float(x) for key, x in scalars.items() if key.startswith("mudd/older_weight")}
  assert found == pytest.approx(
    {f"mudd/older_weight/attention/da_{i:03d}": 1 - 1 / (2 * i + 1) for i in range(3)}
    | {f"mudd/older_weight/ffn/da_{i:03d}": 1 - 1 / (2 * i + 2) for i in range(3)}
    | {"mudd/older_weight/x/da_003": 1 - 1 / 7},
    abs=3e-7,  # one rounding of float32, 4e-8, was seen
  )
