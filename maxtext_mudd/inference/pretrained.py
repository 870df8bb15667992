"""Trained models in Python: from a folder to logits."""

import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from maxtext_mudd import plugin
from maxtext_mudd.config import errors
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.inference import forward

# Beside the keys of a model. Matrix products of float32 are no less on TPUs and GPUs.
DEFAULTS = {
  "run_name": "",
  "enable_checkpointing": False,
  "log_config": False,
  "skip_jax_distributed_system": True,
  "dataset_type": "synthetic",
  "per_device_batch_size": 1,
  "scan_layers": False,
  "remat_policy": "none",
  "dtype": "float32",
  "weight_dtype": "float32",
  "matmul_precision": "highest",
}


@errors.reachable()
def from_pretrained(folder: str | pathlib.Path, **config_overrides: Any):
  """A model with the parameters of a folder, on the devices of this process.

  Args:
    folder: a Hugging Face folder of MUDDFormer or MUDDPythia, a folder of the authors' JAX code, or what `convert` made
      of one.
    config_overrides: MaxText's keys; by default everything is float32, and layers are not scanned.

  Returns:
    (model, config): an NNX `Transformer` and its `HyperParameters`.

  Raises:
    ConfigError: the folder is missing or holds no such model, or the configuration cannot work.
  """
  plugin.install()
  from maxtext_mudd.checkpoints import model_config, model_folder, model_keys, parameters, tensors, tokenizers
  from maxtext_mudd.checkpoints.authors_jax import models as fork
  from maxtext_mudd.checkpoints.hugging_face import files as hf_files
  from maxtext_mudd.checkpoints.hugging_face import models as hf
  from maxtext_mudd.config import devices

  config_overrides = _as_written(config_overrides)
  if not pathlib.Path(folder).expanduser().is_dir():
    raise ConfigError(f"{folder} is not a folder; download or copy the model first, and name the folder that holds it.")
  folder = pathlib.Path(folder).expanduser().absolute()
  if model_folder.is_model_folder(folder):
    free = {*DEFAULTS, *model_keys.FREE, "tokenizer_path", "tokenizer_type"} - {"scan_layers"}  # they lie in one layout
    keys = model_config.with_overrides(DEFAULTS | model_folder.read_keys(folder), config_overrides, folder, free)
    config = model_config.build(keys | {"load_parameters_path": str(folder / model_folder.ITEMS)})
    devices.check_mesh(config)
    return parameters.load(config), config
  if _is_of_a_run(folder):
    raise ConfigError(
      f"{folder} is a checkpoint without the keys of its model; name the folder that has {model_folder.CONFIG}, or "
      "give the CONFIG.yml of its run to from_run."
    )
  published = any((folder / name).exists() for name in hf_files.FILES)
  kind = next((kind for kind in ((hf, fork) if published else (fork, hf)) if kind.is_folder(folder)), None)
  if kind is None:
    raise ConfigError(
      f"{folder} holds no model: neither {model_folder.CONFIG}, {tensors.SINGLE} nor {fork.FILE} is there."
    )
  source = kind.Model(folder)
  defaults = DEFAULTS | tokenizers.keys(folder)
  config = model_config.build(model_folder.source_keys(source, defaults | config_overrides))
  devices.check_mesh(config)
  return _model(config, source), config


@errors.reachable()
def from_run(checkpoint: str | pathlib.Path, config_file: str | pathlib.Path, **config_overrides: Any):
  """A model with the parameters of a training run, on the devices of this process, whatever mesh the run was on.

  Args:
    checkpoint: OUTPUT/RUN/checkpoints/STEP, or the tree in it.
    config_file: the configuration that the run was started with.
    config_overrides: keys that it was started with, too; by default everything is float32.

  Returns:
    (model, config): as of `from_pretrained`.

  Raises:
    ConfigError: the configuration cannot work, or the checkpoint is not of its model.
  """
  plugin.install()
  from maxtext.configs import pyconfig

  from maxtext_mudd.checkpoints import model_config, parameters
  from maxtext_mudd.config import devices

  checkpoint = str(checkpoint)
  if "://" not in checkpoint:
    path = pathlib.Path(checkpoint).expanduser().absolute()
    if not path.is_dir():
      raise ConfigError(f"{checkpoint}: there is no such folder; name a checkpoint, as OUTPUT/RUN/checkpoints/STEP.")
    checkpoint = str(parameters.items_folder(str(path)))
  own = {"scan_layers"}  # as the parameters lie there
  keys = (
    {key: x for key, x in DEFAULTS.items() if key not in own}
    | model_config.local_keys()
    | _as_written(config_overrides)
  )
  config = pyconfig.initialize(["", str(config_file)], **keys, load_parameters_path=checkpoint)
  devices.check_mesh(config)
  return parameters.load(config), config


