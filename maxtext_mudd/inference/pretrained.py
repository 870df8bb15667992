"""Loads a trained model in Python and computes its logits.

    model, config = maxtext_mudd.from_pretrained("MUDDFormer-2.8B")
    logits = maxtext_mudd.logits(model, tokens)  # tokens: [batch, length]

`from_run` loads a checkpoint of a training run in the same way.
"""

from collections.abc import Callable
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

# Defaults of keys that a folder with a model does not set. Without "highest", TPUs and GPUs would multiply float32
# matrices in a lower precision.
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
  """Loads the model in a folder onto the devices of this process.

  Args:
    folder: a Hugging Face folder of MUDDFormer or MUDDPythia, a folder of the authors' JAX code, or a folder that
      `maxtext_mudd.convert` wrote.
    config_overrides: MaxText's keys. By default everything is float32, and layers are not scanned.

  Returns:
    (model, config): an NNX `Transformer` and its `HyperParameters`.

  Raises:
    ConfigError: the folder is missing or holds no such model, or the configuration cannot work.
  """
  config, load = open_folder(folder, **config_overrides)
  return load(), config


def open_folder(folder: str | pathlib.Path, **config_overrides: Any):
  """(config, load) of what `from_pretrained` takes: `load()` returns the model. Parameters are read by `load` only."""
  plugin.install()
  from maxtext_mudd.checkpoints import model_config, model_folder, model_keys, parameters, tensors, tokenizers
  from maxtext_mudd.checkpoints.authors_jax import models as authors_jax
  from maxtext_mudd.checkpoints.hugging_face import files as hugging_face_files
  from maxtext_mudd.checkpoints.hugging_face import models as hugging_face
  from maxtext_mudd.config import devices

  config_overrides = _with_dtype_names(config_overrides)
  if not pathlib.Path(folder).expanduser().is_dir():
    raise ConfigError(f"{folder} is not a folder; download or copy the model first, and name the folder that holds it.")
  folder = pathlib.Path(folder).expanduser().absolute()
  if model_folder.is_model_folder(folder):
    # scan_layers cannot be overridden: the checkpoint has the parameters of single or of scanned layers.
    free_keys = {*DEFAULTS, *model_keys.FREE, "tokenizer_path", "tokenizer_type"} - {"scan_layers"}
    keys = model_config.with_overrides(DEFAULTS | model_folder.read_keys(folder), config_overrides, folder, free_keys)
    config = model_config.build(keys | {"load_parameters_path": str(folder / model_folder.ITEMS)})
    devices.check_mesh(config)
    return config, lambda: parameters.load(config)
  if _is_checkpoint_of_run(folder):
    raise ConfigError(
      f"{folder} is a checkpoint without the keys of its model; name the folder that has {model_folder.CONFIG}, or "
      "call from_run with the CONFIG.yml of its run."
    )
  # A folder may look like both formats. Files that only Hugging Face folders have decide which one is tried first.
  has_hugging_face_file = any((folder / name).exists() for name in hugging_face_files.FILES)
  modules = (hugging_face, authors_jax) if has_hugging_face_file else (authors_jax, hugging_face)
  reader = next((module for module in modules if module.is_folder(folder)), None)
  if reader is None:
    raise ConfigError(
      f"{folder} holds no model: it has none of {model_folder.CONFIG}, {tensors.SINGLE} and {authors_jax.FILE}."
    )
  source = reader.Model(folder)
  defaults = DEFAULTS | tokenizers.keys(folder)
  config = model_config.build(model_folder.source_keys(source, defaults | config_overrides))
  devices.check_mesh(config)

  def parameters_of(place):
    return model_folder.check_parameters(config, source.parameters(config), source.path, place)

  return config, lambda: build_with(config, parameters_of)


@errors.reachable()
def from_run(checkpoint: str | pathlib.Path, config_file: str | pathlib.Path, **config_overrides: Any):
  """Loads the model of a training run onto the devices of this process. The run may have had another mesh.

  Args:
    checkpoint: the folder OUTPUT/RUN/checkpoints/STEP, or the tree of parameters in it.
    config_file: the configuration file that the run was started with.
    config_overrides: the keys that the run was started with, and others. By default everything is float32.

  Returns:
    (model, config): as from `from_pretrained`.

  Raises:
    ConfigError: the configuration cannot work, or the checkpoint is of another model.
  """
  config, load = open_run(checkpoint, config_file, **config_overrides)
  return load(), config


def open_run(checkpoint: str | pathlib.Path, config_file: str | pathlib.Path, **config_overrides: Any):
  """(config, load) of what `from_run` takes: `load()` returns the model. Parameters are read by `load` only."""
  plugin.install()
  from maxtext.configs import pyconfig

  from maxtext_mudd.checkpoints import model_config, parameters
  from maxtext_mudd.config import devices

  checkpoint = str(checkpoint)
  if other := config_overrides.get("load_parameters_path"):
    raise ConfigError(
      f"load_parameters_path={other}: the parameters are those of {checkpoint}; leave it out, and merge an adapter "
      "into its model by python3 -m maxtext_mudd.convert from-run first."
    )
  if "://" not in checkpoint:
    path = pathlib.Path(checkpoint).expanduser().absolute()
    if not path.is_dir():
      raise ConfigError(
        f"{checkpoint}: there is no such folder; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP."
      )
    checkpoint = str(parameters.items_folder(str(path)))
  for key in ("ici_pipeline_parallelism", "dcn_pipeline_parallelism"):
    if config_overrides.get(key, 1) != 1:
      raise ConfigError(
        f"{key}={config_overrides[key]}: a trained model is loaded without a pipeline; leave it out, and convert a "
        "checkpoint of a pipeline by python3 -m maxtext_mudd.convert from-run first."
      )
  # scan_layers has to be as in the run, because the checkpoint has the run's layout.
  defaults = {key: value for key, value in DEFAULTS.items() if key != "scan_layers"}
  keys = defaults | model_config.local_keys() | _with_dtype_names(config_overrides)
  config = pyconfig.initialize(["", str(config_file)], **keys, load_parameters_path=checkpoint)
  devices.check_mesh(config)
  return config, lambda: parameters.load(config)


