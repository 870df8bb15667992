"""Quantized models start as the quantized stock model, with AQT and with Qwix, wherever MaxText quantizes the block."""

from flax import nnx
import jax
from maxtext.trainers.pre_train import train
import pytest

from tests import models
from tests.blocks import FUSED, KEYS, OTHERS, config_of

# MaxText 0.2.5 itself cannot quantize the other blocks on one device: AQT fails to build experts, and Qwix takes both
# operands of a product for weights.
WITH_AQT = [block for block, keys in KEYS.items() if "num_experts" not in keys and block not in FUSED]
WITH_QWIX = ["llama2", "mistral", "gpt3", "pythia", "gemma4_small", "olmo3"]
WITH_QWIX += [block for block in OTHERS if block.startswith("deepseek")]
CASES = [(block, "aqt") for block in WITH_AQT] + [(block, "qwix") for block in WITH_QWIX]
FAST = ("default-aqt", "gpt3-qwix")


def loss_and_conversions(config):
  """Loss of a new model on a random batch, and how many arrays its forward pass converts to int8."""
  model = models.build(config)
  with jax.set_mesh(model.decoder.mesh):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    data = models.batch(config)

    def loss(params):
      return train.loss_fn(nnx.merge(graph, params, rest, copy=True), config, dict(data), None, None)[0]

    # Without optimizations, which round the two models in different ways.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    value = jax.jit(loss, compiler_options=options)(params)
    return float(value), str(jax.make_jaxpr(loss)(params)).count("new_dtype=int8")


def _case(block, library):
  marks = [] if f"{block}-{library}" in FAST else [pytest.mark.slow]
  return pytest.param(block, library, marks=marks)


@pytest.mark.parametrize(("block", "library"), [_case(*case) for case in CASES])
def test_starts_as_the_quantized_stock_model(block, library):
  keys = {"remat_policy": "none", "quantization": "int8", "use_qwix_quantization": library == "qwix"}
  stock, conversions = loss_and_conversions(config_of(block, **keys))
  connected, of_connected = loss_and_conversions(config_of(block, mudd=True, **keys))
  plain, none = loss_and_conversions(config_of(block, remat_policy="none"))
  assert connected == stock != plain
  assert none == 0
  # Latent attention is applied twice, to the latents of keys and of values. Weights of aggregates are not quantized.
  assert of_connected >= conversions > 0
  if not block.startswith("deepseek"):
    assert of_connected == conversions
