"""Every decoder block: what each stream changes, gradients, decoding and training.

Streams of the blocks that the float64 oracle restates are tested in tests/test_blocks.py, with how models start.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.utils import maxtext_utils
import numpy as np
import pytest

import maxtext_mudd
from maxtext_mudd import blocks
from maxtext_mudd.blocks.streams import Streams, decouple
from maxtext_mudd.config.errors import ConfigError
from tests import models, steps
from tests.blocks import KEYS, LAYOUTS, OTHERS, SLOW, config_of, packed, single_blocks

STEP = 4e-4  # of finite differences; with larger ones tokens go to other experts
PAIRS = ("qk", "qv", "qr", "kv", "kr", "vr")


@functools.cache
def stock(block):
  """A stock model with random weights, and its configuration."""
  config = config_of(block)
  model = models.build(config)
  models.randomise(model)
  return model, config


def layers_of_each_kind(model, config) -> dict[tuple, tuple[int, nnx.Module]]:
  """By kind, the first layer of that kind, with its number."""
  kinds = {}
  for number, layer in enumerate(single_blocks(model, config), 1):
    traits = ("attention_type", "is_moe_layer", "is_nope_layer", "is_full_attention_layer", "is_shared")
    attention = type(getattr(layer, "attention", None)).__name__
    ratio = getattr(getattr(layer, "self_attention", None), "compress_ratio", None)
    kind = (type(layer).__name__, attention, ratio, *(str(getattr(layer, name, None)) for name in traits))
    kinds.setdefault(kind, (number, layer))
  return kinds


# The numbers of kinds of layers, where they are not 2.
KINDS = {"default": 1, "qwen3_custom_moe": 1, "fused projection": 1, "gpt3, fused projection": 1}
KINDS |= {"gemma4_small": 4, "deepseek4": 3}


def of_earlier_layer(layer, shape: tuple[int, int], rng) -> dict[str, jax.Array]:
  """Random keys and values for a layer that has none of its own."""
  if not getattr(layer, "is_shared", False):
    return {}
  shape = (*shape, layer.num_kv_heads, layer.head_dim)
  return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name in ("shared_key", "shared_value")}


@pytest.mark.parametrize("block", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in OTHERS])
def test_each_stream_of_a_layer_matters(block):
  model, config = stock(block)
  layers = layers_of_each_kind(model, config)
  assert len(layers) == KINDS.get(block, 2)
  data = packed(config)
  tokens = {"decoder_input_tokens": data["inputs"]} if block == "deepseek4" else {}
  rng = np.random.default_rng(0)
  rate = config.mhc_expansion_rate
  shape = (*data["inputs"].shape, *([rate] if rate > 1 else []), config.emb_dim)
  arrays = {stream: jnp.asarray(rng.standard_normal(shape), jnp.float32) for stream in "qkvr"}
  for kind, (block_number, layer) in layers.items():
    decoupled, read = nnx.clone(layer), blocks.streams_read(config, block_number)
    decouple(decoupled, blocks.spec(config), blocks.normed_streams(config, block_number))
    given = of_earlier_layer(layer, data["inputs"].shape, rng)

    def call(layer, x, given=given):
      with jax.set_mesh(maxtext_utils.get_mesh_from_config(config)):
        call = nnx.jit(lambda layer, x: layer(x, *inputs, True, MODEL_MODE_TRAIN, **tokens, **given)[0])
        inputs = data["inputs_segmentation"], data["inputs_position"]
        return np.asarray(call(layer, x))

    x = arrays["r"]
    expected = call(layer, x)
    np.testing.assert_allclose(call(decoupled, Streams(x, x, x, x)), expected, atol=1e-5 * expected.std(), err_msg=kind)
    output = call(decoupled, Streams(**arrays))
    changes = {c: arrays | {c: arrays[c] + 0.5 * x[:, ::-1]} for c in "qkvr"}
    changes |= {pair: arrays | {pair[0]: arrays[pair[1]], pair[1]: arrays[pair[0]]} for pair in PAIRS}
    for name, changed in changes.items():
      change = np.abs(call(decoupled, Streams(**changed)) - output).max()
      assert (change > 0.01 * output.std()) == (not {*name}.isdisjoint(read)), (kind, name)


def test_halves_in_a_row_are_the_layer():
  """Bit for bit, op by op: what a half does not have of the layer adds nothing."""
  model, config = stock("gemma2")
  data = packed(config)
  inputs = data["inputs_segmentation"], data["inputs_position"], True, MODEL_MODE_TRAIN
  x = jnp.asarray(np.random.default_rng(0).standard_normal((*data["inputs"].shape, config.emb_dim)), jnp.float32)
  local, last, *_ = single_blocks(model, config)
  with jax.set_mesh(maxtext_utils.get_mesh_from_config(config)):
    expected = model.decoder.layers_0(x, *inputs)[0]
    between = local(x, *inputs)[0]
    np.testing.assert_array_equal(last(between, *inputs)[0], expected)
    for output in (x, between, last(x, *inputs)[0]):
      assert np.abs(output - expected).max() > 0.1


def test_halves_record_what_the_layer_records():
  """One value for each of MaxText's layers, of its output."""
  found = []
  for mudd in (False, True):
    model = models.build(config_of("gemma2", mudd=mudd, record_internal_nn_metrics=1, remat_policy="none"))
    models.logits(model, packed(model.config))
    sown = nnx.to_flat_state(nnx.pop(model, nnx.Intermediate))
    found.append([float(x.get_value()[0]) for path, x in sorted(sown) if path[-1] == "activation_stdev"])
  assert found[0] == found[1]
  assert len({*found[0]}) == 2