def _with_dtype_names(overrides: dict[str, Any]) -> dict[str, Any]:
  """Replaces data types by their names, as a configuration file has them."""
  return {key: jnp.dtype(x).name if isinstance(x, (type, np.dtype)) else x for key, x in overrides.items()}


def _is_checkpoint_of_run(folder: pathlib.Path) -> bool:
  """Whether the folder is or contains a tree of parameters that MaxText saved for a model with connections."""
  from maxtext_mudd.checkpoints import parameters

  path = parameters.items_folder(str(folder))
  return path.is_dir() and any("/connection/" in name for name in parameters.shapes(str(path)))


def build_with(config, parameters_of: Callable) -> nnx.Module:
  """Builds the model of a configuration, and places each parameter on its devices as soon as it is read.

  Args:
    parameters_of: from a function that takes a path and an array, and places the array on the devices of the parameter
      with this path, to all parameters, placed, by path.
  """
  from maxtext.utils import maxtext_utils, model_creation_utils

  mesh = maxtext_utils.get_mesh_from_config(config)
  create, abstract = model_creation_utils.create_nnx_abstract_model(config, mesh)
  graph, params, _ = nnx.split(abstract, nnx.Param, ...)
  variables = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}

  def place(path, value):
    return jax.device_put(value, variables[path].get_value().sharding)

  for path, value in parameters_of(place).items():
    variables[path].set_value(value)
  with jax.set_mesh(mesh):
    # This computes the random states only. The compiler drops the initial values of parameters, which nothing uses.
    random_states = jax.jit(lambda: nnx.split(create(), nnx.Param, ...)[2])()
  return nnx.merge(graph, params, random_states)


def logits(
  model,
  tokens: Int[Array, "B T"],
  *,
  positions: Int[Array, "B T"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
  """Computes, for every token, the logits of the next token, in float32.

  Args:
    model: what `from_pretrained` or `from_run` returns first.
    tokens: whole numbers from 0 to vocab_size - 1.
    positions: the position of each token. By default they are 0 to T-1 in every row.
    segment_ids: the segment of each token; tokens attend to their own segment only, and 0 is padding. By default a row
      is one segment.

  Raises:
    ValueError: `tokens` is not an array [B,T] of whole numbers, is longer than the context, or has a token that is not
      in the vocabulary; or `positions` or `segment_ids` do not have the shape of `tokens`.
  """
  return _logits(model, *checked_tokens(model, tokens, positions, segment_ids))


def checked_tokens(
  model, tokens, positions=None, segment_ids=None
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]]:
  """Tokens, positions and segments as a model takes them, from the arguments of `logits`. Raises ValueError."""
  try:
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
  except ValueError as error:
    raise ValueError("tokens are rows of different lengths; pass an array [batch, length].") from error
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens are {tokens.dtype}; pass whole numbers.")
  if tokens.ndim != 2 or 0 in tokens.shape:
    raise ValueError(f"tokens are {list(tokens.shape)}; pass an array [batch, length].")
  if tokens.shape[1] > model.config.max_target_length:
    raise ValueError(
      f"tokens are {list(tokens.shape)}, longer than the context, max_target_length={model.config.max_target_length}."
    )
  # MaxText would not refuse unknown tokens. A tracer has no values to check.
  if not isinstance(tokens, jax.core.Tracer):
    is_unknown = (tokens < 0) | (tokens >= model.config.vocab_size)
    if is_unknown.any():
      raise ValueError(f"tokens hold {tokens[is_unknown][0]}, and the model has vocab_size={model.config.vocab_size}.")
  tokens = jnp.asarray(tokens, jnp.int32)
  if positions is None:
    positions = np.arange(tokens.shape[1], dtype=np.int32)
  if segment_ids is None:
    segment_ids = np.ones((), np.int32)
  positions, segment_ids = (
    _broadcast(name, values, tokens.shape) for name, values in (("positions", positions), ("segment_ids", segment_ids))
  )
  return tokens, positions, segment_ids


def _broadcast(name: str, values, shape: tuple[int, int]) -> Int[Array, "B T"]:
  """Broadcasts whole numbers [B,T], [T] or [] to the shape of the tokens. Raises ValueError, which uses `name`."""
  values = jnp.asarray(values)
  if not jnp.issubdtype(values.dtype, jnp.integer) or values.shape not in (shape, shape[1:], ()):
    raise ValueError(
      f"{name} are {values.dtype}{list(values.shape)}; pass whole numbers [batch, length], {list(shape)}."
    )
  return jnp.broadcast_to(values.astype(jnp.int32), shape)


@forward.pure
def _logits(model, tokens, positions, segment_ids):
  return model(tokens, positions, segment_ids, enable_dropout=False).astype(jnp.float32)
