"""Pads the parameters of single layers to one shape for scanned layers, and removes the padding.

All blocks of a scanned stack have parameters of one shape. Along the axes that `Family.depth_axes` names, those of a
site are padded with zeros: there is an entry for every source so far, extra embeddings first, whichever the site mixes,
and one for every stream that a site of the stack makes; hidden widths are padded at their end. Padding has a gradient
of zero and stays zero in training. So does every parameter that exists only in another block of the stack, such as LN_k
of the first block.
"""

from collections.abc import Sequence
import dataclasses

from flax import nnx
import jax.numpy as jnp
import numpy as np

from maxtext_mudd import connections
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.blocks.stacks import Stack
from maxtext_mudd.connections.base import STREAMS, Plan, Site

AGGREGATE = "depth_aggregate"  # the module of a connection to which `Family.depth_axes` applies, in parameters' paths


@dataclasses.dataclass(frozen=True)
class Table:
  """For each block of a stack, or for a single block: the site before it, and its attention norms.

  Attributes:
    blocks: numbers of the blocks.
    sites: the site before each.
    padded: one site that holds those of all blocks; for a single block, its own. Its streams may be letters of "qkvr"
      and "x" beside them. None where there are none.
    separate_norms: by block, whether it has LN_q, LN_k and LN_v.
    oldest: the oldest source of the model.
  """

  blocks: tuple[int, ...]
  sites: tuple[Site | None, ...]
  padded: Site | None
  separate_norms: tuple[bool, ...]
  oldest: int

  @property
  def makes(self) -> tuple[tuple[bool, ...], ...]:
    """By block and stream of `padded`, whether its site makes the stream."""
    return tuple(tuple(site is not None and x in site.streams for x in self.padded.streams) for site in self.sites)

  @property
  def makes_all(self) -> bool:
    """Whether all blocks read the same streams."""
    return all(map(all, self.makes))

  @property
  def visible(self) -> tuple[tuple[bool, ...], ...]:
    """By block and source, the oldest first, whether its site mixes the source."""
    sources = range(self.oldest, self.blocks[-1])
    return tuple(tuple(site is not None and j in site.sources for j in sources) for site in self.sites)


def table(plan: Plan, blocks: Sequence[int], *, padded: bool) -> Table:
  """The table of some blocks.

  Args:
    padded: whether the parameters are those of a scanned stack.
  """
  sites = tuple(plan.before(block) for block in blocks)
  there = [site for site in sites if site]
  site = there[0] if there else None
  if there and padded:
    sources = tuple(range(plan.oldest, blocks[-1]))
    streams = "".join(x for x in f"{STREAMS}x" if any(x in other.streams for other in there))
    site = Site(blocks[-1] - 1, sources, streams, max(other.hidden for other in there))
  return Table(tuple(blocks), sites, site, tuple(map(plan.has_separate_norms, blocks)), plan.oldest)


def existing_entries(config, table: Table, path: tuple[str, ...]) -> np.ndarray | None:
  """Which entries of a parameter exist.

  Args:
    path: of the parameter in its layer.

  Returns:
    [L, ...]: blocks first, axes that do not matter of size 1, or left out at the end; None: all entries exist.
  """
  norm = block_spec(config).attention_norm
  if norm in path and path[path.index(norm) + 1] in ("k", "v", "r"):
    return np.array(table.separate_norms)
  if AGGREGATE not in path:
    return None
  if table.padded is None:
    raise ValueError(f"{'/'.join(path)} is of an aggregate, and no block of the stack has one")
  axes = _axes(config, path)
  stream_modules = connections.family(config).stream_modules
  of_streams = {stream_modules[name] for name in path if name in stream_modules}
  exists = [site is not None and of_streams <= {*site.streams} for site in table.sites]
  mask = np.array(exists).reshape(-1, *(1 for _ in axes))
  for number, name in enumerate(axes):
    if name:
      padded = _size(table.padded, name)
      positions = (_positions(site, table.padded, name) for site in table.sites)
      by_block = np.stack([np.isin(np.arange(padded), there) for there in positions])
      mask = mask & by_block.reshape(len(by_block), *(padded if k == number else 1 for k in range(len(axes))))
  return mask


def pad(config, path: tuple[str, ...], value, site: Site | None, padded: Site | None):
  """The parameter of a single block as a scanned stack has it. Takes and returns NumPy or JAX arrays."""
  xp = value.__array_namespace__()
  for axis, name in _depth_axes(config, path):
    filled = xp.concat([value, xp.zeros_like(xp.take(value, xp.asarray([0]), axis=axis))], axis=axis)
    at = np.full(_size(padded, name), value.shape[axis])  # of the zeros
    at[_positions(site, padded, name)] = np.arange(value.shape[axis])
    value = xp.take(filled, xp.asarray(at), axis=axis)
  return value