SMOOTH = {  # all layers of the first two are too curved together; of 160 tokens some always go to another expert
  "gemma4": {"base_num_decoder_layers": 8},
  "qwen3_next": {"base_num_decoder_layers": 4},
  "deepseek4": {"num_experts_per_tok": 4, "indexer_topk": 40},
  "qwen3_moe": {"num_experts_per_tok": 4},  # with two, one token is within 1e-5 of the border between experts
}


@pytest.mark.slow
@pytest.mark.parametrize("block", KEYS)
def test_gradient(block):
  """Derivatives along random directions of all parameters of connections are those of finite differences.

  Weights are near their initial values: where they are larger, the model is too curved for the digits of float32.
  Between two points a token may go to another expert, which makes a jump: one direction of three may differ.
  """
  config = config_of(block, mudd=True, **SMOOTH.get(block, {}))
  model = models.build(config)
  graphdef, params, others = nnx.split(model, nnx.Param, ...)
  rng = np.random.default_rng(0)
  for path, parameter in nnx.to_flat_state(params):
    x = np.asarray(parameter.get_value())
    scale = 0.3 * x.std() if path[-1] not in ("w2", "a") else 0.1
    parameter.set_value(jnp.asarray(x + scale * rng.standard_normal(x.shape), jnp.float32))
  data = packed(config)
  weights = rng.standard_normal((*data["inputs"].shape, config.vocab_size)).astype(np.float32) / 100

  @jax.jit
  def objective(params):
    logits = models.logits(nnx.merge(graphdef, params, others, copy=True), data)
    return jnp.vdot(logits, weights, precision="highest")

  gradients, errors = jax.jit(jax.grad(objective))(params), []
  for _ in range(3):
    direction = random_direction(params, rng)
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y), gradients, direction)
    derivative = float(sum(jax.tree.leaves(products)))
    coarse, fine = (difference(objective, params, direction, step) for step in (STEP, STEP / 2))
    expected = (4 * fine - coarse) / 3  # without the error of second order in the step
    errors.append(abs(derivative / expected - 1))
  assert sorted(errors)[1] < 0.01, errors


def random_direction(params: nnx.State, rng) -> nnx.State:
  """Zero for parameters that are not of connections."""
  direction = []
  for path, parameter in nnx.to_flat_state(params):
    x = np.asarray(parameter.get_value())
    moved = ("connection" in path) * (x.std() + 1e-3) * rng.standard_normal(x.shape)
    direction.append((path, parameter.replace(jnp.asarray(moved, jnp.float32))))
  return nnx.from_flat_state(direction)


def difference(function, params: nnx.State, direction: nnx.State, step: float) -> float:
  ahead, back = (function(jax.tree.map(lambda x, d, s=s: x + s * d, params, direction)) for s in (step, -step))
  return float(ahead - back) / (2 * step)


