"""How the outputs of blocks lie on the devices of a mesh, and how aggregates run there."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float
from maxtext.common.common_types import ShardMode
from maxtext.utils import sharding

from maxtext_mudd import kernels
from maxtext_mudd.blocks.stacks import num_stages


def passes(config, mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> kernels.Passes:
  """How the passes over [B,T,D] sources run on this mesh."""
  implementation = kernels.resolve(config.mudd_kernel, mesh.devices.flat[0].platform, config.dtype)
  by_compiler = implementation == "xla" and config.shard_mode != ShardMode.EXPLICIT
  in_pipeline = num_stages(config) > 1
  return kernels.Passes(
    implementation, None if by_compiler else source_sharding(config, mesh, shape), whole_buffers=in_pipeline
  )


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


def contract(equation: str, x: jax.Array, w: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
  """`jnp.einsum` of activations x and parameters w, accumulated in `dtype`.

  Where the axes of the mesh are explicit and a summed axis of x is split, each device multiplies its part of x by the
  part of w for it, and the products are added.
  """
  spec = jax.typeof(x).sharding.spec
  if not any(spec):
    return jnp.einsum(equation, x, w, preferred_element_type=dtype)
  of_x, of_w, of_result = equation.replace("->", ",").split(",")
  axes = dict(zip(of_x, spec))
  part = jax.reshard(w, jax.P(*(axes.get(axis) for axis in of_w)))
  sharding = jax.P(*(axes.get(axis) for axis in of_result))
  return jnp.einsum(equation, x, part, preferred_element_type=dtype, out_sharding=sharding)


def split_as(w: jax.Array, axis: int, x: Float[Array, "B T D"]) -> jax.Array:
  """A parameter whose `axis` is split over the devices as the width of x, where the axes of the mesh are explicit."""
  spec = jax.typeof(x).sharding.spec
  return jax.reshard(w, jax.P(*(spec[-1] if i == axis else None for i in range(w.ndim)))) if any(spec) else w
