"""Puts depth connections into a trained model of stock MaxText ("upcycling").

The new model has the trained parameters, and the attention norm of a block once for each stream that it serves (LN_q,
LN_k and LN_v) where the block reads separate streams. The parameters of the connections, and tables of extra
embeddings, have the initial values of a new model with the same configuration. At these values it computes what the
trained model computes.

In a train state, an optimizer moment is treated like its parameter: LN_q, LN_k and LN_v start with the moments of the
norm that they were, so that Adam moves them as it moved that norm. Moments of the new parameters are zero.
"""

from collections.abc import Iterator, Mapping
import pathlib
import re
from typing import Any

from flax import nnx
import jax
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils
import numpy as np

from maxtext_mudd import connections
from maxtext_mudd.blocks import normed_streams, stacks
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.checkpoints import layout, model_config, orbax_folder, parameters, run, tensors, train_state
from maxtext_mudd.config.changed import changed
from maxtext_mudd.config.errors import ConfigError

# Every parameter that the plain model does not have has one of these in its path.
_ADDED = frozenset({"connection", "extra_embeddings"})
# Beginnings of paths in a train state: of moments, and of what belongs to no parameter.
_MOMENTS, _OTHER_STATE = "opt_state/", "nnx_aux/"


def to_model_folder(
  checkpoint: pathlib.Path, target: pathlib.Path, config_file: str, overrides: Mapping[str, Any]
) -> None:
  """Writes the model folder `target` with the parameters of a plain model and new connections, without model.yml if no
  such file can describe the model.

  Args:
    checkpoint: OUTPUT/RUN/checkpoints/STEP, or a folder of parameters.
    config_file: the configuration file of the new model.
    overrides: further keys of the new model.

  Raises:
    ConfigError: the checkpoint is damaged, is not of a plain model of these sizes, or a new model of this configuration
      computes another function than the plain model; or the target exists or cannot be written. Then nothing is left
      behind.
  """
  path = run.items_of(checkpoint)
  config = pyconfig.initialize(["", config_file], **{**overrides, **model_config.local_keys()})
  parameters.check_state(config, "upcycle a run, with --run in place of --maxtext-dir")
  saved = _plain_parameters(path, config)
  keys = run.folder_keys(config)
  if run.why_not_in_folder(config, keys):
    keys = None
  run.write(path, saved, config, target, keys, lambda values: _with_connections(values, config))


def to_run(checkpoint: pathlib.Path, target: pathlib.Path, config) -> int:
  """Writes the run `target` with the train state of a plain model and new connections.

  Args:
    checkpoint: OUTPUT/RUN/checkpoints/STEP.
    target: folder of the new run, which must not exist.
    config: configuration of the new model. Its `run_name` is the name of `target`.

  Returns:
    The step.

  Raises:
    ConfigError: as `to_model_folder`, or the checkpoint has no optimizer state.
  """
  train_state.check_new(target)
  if not (checkpoint.name.isdigit() and checkpoint.parent.name == "checkpoints"):
    raise ConfigError(
      f"{checkpoint} is not a checkpoint of a run, which --run needs; name OUTPUT/RUN/checkpoints/STEP."
    )
  step, checkpoint = train_state.find_checkpoint(checkpoint.parents[1], int(checkpoint.name))
  path = run.items_of(checkpoint)
  _plain_parameters(path, config)
  values = train_state.read(checkpoint)
  if not any(name.startswith(_MOMENTS) for name in values):
    raise ConfigError(f"{path} has no optimizer state, which --run keeps; write the parameters with --maxtext-dir.")
  advice = "use the keys of the optimizer with which the run was trained, or write the parameters with --maxtext-dir"
  values = {stacks.path_from_plain(config, name): x for name, x in values.items()}
  values = dict(_with_connections(values, config))
  train_state.write(config, values, step, target, checkpoint, _is_added_moment, advice)
  return step


