"""How the outputs of blocks lie on the devices of a mesh, and how aggregates run there."""

import jax
from jax.sharding import NamedSharding
from maxtext.common.common_types import ShardMode
from maxtext.utils import sharding

from maxtext_mudd import kernels


def passes(config, mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> kernels.Passes:
  """How the passes over [B,T,D] sources run on this mesh."""
  implementation = kernels.resolve(config.mudd_kernel, mesh.devices.flat[0].platform, config.dtype)
  by_compiler = implementation == "xla" and config.shard_mode != ShardMode.EXPLICIT
  return kernels.Passes(implementation, None if by_compiler else source_sharding(config, mesh, shape))


def source_sharding(config, mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> NamedSharding | None:
  """How block outputs lie on the mesh; None on one device."""
  if mesh.size == 1:
    return None
  names = ("activation_batch", "activation_norm_length", "activation_embed")
  rules = sharding.get_logical_axis_rules() or config.logical_axis_rules  # evaluation may have its own
  spec = sharding.logical_to_mesh_axes(names, mesh, rules=rules)
  return NamedSharding(mesh, sharding.adjust_pspec_for_indivisible_shapes(spec, shape, mesh))


def with_whole_width(x: jax.Array, axis: int = -1) -> jax.Array:
  """An array whose axis is whole on every device, where the axes of the mesh are explicit. With automatic ones, the
  array as it is: the compiler chooses."""
  spec = list(jax.typeof(x).sharding.spec)
  if not spec or spec[axis] is None:
    return x
  spec[axis] = None
  return jax.reshard(x, jax.P(*spec))