def trim(config, path: tuple[str, ...], value, site: Site | None, padded: Site | None):
  """The parameter of a single block, from one entry of a scanned stack: `pad` backwards."""
  xp = value.__array_namespace__()
  for axis, name in _depth_axes(config, path):
    value = xp.take(value, xp.asarray(_positions(site, padded, name)), axis=axis)
  return value


def single_shape(
  config, path: tuple[str, ...], shape: Sequence[int], site: Site | None, padded: Site
) -> tuple[int, ...]:
  """The shape of a parameter of a single block, from its shape in one entry of a scanned stack."""
  sizes = {axis: len(_positions(site, padded, name)) for axis, name in _depth_axes(config, path)}
  return tuple(sizes.get(axis, size) for axis, size in enumerate(shape))


def by_block(config, stack: Stack, value, *, is_parameter: bool = True):
  """A parameter of a stack with its blocks first: [number of blocks, ...]. Takes and returns NumPy or JAX arrays.

  Args:
    is_parameter: whether it is stacked along `param_scan_axis`, and not, as other state is, along its first axes.
  """
  xp, axes = value.__array_namespace__(), _axes_of_stack(config, stack, value.ndim, is_parameter)
  value = xp.moveaxis(value, axes, list(range(len(axes))))
  return value if len(axes) == 1 else xp.reshape(value, (len(stack.blocks), *value.shape[len(axes) :]))


def of_stack(config, stack: Stack, values, *, is_parameter: bool = True):
  """`by_block` backwards."""
  xp = values.__array_namespace__()
  value = values if len(stack.sizes) == 1 else xp.reshape(values, (*stack.sizes, *values.shape[1:]))
  axes = _axes_of_stack(config, stack, value.ndim, is_parameter)
  return xp.moveaxis(value, list(range(len(axes))), axes)


def stacked_sizes(config, stack: Stack, shape: Sequence[int], *, is_parameter: bool = True) -> tuple[int, ...]:
  """Of the shape of a parameter, the axes along which it is stacked."""
  return tuple(shape[axis] for axis in _axes_of_stack(config, stack, len(shape), is_parameter))


def initialise(layers: nnx.Module, singles: Sequence[nnx.Module], stack: Stack, config) -> None:
  """Gives the connection of new scanned layers the values that it has in single layers, and sets to zero what does not
  exist in a block.

  Args:
    singles: the connection of each block, built for `scan_layers: false`.
  """
  whole = table(connections.plan(config), stack.blocks, padded=True)
  of_singles = [_by_path(nnx.state(single, nnx.Param)) for single in singles]
  state = nnx.state(layers, nnx.Param)
  for path, parameter in nnx.to_flat_state(state):
    path = tuple(map(str, path))
    value = by_block(config, stack, parameter.get_value())
    if path[0] == "connection":
      of_blocks = [values.get(path[1:]) for values in of_singles]  # None: the block has no site
      of_blocks = [
        jnp.zeros_like(value[0]) if x is None else pad(config, path, x, site, whole.padded)
        for x, site in zip(of_blocks, whole.sites)
      ]
      value = jnp.stack(of_blocks)
    mask = existing_entries(config, whole, path)
    if mask is not None:
      value = jnp.where(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), value, 0)
    parameter.set_value(of_stack(config, stack, value))
  nnx.update(layers, state)


def _axes_of_stack(config, stack: Stack, dimensions: int, is_parameter: bool) -> list[int]:
  """The axes along which a value of so many dimensions is stacked."""
  number = len(stack.sizes)
  if not is_parameter:
    return list(range(number))
  first = min(config.param_scan_axis, dimensions - number)
  if stack.of_stages:
    return [0, *(1 + first + k for k in range(number - 1))]
  return [first + k for k in range(number)]


def _by_path(state: nnx.State) -> dict[tuple[str, ...], jnp.ndarray]:
  return {tuple(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(state)}


def _axes(config, path: tuple[str, ...]) -> tuple[str | None, ...]:
  return connections.family(config).depth_axes.get(path[-1], ())


def _depth_axes(config, path: tuple[str, ...]) -> list[tuple[int, str]]:
  return [(axis, name) for axis, name in enumerate(_axes(config, path)) if name and AGGREGATE in path]


def _positions(site: Site | None, padded: Site, name: str) -> list[int]:
  """Where the entries of a site lie along a padded axis."""
  if site is None:
    return []
  if name == "streams":
    return [padded.streams.index(stream) for stream in site.streams]
  if name == "sources":
    return [padded.sources.index(source) for source in site.sources]
  return list(range(site.hidden))


def _size(padded: Site, name: str) -> int:
  return {"sources": len(padded.sources), "streams": padded.ways, "hidden": padded.hidden}[name]