def _plain_parameters(path: pathlib.Path, config) -> dict[str, tensors.Tensor]:
  """The parameters of a checkpoint, by their paths in the new model.

  Raises:
    ConfigError: they are not those of the plain model of the configuration, or the configuration changes its logits.
  """
  _check_config(config)
  saved = orbax_folder.parameters(path)
  connection = next((name for name in sorted(saved) if _is_added(name)), None)
  if connection:
    raise ConfigError(f"{path} has {connection}: its model has depth connections already; name one that has none.")
  plain = changed(config, mudd=False, scan_layers=run.is_scanned(saved))
  parameters.check({name: x.shape for name, x in saved.items()}, model_config.parameter_shapes(plain), str(path))
  return {stacks.path_from_plain(config, name): x for name, x in saved.items()}


def _check_config(config) -> None:
  if not config.mudd:
    raise ConfigError("mudd=False: upcycling adds depth connections to a model; set mudd=true.")
  if config.mudd_ffn_reallocation:
    raise ConfigError(
      "mudd_ffn_reallocation=True: the FFNs of the new model would have other widths than those of the checkpoint; set "
      "mudd_ffn_reallocation=false."
    )
  if config.mudd_rope_table != "stock":
    raise ConfigError(
      f"mudd_rope_table={config.mudd_rope_table}: the checkpoint was trained with MaxText's rotary table, which has "
      "other values; set mudd_rope_table=stock."
    )
  if reason := connections.family(config).why_not_plain(config):
    raise ConfigError(f"{reason}.")


def _with_connections(values: Mapping[str, np.ndarray], config) -> Iterator[tuple[str, np.ndarray]]:
  """The parameters or the train state of the new model, by path, in the layout of the configuration.

  Args:
    values: those of the plain model, with scanned or single layers.
  """
  new = _initial_parameters(config)
  if config.scan_layers:
    new = layout.unstack(new, config)
  singles = _single_layers(layout.unstack(values, config) if run.is_scanned(values) else values, new, config)
  return layout.stacking(dict(singles), config) if config.scan_layers else singles


def _single_layers(
  values: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], config
) -> Iterator[tuple[str, np.ndarray]]:
  """`_with_connections` for single layers.

  Args:
    new: the initial values of the parameters that the plain model does not have.
  """
  norm, plan, singles = block_spec(config).attention_norm, connections.plan(config), stacks.single_layers(config)
  roots = set()  # what paths of parameters begin with
  for path in values:
    value, match = values[path], re.fullmatch(rf"(|.*/)decoder/({stacks.SINGLE_LAYER})/([^/]+)(/.+)", path)
    if match and not match[1].startswith((_OTHER_STATE, _MOMENTS)):
      roots.add(match[1])
    if match and match[3] == norm and plan.has_separate_norms(singles[match[2]]):
      for stream in normed_streams(config, singles[match[2]]):
        yield f"{path[: match.end(3)]}/{stream}{match[4]}", value
    else:
      yield path, value
  for root in roots:
    for path, value in new.items():
      yield root + path, value


def _is_added(path: str) -> bool:
  return not _ADDED.isdisjoint(path.split("/"))


def _is_added_moment(path: str) -> bool:
  return path.startswith(_MOMENTS) and _is_added(path)


def _initial_parameters(config) -> dict[str, np.ndarray]:
  """The parameters of a new model that the plain one does not have, by path, as training on one device initialises
  them."""
  mesh = maxtext_utils.get_mesh_from_config(config)
  create, _ = model_creation_utils.create_nnx_abstract_model(config, mesh)

  def new_parameters():
    flat = nnx.to_flat_state(nnx.state(create(), nnx.Param))
    by_path = {"/".join(map(str, path)): x.get_value() for path, x in flat}
    return {path: x for path, x in by_path.items() if _is_added(path)}

  with jax.default_prng_impl("unsafe_rbg"), jax.set_mesh(mesh):  # the random numbers of MaxText's trainer
    return {path: np.asarray(x) for path, x in jax.jit(new_parameters)().items()}
