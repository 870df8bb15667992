"""What `BLOCKS` says of each decoder block, against the layers that MaxText builds; nothing is compiled."""

import functools
import math
import operator

from flax import nnx
import jax
from maxtext.configs import pyconfig
from maxtext.layers.attention_compressed import CompressedAttention
from maxtext.layers.attentions import Attention
from maxtext.layers.linears import DenseGeneral
from maxtext.utils import maxtext_utils
import pytest

from maxtext_mudd import blocks, connections
from maxtext_mudd.blocks.classes import change_class
from maxtext_mudd.checkpoints.hugging_face import names
from maxtext_mudd.model import counts
from tests import models
from tests.blocks import OTHERS, single_blocks

KEYS = OTHERS | {
  "mixtral": {"num_experts": 4, "num_experts_per_tok": 2, "base_moe_mlp_dim": 64},
  "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "base_moe_mlp_dim": 64},
  "gpt3": {"mlp_activations": ["gelu"], "trainable_position_size": 16},
  "pythia": {"decoder_block": "gpt3", "mudd_decoder_layer": "pythia", "mlp_activations": ["gelu"]},
}


def config_of(block, **overrides):
  return models.config(**({"decoder_block": block} | KEYS.get(block, {}) | overrides))


@functools.cache
def abstract(block, **overrides) -> nnx.Module:
  """The model with shapes for arrays."""
  config = config_of(block, **overrides)
  mesh = maxtext_utils.get_mesh_from_config(config)
  with jax.set_mesh(mesh):
    return nnx.merge(*jax.eval_shape(lambda: nnx.split(models.construct(config, mesh))))


def shapes(block, **overrides) -> dict[str, tuple[int, ...]]:
  found = models.parameters(abstract(block, **overrides))
  return {path: value.get_value().shape for path, value in found.items()}


@pytest.mark.parametrize("block", [name for name, spec in blocks.BLOCKS.items() if spec.attention])
def test_spec(block):
  config = config_of(block)
  spec = blocks.spec(config)
  assert spec is blocks.BLOCKS[block]
  layer = single_blocks(abstract(block), config)[-1]  # in a hybrid one, that of full attention
  norms = [operator.attrgetter(path)(layer) for path in (spec.attention_norm, spec.feed_forward_norm) if path]
  assert len({*map(id, norms)}) == len(norms)
  for norm in norms:
    assert norm.scale.get_value().shape == (config.emb_dim,)
  projections = [x for _, x in nnx.iter_modules(layer) if isinstance(x, DenseGeneral)]
  assert len(projections) >= 4
  for module in (*norms, *projections):
    assert (getattr(module, "bias", None) is not None) == spec.has_biases or not spec.is_plain
  attention = getattr(layer, spec.attention)
  # Compressed attention makes its long-range keys of one chunk alone.
  reads_chunks = isinstance(attention, Attention) and not isinstance(attention, CompressedAttention)
  assert spec.takes_chunked_prefill == reads_chunks
  assert spec.is_rotary == hasattr(attention, "rotary_embedding") or not spec.is_plain
  scales_kernel = isinstance(attention, Attention) and attention.query_pre_attn_scalar is None
  assert spec.scales_query_kernel == scales_kernel or not spec.is_plain


@pytest.mark.parametrize("block", [name for name, spec in blocks.BLOCKS.items() if spec.is_plain])
@pytest.mark.parametrize("key", ["attention_bias", "use_qk_norm"])
def test_keys_that_add_parameters(block, key):
  """Only the blocks that take a key have more parameters with it, and `counts` has the same number of them."""
  found, stock = shapes(block, **{key: True}), shapes(block)
  spec = blocks.BLOCKS[block]
  takes = {"attention_bias": spec.takes_attention_bias, "use_qk_norm": spec.takes_qk_norm}[key]
  assert (found.keys() != stock.keys()) == takes
  assert counts.parameters(config_of(block, **{key: True})) == sum(map(math.prod, found.values()))


RELEASED = [name for name, spec in blocks.BLOCKS.items() if spec.is_released or name == "pythia"]


@pytest.mark.parametrize("block", RELEASED)
def test_released_blocks_have_the_parameters_of_the_released_models(block):
  keys = {"mudd": True, "use_qk_norm": blocks.BLOCKS[block].takes_qk_norm}
  found = {name.path: name.shape for name in names.names(config_of(block, **keys))}
  assert found == shapes(block, **keys)


def test_blocks_without_a_row(monkeypatch):
  """Those of a later MaxText, for example."""
  monkeypatch.delitem(blocks.BLOCKS, "gemma")
  with pytest.raises(
    ValueError, match=r"decoder_block='gemma' does not work with mudd=True: supported are llama2, .*, gpt3;"
  ):
    blocks.spec(models.config(decoder_block="gemma"))


@pytest.mark.parametrize(("name", "number"), [("gemma2-2b", 26), ("gemma2-9b", 42), ("gemma2-27b", 46)])
def test_models_of_pairs_have_the_published_number_of_blocks(name, number):
  """MaxText counts half of them. The file of each model passes the checks of the configuration."""
  config = pyconfig.initialize(["", models.BASE_YML], run_name="x", model_name=name, mudd=True, log_config=False)
  assert blocks.num_blocks(config) == connections.plan(config).num_blocks == number


def test_change_class():
  class Double(nnx.Linear):
    def __call__(self, x):
      return 2 * super().__call__(x)

  class WithState(nnx.Linear):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      self.factor = 2

  linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  x = jax.numpy.ones((1, 2))
  before, state = linear(x), nnx.state(linear)
  for unfit in (WithState, nnx.LayerNorm):
    with pytest.raises(TypeError, match=f"{unfit.__name__} cannot replace the class Linear of a module"):
      change_class(linear, unfit)
  change_class(linear, Double)
  assert (linear(x) == 2 * before).all()
  assert nnx.state(linear) == state
