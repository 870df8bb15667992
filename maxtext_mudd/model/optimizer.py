"""How MaxText's optimizers treat the parameters of connections: weight decay, learning rate, and Muon's matrices.

Optimizers of other parameters, and the tree of an optimizer's state, are MaxText's.
"""

import functools
import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from maxtext.utils import max_logging
import optax
from optax.contrib import MuonDimensionNumbers

from maxtext_mudd import connections
from maxtext_mudd.blocks import num_blocks, stacks
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.connections import layout, metrics
from maxtext_mudd.model import mtp

Path = tuple[str, ...]


def with_connection_rules(stock):
  """`get_optimizer` with `mudd_decay`, `mudd_learning_rate_factor`, and Muon's scale of updates for padded matrices."""

  @functools.wraps(stock)
  def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
    optimizer = stock(config, learning_rate_schedule, model, mesh)
    return _with_rules(optimizer, config) if getattr(config, "mudd", False) else optimizer

  return get_optimizer


def with_connection_matrices(stock):
  """`get_muon_weight_dimension_numbers` with the matrices of connections; Adam gets their other parameters."""

  @functools.wraps(stock)
  def get_muon_weight_dimension_numbers(model, config=None, verbose=False):
    numbers = stock(model, config, verbose)
    if not getattr(config, "mudd", False):
      return numbers
    numbers = jax.tree_util.tree_map_with_path(
      lambda path, x: _dimension_numbers(_names(path), config) if _is_of_connection(_names(path)) else x,
      numbers,
      is_leaf=_is_dimension_numbers,
    )
    max_logging.log(_described(numbers))
    return numbers

  return get_muon_weight_dimension_numbers


def _with_rules(optimizer: optax.GradientTransformation, config) -> optax.GradientTransformationExtraArgs:
  """The optimizer with the rules for connections. While a train step is traced it also records their gradients' norms.

  Optimizers read parameters for weight decay only: a parameter that is shown as zeros is not decayed.
  """

  def for_decay(path, parameter):
    path = _names(path)
    return parameter / _muon_factor(path, parameter, config) if _is_decayed(path, config) else jnp.zeros_like(parameter)

  def scaled(path, update):
    path = _names(path)
    rate = config.mudd_learning_rate_factor if _is_of_connection(path) else 1
    return rate * _muon_factor(path, update, config) * update

  def update(gradients, state, params=None, **extra):
    if (totals := metrics.totals()) is not None:
      totals["grad_norm"] = _gradient_norms(gradients, config)
    if params is not None:
      params = jax.tree_util.tree_map_with_path(for_decay, params)
    updates, state = optax.with_extra_args_support(optimizer).update(gradients, state, params, **extra)
    return jax.tree_util.tree_map_with_path(scaled, updates), state

  def init(parameters):
    _check_mask(parameters, config)
    return optimizer.init(parameters)

  return optax.GradientTransformationExtraArgs(init, update)


