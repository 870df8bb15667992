"""Models that take images: X_0 is the embedding in which features of the image have replaced those of its tokens."""

from flax import nnx
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.configs import pyconfig
import numpy as np
import pytest

from maxtext_mudd.checkpoints import layout as checkpoint_layout
from maxtext_mudd.config.errors import ConfigError
from tests import models, multimodal, steps
from tests.multimodal import FIRST, MODELS
from tests.scanning import random_values

FAST = "gemma4, tied values"
LAYOUTS = [(block, layout) for block in MODELS for layout in ("single", "scanned")]
FAST_BLOCKS = [block if block == FAST else pytest.param(block, marks=pytest.mark.slow) for block in MODELS]
FAST_LAYOUTS = [x if x == (FAST, "single") else pytest.param(*x, marks=pytest.mark.slow) for x in LAYOUTS]


def config_of(block, layout, **keys):
  return multimodal.multimodal(block, scan_layers=layout == "scanned", **keys)


def jitted(model, data):
  return np.asarray(nnx.jit(multimodal.logits)(model, data))


@pytest.mark.parametrize(("block", "layout"), FAST_LAYOUTS)
def test_starts_as_the_stock_model(block, layout):
  """Op by op where layers are not scanned. In a scan, which is compiled, the two models may round otherwise."""
  keys = {"remat_policy": "none"}
  stock = config_of(block, layout, **keys)
  data = multimodal.batch(block, stock)
  expected = multimodal.logits(models.build(stock), data)
  found = multimodal.logits(models.build(config_of(block, layout, mudd=True, **keys)), data)
  assert np.std(expected) > 0.01
  is_exact = layout == "single" and block != "qwen3_5"  # has a projection whose columns read different streams
  np.testing.assert_allclose(found, expected, rtol=0, atol=0 if is_exact else 5e-5 * np.std(expected))


@pytest.mark.parametrize("block", FAST_BLOCKS)
def test_the_image_is_in_the_first_source(block):
  """A last aggregate that reads X_0 alone hands on the embedding with the features of the image."""
  config = config_of(block, "single", mudd=True)
  model = models.build(config)
  values = models.randomise(model)
  (last,) = (path.removesuffix("/a") for path in values if path.endswith("final_depth_aggregate/a"))
  values[f"{last}/w2"] *= 0
  values[f"{last}/a"] = np.eye(values[f"{last}/a"].shape[-1], dtype=np.float32)[:1]
  models.set_parameters(model, values)
  data = multimodal.batch(block, config)
  number = MODELS[block][2]
  at_image = slice(FIRST, FIRST + number)

  def expected(model, data):
    embedding = model.token_embedder(data["inputs"], model_mode=MODEL_MODE_TRAIN)
    features, _ = model.vision_encoder(input_images=data["images"], deterministic=True)
    features = features.reshape(*embedding[:, at_image].shape)
    x = embedding.at[:, at_image].set(features)
    return model.decoder.apply_output_head(model.token_embedder, x, True, MODEL_MODE_TRAIN)

  found = jitted(model, data)
  np.testing.assert_allclose(found, nnx.jit(expected)(model, data), rtol=0, atol=1e-5 * found.std())
  other = jitted(model, data | {"images": data["images"][:, :, ::-1]})
  assert np.abs(other - found)[:, at_image].max() > 0.01 * found.std()


@pytest.mark.slow
@pytest.mark.parametrize("block", MODELS)
def test_scanned_layers_are_the_single_ones(block):
  single, scanned = (config_of(block, layout, mudd=True) for layout in ("single", "scanned"))
  model, stacked = models.build(single), models.build(scanned)
  values = random_values(single)
  models.set_parameters(model, values)
  models.set_parameters(stacked, checkpoint_layout.stack(values, scanned))
  data = multimodal.batch(block, single)
  expected = jitted(model, data)
  np.testing.assert_allclose(jitted(stacked, data), expected, rtol=0, atol=1e-4 * expected.std())


@pytest.mark.slow
@pytest.mark.parametrize(("block", "layout"), LAYOUTS)
def test_trains(block, layout):
  """Train steps on a batch with images: losses fall, and every parameter of connections is trained."""
  keys = {"learning_rate": 1e-3, "steps": 20, "warmup_steps_fraction": 0.05}
  config = config_of(block, layout, mudd=True, **keys)
  step, state = steps.prepare(config)
  data = multimodal.batch(block, config)
  before, losses = connection_values(state), []
  for _ in range(3):
    state, found = step(state, dict(data))
    losses.append(float(found["scalar"]["learning/loss"]))
  assert np.isfinite(losses).all()
  assert losses[2] < losses[1]
  after = connection_values(state)
  assert before and not [path for path, value in before.items() if np.array_equal(value, after[path])]


def connection_values(state) -> dict[str, np.ndarray]:
  flat = nnx.to_flat_state(state["model"].filter(nnx.Param))
  return {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat if "connection" in path}


WITH_IMAGES = (
  "gemma3-4b",
  "gemma3-12b",
  "gemma3-27b",
  "gemma4-26b",
  "gemma4-31b",
  "llama4-17b-16e",
  "llama4-17b-128e",
  "qwen3.5-35b-a3b",
  "qwen3.5-397b-a17b",
)
BETWEEN_LAYERS = ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-30b-a3b", "qwen3-omni-30b-a3b", "weaver-mini", "weaver-max")


def by_name(name, **keys):
  keys = {"run_name": "test", "mudd": True, "use_multimodal": True, "log_config": False, **keys}
  return pyconfig.initialize(["", models.BASE_YML], model_name=name, enable_checkpointing=False, **keys)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_models_by_name(name):
  assert by_name(name).use_multimodal


@pytest.mark.parametrize("name", BETWEEN_LAYERS)
def test_features_between_layers_are_refused(name):
  with pytest.raises(
    ConfigError, match=r"deepstack_visual_indexes_for_vit=\[\d+, .*\] does not work with mudd=True and "
  ):
    by_name(name, scan_layers=False)
  assert by_name(name, scan_layers=False, use_multimodal=False, override_model_config=True).mudd


def test_extra_embeddings_are_refused():
  sentence = (
    "mudd_extra_embeddings=1 does not work with mudd=True and use_multimodal=True: the further tables have rows for "
    "tokens and none for images; set it to 0."
  )
  with pytest.raises(ConfigError) as error:
    by_name("gemma3-4b", mudd_extra_embeddings=1)
  assert str(error.value) == sentence
