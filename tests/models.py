"""Tiny models for the tests: configurations, construction, and setting parameters by path."""

import functools
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.common.common_types import DecoderBlockType
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils
import numpy as np

import maxtext_mudd

DATA = pathlib.Path(__file__).parent / "data"
BASE_YML = str(pathlib.Path(pyconfig.__file__).parent / "base.yml")

EXPERTS = ("/wi_0", "/wi_1", "/wo")  # their kernels: one matrix of inputs and outputs for each expert
LLAMA2 = DecoderBlockType.LLAMA2
SMALL = {
  "run_name": "test",
  "enable_checkpointing": False,
  "log_config": False,
  "jax_cache_dir": "",
  "scan_layers": False,
  "attention": "dot_product",
  "dtype": "float32",
  "weight_dtype": "float32",
  "base_emb_dim": 32,
  "base_num_query_heads": 2,
  "base_num_kv_heads": 2,
  "head_dim": 16,
  "base_mlp_dim": 64,
  "base_num_decoder_layers": 3,
  "vocab_size": 64,
  "max_target_length": 16,
  "max_prefill_predict_length": 8,
  "per_device_batch_size": 2,
  "normalization_layer_epsilon": 1e-6,
  "enable_dropout": False,
}


def config(**overrides):
  """A MaxText configuration of a small float32 model; unknown keys and values that cannot work raise."""
  return pyconfig.initialize(["", BASE_YML], **(SMALL | overrides))


def build(cfg, seed=0):
  """The model of a configuration, as MaxText builds it, with its mesh over all devices."""
  mesh = maxtext_utils.get_mesh_from_config(cfg)
  with jax.set_mesh(mesh):
    return construct(cfg, mesh, seed)


def construct(cfg, mesh, seed=0):
  """The same where the mesh is set already."""
  return model_creation_utils.create_model(cfg, mesh, rngs=nnx.Rngs(params=seed, dropout=seed + 1))


def parameters(model) -> dict[str, nnx.Param]:
  """Parameters by path, as in "decoder/layers_0/mlp/wo/kernel"."""
  return {"/".join(map(str, path)): value for path, value in nnx.state(model, nnx.Param).flat_state()}


def set_parameters(model, values: dict[str, np.ndarray]) -> None:
  """Sets every parameter; paths or shapes that do not match exactly are an error."""
  found = parameters(model)
  assert set(found) == set(values), sorted(set(found) ^ set(values))
  state = nnx.state(model, nnx.Param)
  for path, variable in state.flat_state():
    value = values["/".join(map(str, path))]
    assert variable.get_value().shape == value.shape, (path, variable.get_value().shape, value.shape)
    variable.set_value(jnp.asarray(value, variable.get_value().dtype))
  nnx.update(model, state)


def random_parameters(shapes: dict[str, tuple[int, ...]], seed=0) -> dict[str, np.ndarray]:
  """Random values for parameters of these shapes by path, large enough that each of them matters.

  No larger than that: scales of the outputs of layers around zero, or outputs of experts 36 times as large as those of
  other MLPs, make deep models so curved that rounding and train steps are amplified.
  """
  rng = np.random.default_rng(seed)
  values = {}
  for path, shape in sorted(shapes.items()):
    if path.endswith(("scale", "layer_scalar")):
      values[path] = 1 + 0.3 * rng.standard_normal(shape)
    elif path.endswith("/a"):
      values[path] = np.eye(shape[-1])[-1] + 0.4 * rng.standard_normal(shape)
    elif path.endswith("bias"):
      values[path] = 0.2 * rng.standard_normal(shape)
    else:
      inputs = shape[-2 if path.endswith(EXPERTS) else 0]
      values[path] = rng.standard_normal(shape) * max(inputs, 1) ** -0.5
  return {path: value.astype(np.float32) for path, value in values.items()}


def randomise(model, seed=0) -> dict[str, np.ndarray]:
  """Sets every parameter to random values and returns them."""
  shapes = {path: variable.get_value().shape for path, variable in parameters(model).items()}
  values = random_parameters(shapes, seed)
  set_parameters(model, values)
  return values


def batch(cfg, seed=0) -> dict[str, np.ndarray]:
  """A random batch as MaxText's pipelines make it."""
  rng = np.random.default_rng(seed)
  shape = (int(cfg.global_batch_size_to_train_on), cfg.max_target_length)
  tokens = rng.integers(0, cfg.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
  position = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  ones = np.ones(shape, np.int32)
  return {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "inputs_position": position,
    "targets_position": position,
    "inputs_segmentation": ones,
    "targets_segmentation": ones,
  }


@nnx.jit
def jitted_logits(model, data):
  return logits(model, data)


@functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
)
def _logits(graph, state, data):
  return logits(nnx.merge(graph, state), data)


def exact_logits(model, data):
  """Compiled as models are, whatever XLA_FLAGS says to be quick: that rounds otherwise, too much on some processors."""
  return _logits(*nnx.split(model), data)


def logits(model, data):
  """Logits of a batch in training mode, without dropout."""
  return model(data["inputs"], data["inputs_position"], data["inputs_segmentation"], enable_dropout=False)


def check_greedy(model, row, prompt: int, number: int) -> None:
  """Each new token is the most probable one after all before it, in one pass over them."""
  logits = np.asarray(maxtext_mudd.logits(model, row[None, : prompt + number]))[0]
  np.testing.assert_array_equal(logits[prompt - 1 : -1].argmax(-1), row[prompt : prompt + number])
