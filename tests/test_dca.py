"""DeepCrossAttention in models: how it starts, what it reads and counts, which settings it refuses. Its maths:
test_golden_connections.py; scanned layers: test_scan.py."""

import dataclasses

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_mudd.connections.dca import keys as dca_keys
from maxtext_mudd.model import counts
from tests import golden_connections, models, steps
from tests.blocks import BLOCKS, config_of, packed

DCA = {"mudd": True, "depth_connection": "dca"}
FORMS = {
  "v1": {"mudd_dca_weights": "v1"},
  "v2": {"mudd_dca_weights": "v2"},
  "v3": {},
  "sum of the middle": {"mudd_dca_sources": "middle_sum", "mudd_dca_k": 1},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [x if x == "llama2" else pytest.param(x, marks=pytest.mark.slow) for x in BLOCKS])
def test_starts_as_the_plain_model(block, form):
  """With weights of one every stream is the sum of what all blocks added to the embedding."""
  if block == "pythia":
    with pytest.raises(ValueError, match="mudd_decoder_layer=pythia does not work with depth_connection=dca"):
      config_of(block, **DCA)
    return
  stock = config_of(block)
  data = packed(stock)
  plain = models.jitted_logits(models.build(stock), data)
  found = models.jitted_logits(models.build(config_of(block, **DCA, **FORMS[form])), data)
  np.testing.assert_allclose(found, plain, atol=2e-6 * np.abs(plain).max(), rtol=0)


def test_queries_can_learn_from_zero():
  """The derivative of relu at zero is zero in most libraries; every query would keep its initial value."""
  cfg = models.config(**DCA, warmup_steps_fraction=0.0)
  step, state = steps.prepare(cfg)
  steps.set_zero(state, "depth_queries/w")
  state, _ = step(state, models.batch(cfg))
  flat = {"/".join(map(str, path)): x for path, x in nnx.to_flat_state(state["model"].filter(nnx.Param))}
  [queries] = [x.get_value() for path, x in flat.items() if path.endswith("depth_queries/w")]
  assert queries.shape == (10, cfg.emb_dim)
  assert (np.abs(queries).max(axis=1) > 0).all()


@pytest.mark.parametrize(("k", "version"), [(1, "v3"), (2, "v3"), (1, "v2"), (2, "v1")])
def test_sum_of_middle_sources(k, version):
  """A block reads the embedding, the last k outputs and the sum of those between, each with weights of its own."""
  blocks_of_model, width = 5, 16
  keys = {"mudd_dca_sources": "middle_sum", "mudd_dca_k": k, "mudd_dca_weights": version}
  keys |= {"depth_connection": "dca"}
  _, blocks = golden_connections.build("float32", blocks_of_model, width, **keys)
  rng = np.random.default_rng(0)
  queries = blocks[0].depth_queries
  w, scale = rng.standard_normal((3 * blocks_of_model + 1, width)), rng.uniform(0.5, 2, (blocks_of_model + 1, width))
  if version == "v3":
    queries.w[...], queries.key_norm[...] = jnp.asarray(w, jnp.float32), jnp.asarray(scale, jnp.float32)
  else:
    w = 0 * w
  outputs = rng.standard_normal((blocks_of_model + 1, 2, 3, width))
  carry = blocks[0].start(jnp.asarray(outputs[0], jnp.float32))
  for i, connection in enumerate(blocks):
    module = connection.depth_aggregate
    b = rng.standard_normal(module.b[...].shape)
    module.b[...] = jnp.asarray(b, jnp.float32)
    x = connection.read(dataclasses.replace(carry, newest=jnp.asarray(outputs[i], jnp.float32)))
    sources = list(outputs[: i + 1])
    if i > k:
      sources = [sources[0], sum(sources[1 : i + 1 - k]), *sources[i + 1 - k :]]
    assert b.shape == (3, 1 if version == "v1" else width, len(sources))
    normed = [y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * scale[i] for y in sources]
    for o, stream in enumerate((x.q, x.k, x.v)):
      dynamic = [np.maximum(y @ w[3 * i + o], 0)[..., None] for y in normed]
      expected = sum((b[o, :, j] + dynamic[j]) * y for j, y in enumerate(sources))
      np.testing.assert_allclose(stream, expected, atol=2e-6 * np.abs(expected).max())
    after = x + 0 * x.q + 0 * x.q  # attention and FFN
    carry = connection.write(after)


