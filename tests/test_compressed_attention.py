"""The block of DeepSeek 4: what its long-range keys are made of, and experts that are chosen by tokens."""

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.layers.moe import Tid2EidVar
from maxtext.utils import maxtext_utils
import numpy as np
import pytest

from maxtext_mudd import blocks
from maxtext_mudd.blocks.streams import Streams, decouple
from tests import models
from tests.blocks import config_of


def test_keys_of_several_tokens_read_the_key_stream():
  """The last token sees the first eight by vectors of 4 or 8 tokens alone: its window has four."""
  layers = {"base_num_decoder_layers": 2, "first_num_hash_layers": 0, "compress_ratios": [4, 8]}
  config = config_of("deepseek4", max_target_length=16, **layers)
  model = models.build(config)
  models.randomise(model)
  data = models.batch(config)
  rng = np.random.default_rng(0)
  shape = (*data["inputs"].shape, config.mhc_expansion_rate, config.emb_dim)
  arrays = {stream: jnp.asarray(rng.standard_normal(shape), jnp.float32) for stream in "qkvr"}
  of_early_tokens = {stream: arrays | {stream: x.at[:, :8].multiply(-1)} for stream, x in arrays.items()}
  for block, layer in enumerate(model.decoder.get_layers(), 1):
    decouple(layer, blocks.spec(config), blocks.normed_streams(config, block))

    @nnx.jit
    def of_last_token(layer, streams):
      places = data["inputs_segmentation"], data["inputs_position"]
      return layer(streams, *places, True, MODEL_MODE_TRAIN, decoder_input_tokens=data["inputs"])[0][:, -1]

    with jax.set_mesh(maxtext_utils.get_mesh_from_config(config)):
      output = of_last_token(layer, Streams(**arrays))
      found = {
        stream
        for stream, changed in of_early_tokens.items()
        if not np.array_equal(of_last_token(layer, Streams(**changed)), output)
      }
    assert found == {"k"}


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["single", "scanned"])
def test_tokens_choose_experts(scan):
  layers = {"base_num_decoder_layers": 4 if scan else 2, "compress_ratios": [0, 4, 128, 4]}
  config = config_of("deepseek4", mudd=True, scan_layers=scan, max_target_length=16, **layers)
  model = models.build(config)
  models.randomise(model)
  data = models.batch(config)
  token, rng = data["inputs"][0, 7], np.random.default_rng(0)
  tables = jax.tree.map(lambda x: rng.integers(0, config.num_experts, x.shape), nnx.state(model, Tid2EidVar))
  assert len(jax.tree.leaves(tables)) == 2

  def logits(add):
    moved = jax.tree.map(lambda x: (x + add * (np.arange(len(x)) == token)[:, None]) % config.num_experts, tables)
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), moved))
    return np.asarray(models.jitted_logits(model, data))

  changed, there = (logits(0) != logits(1)).any(-1), data["inputs"] == token
  assert changed[there].all()
  assert not changed[there.cumsum(-1) == 0].any()