@pytest.mark.slow
# Of stock deepseek4, 41 of 256 tokens differ.
@pytest.mark.parametrize(("block", "layout"), [case for case in LAYOUTS if case[0] != "deepseek4"])
def test_generates_what_teacher_forcing_says(block, layout):
  # Stock MaxText decodes windows and chunks that are shorter than the text as if they were at other places, and one
  # prompt at a time with the block "default".
  wide = {key: 32 for key in ("sliding_window_size", "chunk_attn_window_size") if key in KEYS[block]}
  config = config_of(block, mudd=True, scan_layers=layout == "scanned", max_target_length=24, **wide)
  model = models.build(config)
  models.randomise(model)
  prompts = [[1, 7, 11, 2, 30], [5, 9]][: 1 if block == "default" else 2]
  found = maxtext_mudd.generate(model, config, prompts, 6)
  for row, prompt in zip(found, prompts):
    models.check_greedy(model, row, len(prompt), 6)


CACHED = {"mla_naive_kvcache": False}
ABSORBED = CACHED | {"use_mla_absorbed_mqa": True}


@pytest.mark.parametrize(
  ("keys", "scan"),
  [
    (ABSORBED, True),
    *(pytest.param(*x, marks=pytest.mark.slow) for x in ((ABSORBED, False), (CACHED, False), (CACHED, True))),
  ],
)
def test_generates_from_latents(keys, scan):
  """With widths as DeepSeek has them, for which MaxText cannot cache keys and values."""
  widths = {"head_dim": 16, "v_head_dim": 8, "max_target_length": 24, "scan_layers": scan}
  config = config_of("deepseek", mudd=True, **widths)
  model = models.build(config)
  values = models.randomise(model)
  with pytest.raises(ConfigError, match=r"^mla_naive_kvcache=True: MaxText caches keys and values only if head_dim=16"):
    maxtext_mudd.generate(model, config, [[1]], 6)
  latent_config = config_of("deepseek", mudd=True, **widths, **keys)
  latent = models.build(latent_config)
  models.set_parameters(latent, values)
  # Scores of absorbed queries are other sums in float32; the errors seen are up to 1.3e-4 of logits of about 1.
  batch = models.batch(config)
  np.testing.assert_allclose(models.jitted_logits(latent, batch), models.jitted_logits(model, batch), atol=3e-4)
  prompts = [[1, 7, 11, 2, 30], [5, 9]]
  for row, prompt in zip(maxtext_mudd.generate(latent, latent_config, prompts, 6), prompts):
    models.check_greedy(latent, row, len(prompt), 6)


WITH_MUON = ("deepseek", "deepseek4", "gemma3", "gpt_oss", "qwen3_custom_moe", "qwen3_next")
# With random weights, steps along the gradient of gemma4's 14 layers have to be as small as 1e-6 for the loss to fall,
# with both norms 1e-3. Without norms, Muon's first steps raise the loss of qwen3_next's 8 layers when scanned.
DEEP = ("gemma4", "qwen3_next")
TRAINED = [(block, x, layout) for block, layout in LAYOUTS for x in ("adamw", "muon")[: 2 if block in WITH_MUON else 1]]


@pytest.mark.slow
@pytest.mark.parametrize(("block", "optimizer", "layout"), TRAINED)
def test_trains(block, optimizer, layout):
  """Three of MaxText's train steps on one batch: losses fall, and every parameter of connections is trained."""
  keys = {"mudd": True, "scan_layers": layout == "scanned", "opt_type": optimizer}
  if block in DEEP:
    keys |= {"mudd_pre_norm": True, "mudd_post_norm": True}
  config = config_of(block, **keys, learning_rate=1e-3, steps=20, warmup_steps_fraction=0.05)
  step, state = steps.prepare(config)
  before = connection_values(state)
  losses = []
  for _ in range(3):
    state, found = step(state, models.batch(config))
    losses.append(float(found["scalar"]["learning/loss"]))
  assert np.isfinite(losses).all()
  assert losses[2] < losses[1]
  after = connection_values(state)
  unchanged = [path for path, value in before.items() if np.array_equal(value, after[path])]
  assert before and not unchanged


def connection_values(state) -> dict[str, np.ndarray]:
  flat = nnx.to_flat_state(state["model"].filter(nnx.Param))
  return {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat if "connection" in path}