def test_numbers_of_sources():
  cfg = models.config(**DCA, base_num_decoder_layers=6, mudd_dca_sources="first_and_last", mudd_dca_k=2)
  assert [dca_keys.sources(cfg, i) for i in (0, 3, 4, 6)] == [(0,), (0, 1, 2, 3), (0, 1, 3, 4), (0, 1, 5, 6)]
  cfg = models.config(**DCA, base_num_decoder_layers=6, mudd_dca_sources="middle_sum", mudd_dca_k=2)
  assert [dca_keys.sources(cfg, i) for i in (0, 2, 3, 6)] == [(0,), (0, 1, 2), (0, 1, 2, 3), (0, 4, 5, 6)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", ["llama2", "gpt3"])
def test_parameters_are_counted(form, block):
  with_dca, plain = (
    sum(x.get_value().size for x in models.parameters(models.build(cfg)).values())
    for cfg in (config_of(block, **DCA, **FORMS[form]), config_of(block))
  )
  assert counts.connections_cost(config_of(block, **DCA, **FORMS[form])).parameters == with_dca - plain


def test_counts():
  """By hand: two blocks of width 32. Three streams of one and of two sources, one stream of three; seven queries."""
  keys = {**DCA, "base_num_decoder_layers": 2}
  mixed = 3 * 1 + 3 * 2 + 3
  cost = counts.connections_cost(models.config(**keys))
  assert cost.parameters == mixed * 32 + 2 * 2 * 32 + (7 + 3) * 32
  assert cost.flops == 2 * 7 * 3 * 32 + 3 * mixed * 32
  # Gradients of three sources but one, streams q, k and v for one; 3 × 7 logits and gradients in arrays of 32.
  assert cost.activations == 3 - 1 + 2 + 2
  cost = counts.connections_cost(models.config(**keys, mudd_dca_weights="v1"))
  assert (cost.parameters, cost.flops) == (mixed + 2 * 2 * 32, 2 * mixed * 32)
  cost = counts.connections_cost(models.config(**DCA, mudd_dca_sources="middle_sum", mudd_dca_k=1))
  mixed = 3 * (1 + 2 + 3) + 3  # the hidden state reads the embedding, G_1 + G_2 and G_3
  assert cost.parameters == mixed * 32 + 3 * 2 * 32 + (10 + 4) * 32
  assert cost.flops == 2 * 10 * (4 + 4) * 32 + 3 * mixed * 32
  assert cost.activations == 3 - 1 + 2 + 4 + 4  # and 5 × 10 logits and gradients


@pytest.mark.parametrize(
  ("keys", "sentence"),
  [
    (
      {"mudd_dca_k": 1},
      "mudd_dca_k=1 does nothing with mudd_dca_sources=all; leave it at 2, or set mudd_dca_sources=middle_sum or "
      "first_and_last.",
    ),
    (
      {"mudd_dca_sources": "middle_sum", "mudd_dca_k": 0},
      "mudd_dca_k=0 is not valid: input should be greater than or equal to 1.",
    ),
    (
      {"mudd_dca_sources": "first_and_last", "mudd_dca_k": 4, "base_num_decoder_layers": 7},
      "mudd_dca_k=4 with mudd_dca_sources=first_and_last reads all 8 sources of 7 blocks; use at most 3, or "
      "mudd_dca_sources=all.",
    ),
    (
      {"mudd_dca_sources": "middle_sum"},
      "mudd_dca_k=2 with mudd_dca_sources=middle_sum reads all 4 sources of 3 blocks; use at most 1, or "
      "mudd_dca_sources=all.",
    ),
    (
      {"mudd_dca_sources": "middle_sum", "base_num_decoder_layers": 2},
      "mudd_dca_k=2 with mudd_dca_sources=middle_sum reads all 3 sources of 2 blocks; use mudd_dca_sources=all.",
    ),
    (
      {"mudd_dynamic": False},
      "mudd_dynamic=False does nothing with depth_connection=dca; leave it at True, or set depth_connection=dense or "
      "hyper_connections.",
    ),
    (
      {"depth_connection": "dense", "mudd_dca_weights": "v1"},
      "mudd_dca_weights=v1 does nothing with depth_connection=dense; leave it at v3, or set depth_connection=dca.",
    ),
  ],
)
def test_settings_that_do_not_work(keys, sentence):
  with pytest.raises(ValueError) as error:
    models.config(**(DCA | keys))
  assert str(error.value) == sentence