def _as_written(overrides: dict[str, Any]) -> dict[str, Any]:
  """As in a configuration file: data types by name."""
  return {key: jnp.dtype(x).name if isinstance(x, (type, np.dtype)) else x for key, x in overrides.items()}


def _is_of_a_run(folder: pathlib.Path) -> bool:
  """Whether it is, or has, a tree that MaxText saved of a model with connections."""
  from maxtext_mudd.checkpoints import parameters

  paths = (folder / "items", folder)
  return any("/connection/" in name for path in paths if path.is_dir() for name in parameters.shapes(str(path)))


def _model(config, source):
  """The model, each parameter put to its devices as soon as it is read."""
  from maxtext.utils import maxtext_utils, model_creation_utils

  from maxtext_mudd.checkpoints import model_folder

  mesh = maxtext_utils.get_mesh_from_config(config)
  create, abstract = model_creation_utils.create_nnx_abstract_model(config, mesh)
  graph, params, _ = nnx.split(abstract, nnx.Param, ...)
  variables = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}

  def place(path, value):
    return jax.device_put(value, variables[path].get_value().sharding)

  for path, value in model_folder.check_parameters(config, source.parameters(config), source.path, place).items():
    variables[path].set_value(value)
  with jax.set_mesh(mesh):
    others = jax.jit(lambda: nnx.split(create(), nnx.Param, ...)[2])()  # random states; no parameter is made for them
  return nnx.merge(graph, params, others)


def logits(
  model,
  tokens: Int[Array, "B T"],
  *,
  positions: Int[Array, "B T"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
  """Logits of every token's successor, in float32.

  Args:
    positions: 0 to T-1 in every row by default.
    segment_ids: tokens attend to their own segment only; one by default. 0 is padding.

  Raises:
    ValueError: tokens are no array [B,T] of whole numbers, longer than the context, or one is not in the vocabulary;
      positions or segment_ids do not fit.
  """
  try:
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
  except ValueError as error:
    raise ValueError("tokens are rows of different lengths; they have to be [batch, length].") from error
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens are {tokens.dtype}; they have to be whole numbers.")
  if tokens.ndim != 2 or 0 in tokens.shape:
    raise ValueError(f"tokens are {list(tokens.shape)}; they have to be [batch, length].")
  if tokens.shape[1] > model.config.max_target_length:
    raise ValueError(
      f"tokens are {list(tokens.shape)}, longer than the context, max_target_length={model.config.max_target_length}."
    )
  if not isinstance(tokens, jax.core.Tracer):  # whose values are not known; MaxText takes other tokens without a word
    wrong = (tokens < 0) | (tokens >= model.config.vocab_size)
    if wrong.any():
      raise ValueError(f"tokens hold {tokens[wrong][0]}, and the model has vocab_size={model.config.vocab_size}.")
  tokens = jnp.asarray(tokens, jnp.int32)
  if positions is None:
    positions = np.arange(tokens.shape[1], dtype=np.int32)
  if segment_ids is None:
    segment_ids = np.ones((), np.int32)
  positions, segment_ids = (
    _fitting(name, x, tokens.shape) for name, x in (("positions", positions), ("segment_ids", segment_ids))
  )
  return _logits(model, tokens, positions, segment_ids)


def _fitting(name: str, values, shape: tuple[int, int]) -> Int[Array, "B T"]:
  values = jnp.asarray(values)
  if not jnp.issubdtype(values.dtype, jnp.integer) or values.shape not in (shape, shape[1:], ()):
    found = f"{values.dtype}{list(values.shape)}"
    raise ValueError(f"{name} are {found}; they have to be whole numbers [batch, length], {list(shape)}.")
  return jnp.broadcast_to(values.astype(jnp.int32), shape)


@forward.pure
def _logits(model, tokens, positions, segment_ids):
  return model(tokens, positions, segment_ids, enable_dropout=False).astype(jnp.float32)