def _check_mask(parameters, config) -> None:
  """Raises ConfigError for a `trainable_parameters_mask` with which MaxText would train nothing."""
  patterns = config.trainable_parameters_mask or []
  paths = ["/".join(_names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
  if patterns and not any(re.search(pattern, path) for pattern in patterns for path in paths):
    raise ConfigError(
      f"trainable_parameters_mask={list(patterns)} matches no parameter, so nothing would be trained; connections are "
      f"/connection/, and the first parameter is {paths[0]}."
    )


def _gradient_norms(gradients, config) -> dict[int, Float[Array, ""]]:
  """The norm of the gradients of all parameters of connections, by the number of blocks before their reader."""
  squares = {}
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    path = _names(path)
    if not _is_of_connection(path):
      continue
    square = jnp.square(gradient.astype(jnp.float32))
    blocks = _blocks_before(path, config)
    stack = None if isinstance(blocks, int) else stacks.of_path(config, path)
    by_block = square[None] if stack is None else layout.by_block(config, stack, square)
    for block, of_block in zip([blocks] if stack is None else blocks, by_block):
      squares[block] = squares.get(block, 0) + jnp.sum(of_block)
  return {block: jnp.sqrt(x) for block, x in squares.items()}


def _blocks_before(path: Path, config) -> int | list[int]:
  """How many blocks come before what reads a connection's parameter; in a stack of scanned layers, for each of them."""
  family, module = connections.family(config), path[path.index("connection") + 1]
  mtp_number = mtp.number_in(path)
  if mtp_number or module in family.finish_modules:
    return num_blocks(config) + (mtp_number or 0)
  if module in family.start_modules:
    return _first_reader(config, 0)

  def before(block):
    return _first_reader(config, block) if module == "output_norm" else block - 1

  if stack := stacks.of_path(config, path):
    return [before(block) for block in stack.blocks]
  block = stacks.block_of_single(config, path)
  return before(block) if block else 0


def _first_reader(config, source: int) -> int:
  """How many blocks come before the first aggregate that mixes a source."""
  sites = connections.plan(config).sites
  return min((after for after, site in sites.items() if source in site.sources), default=source)


def _names(path) -> Path:
  return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _is_of_connection(path: Path) -> bool:
  return "connection" in path


def _is_decayed(path: Path, config) -> bool:
  if not _is_of_connection(path):
    return True
  family, name = connections.family(config), path[-1]
  rule = config.mudd_decay
  if rule == "auto":
    rule = "matrices" if config.opt_type == "muon" else "all"
  return {
    "all": True,
    "not_static": name not in family.static_weights,
    "matrices": name in family.matrices,
    "nothing": False,
  }[rule]


def _dimension_numbers(path: Path, config) -> MuonDimensionNumbers | None:
  """The rows and columns of the matrix that a parameter of a connection is; None: Adam trains it."""
  axes = connections.family(config).matrices.get(path[-1]) if config.mudd_muon_matrices else None
  return None if axes is None else MuonDimensionNumbers(*axes)


def _muon_factor(path: Path, stacked: jax.Array, config):
  """For a matrix of scanned layers: Muon's scale of updates by the size of each block's matrix, over that by the size
  of the padded one. 1 for other parameters.

  optax scales by sqrt(max(rows, columns)) times `muon_consistent_rms`, or, without that, by sqrt(max(1, columns/rows)).
  """
  is_matrix = _is_of_connection(path) and _dimension_numbers(path, config)
  stack = stacks.of_path(config, path)
  if config.opt_type != "muon" or stack is None or not is_matrix:
    return 1
  table = layout.table(connections.plan(config), stack.blocks, padded=True)
  padded = layout.by_block(config, stack, stacked).shape[1:]

  def scale(sizes):
    rows, columns = (math.prod(sizes[axis] for axis in axes) for axes in _dimension_numbers(path, config))
    return math.sqrt(max(1, columns / rows) if config.muon_consistent_rms is None else max(rows, columns))

  # All of a block without a site is padding, so that any factor will do.
  shapes = [padded if x is None else layout.single_shape(config, path, padded, x, table.padded) for x in table.sites]
  factors = [scale(shape) / scale(padded) for shape in shapes]
  return layout.of_stack(config, stack, jnp.asarray(factors, stacked.dtype).reshape(-1, *[1] * len(padded)))


def _is_dimension_numbers(x) -> bool:
  return x is None or isinstance(x, MuonDimensionNumbers)


def _described(numbers: nnx.State) -> str:
  """Which parameters Muon trains and which Adam, one line for the parameters of all layers that have the same name."""
  by_optimizer = {"Muon": {}, "Adam": {}}
  for path, x in jax.tree_util.tree_leaves_with_path(numbers, is_leaf=_is_dimension_numbers):
    name = re.sub(r"layers_\d+", "layers_*", "/".join(_names(path)))
    by_optimizer["Adam" if x is None else "Muon"][name] = x
  lines = [f"Muon orthogonalises {', '.join(by_optimizer['Muon'])}.", f"Adam trains {', '.join(by_optimizer['Adam'])}."]
  return "\n".join(lines)
