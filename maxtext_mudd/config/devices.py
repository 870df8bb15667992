"""Checks a configuration against its devices: the mesh, the batch, and the memory of a step."""

from collections.abc import Sequence
import math
import re

import jax
from maxtext.utils import max_utils, sharding

from maxtext_mudd.config.errors import ConfigError

# Messages of compilers and devices. Sizes end in G in those of the TPU compiler, and in GiB in others.
_SIZE = r"([\d.]+ ?[KMGT]?(?:i?B|bytes)?)"
_EXCEEDED = re.compile(rf"(?:Used {_SIZE} of {_SIZE} (?:\w+). )?Exceeded (?:\w+ )?capacity by {_SIZE}")
_REQUIRED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available \w+ \(([\d.]+)([KMGT])\)")
_ALLOCATED = re.compile(rf"allocat\w+ {_SIZE}")
_FREE = re.compile(rf"{_SIZE} free")
_BATCHES = (  # the key per device, and the fields that MaxText derives from it
  ("per_device_batch_size", "global_batch_size_to_load", "micro_batch_size_to_train_on"),
  ("eval_per_device_batch_size", "global_batch_size_to_load_eval", "micro_batch_size_to_eval_on"),
)


def check_mesh(config) -> None:
  """Checks the `ici_*_parallelism` and `dcn_*_parallelism` keys.

  Raises:
    ConfigError: their product is not the number of devices or of slices, or they do not divide the heads or the
      experts.
    RuntimeError: JAX finds no devices.
  """
  if _known_later(config):
    return
  if not config.compile_topology:
    jax.devices()  # raises if there are none, for which MaxText's configuration counts one device
  slices = max(config.num_slices, 1)
  _check_product(config, "ici", config.num_target_devices // slices, "device", " of a slice")
  if slices > 1:
    _check_product(config, "dcn", slices, "slice", "")
  _check_heads_and_experts(config, _mesh(config))


def check_batch(config) -> None:
  """Raises ConfigError for training batches of less than one sequence, or that the mesh cannot divide."""
  if _known_later(config):
    return
  mesh, length, devices = _mesh(config), config.max_target_length, config.num_target_devices
  batch_axes, length_axes = _axes(config, mesh, config.input_data_sharding_logical_axes)
  parts = math.prod(mesh.shape[axis] for axis in length_axes)
  _check_divided(config, mesh, length_axes, length, f"max_target_length={length}", f"use a multiple of {parts} for it")
  for key, loaded, trained in _BATCHES[: 2 if config.eval_interval > 0 else 1]:
    setting, loaded = f"{key}={getattr(config, key):g}", getattr(config, loaded)
    if not getattr(config, trained):
      raise ConfigError(f"{setting} makes less than one sequence for {devices} device(s); use 1, or a larger share.")
    if config.dataset_type.value != "synthetic" and loaded % devices:
      raise ConfigError(
        f"{setting}: the {loaded} sequences of a step cannot be divided by the {devices} devices, as "
        f"dataset_type={config.dataset_type.value} divides them; use a whole number."
      )
    stages = config.ici_pipeline_parallelism * config.dcn_pipeline_parallelism
    if stages > 1 and config.mudd:
      rows, axes = (
        getattr(config, trained) // config.num_pipeline_microbatches,
        _axes(config, mesh, ["activation_batch"]),
      )
      _check_divided(
        config, mesh, axes[0], rows, f"the {rows} sequences of a microbatch", "use fewer num_pipeline_microbatches"
      )
    loaded //= config.num_diloco_replicas if config.enable_diloco else 1
    what = f"the {loaded} sequences of {setting}"
    _check_divided(config, mesh, batch_axes, loaded, what, f"use a whole number for {key}")


def batch_parts(config) -> int:
  """Number of parts into which the mesh divides a batch. The size of a decoded batch must be a multiple of it."""
  mesh = _mesh(config)
  (axes,) = _axes(config, mesh, ("activation_batch",))
  return math.prod(mesh.shape[axis] for axis in axes)


def _known_later(config) -> bool:
  return config.elastic_enabled or bool(config.subslice_shape)


def _mesh(config) -> jax.sharding.AbstractMesh:
  """The mesh, with each -1 replaced by the size that it stands for. Call it after `check_mesh` only."""
  slices = max(config.num_slices, 1)
  devices = config.num_target_devices // slices
  sizes = max_utils.fill_unspecified_mesh_axes(list(config.ici_parallelism), devices, "ICI")
  if slices > 1:
    of_slices = max_utils.fill_unspecified_mesh_axes(list(config.dcn_parallelism), slices, "DCN")
    sizes = [x * y for x, y in zip(sizes, of_slices)]
  return jax.sharding.AbstractMesh(tuple(sizes), tuple(config.mesh_axes))


def _axes(config, mesh: jax.sharding.AbstractMesh, names: Sequence[str]) -> list[tuple[str, ...]]:
  """The mesh axes that divide each dimension with these logical names."""
  spec = sharding.logical_to_mesh_axes(tuple(names), mesh, rules=config.logical_axis_rules)
  return [sharding.mesh_axes_for_dim(axes) for axes in spec]


def _check_heads_and_experts(config, mesh: jax.sharding.AbstractMesh) -> None:
  heads, experts = config.num_kv_heads, config.num_experts
  if config.attention_type not in ("mla", "compressed") and config.ici_context_autoregressive_parallelism == 1:
    axes = _axes(config, mesh, ("embed_attn", "kv_heads", "kv_head_dim"))[1]
    what = f"the {heads} heads of keys and values (base_num_kv_heads)"
    _check_divided(config, mesh, axes, heads, what, f"use a divisor of {heads}")
  if experts > 1 and not (config.shard_exp_on_fsdp or config.use_2d_fsdp_sharding):  # these two shard experts' widths
    axes = _axes(config, mesh, ("exp", "embed_moe", "mlp_moe"))[0]
    _check_divided(config, mesh, axes, experts, f"num_experts={experts}", f"use a divisor of {experts}")


def _check_divided(
  config, mesh: jax.sharding.AbstractMesh, axes: Sequence[str], number: int, what: str, remedy: str
) -> None:
  parts = math.prod(mesh.shape[axis] for axis in axes)
  if number % parts == 0:
    return
  given = (
    (_key(prefix, axis), value)
    for prefix in ("ici", "dcn")
    for axis, value in zip(config.mesh_axes, getattr(config, f"{prefix}_parallelism"))
    if axis in axes and value != 1
  )
  named = ", ".join(f"{key}={value}" for key, value in given)
  raise ConfigError(f"{named}: {what} cannot be divided by {parts}; {remedy}.")


def _key(prefix: str, axis: str) -> str:
  return f"{prefix}_{'pipeline' if axis == 'stage' else axis}_parallelism"


def _check_product(config, prefix: str, target: int, unit: str, where: str) -> None:
  values = getattr(config, f"{prefix}_parallelism")
  try:
    max_utils.fill_unspecified_mesh_axes(list(values), target, prefix.upper())
    return
  except AssertionError:
    pass
  given = {_key(prefix, axis): value for axis, value in zip(config.mesh_axes, values)}
  fixed = {key: value for key, value in given.items() if value not in (1, -1)}
  left = [key for key, value in given.items() if value == -1]
  named = ", ".join(f"{key}={value}" for key, value in fixed.items()) or "all are 1"
  what = f"{unit}s{where}"
  if len(left) > 1:
    raise ConfigError(f"{left[0]}=-1 and {left[1]}=-1: only one axis can take the {what} that are left; set the other.")
  product = math.prod(fixed.values())
  count = f"one {unit}{where}" if target == 1 else f"{target} {what}"
  if target == 1:
    reason = f"is not the {count}; leave them at 1"
  elif left:
    reason = f"does not divide the {count}, for {left[0]}=-1 takes what is left; use divisors of {target}"
  else:
    reason = f"is not the {count}; set one of them to -1, or change them to a product of {target}"
  raise ConfigError(f"{named}: the product {product} of the mesh {reason}.")


def out_of_memory(error: Exception, config) -> str | None:
  """The sentence for a step that needs more memory than the device has; None if the error is another one."""
  if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
    return None
  message = " ".join(str(error).split())
  exceeded, allocated, free = (pattern.search(message) for pattern in (_EXCEEDED, _ALLOCATED, _FREE))
  if (required := _REQUIRED.search(message)) and required[2] == required[4]:
    excess = float(required[1]) - float(required[3])
    needs = (
      f"needs {required[1]}{required[2]} of the chip's {required[3]}{required[4]}, {excess:.2f}{required[2]} too much"
    )
  elif exceeded and exceeded[1]:
    needs = f"needs {exceeded[1]} of the chip's {exceeded[2]}, {exceeded[3]} too much"
  elif exceeded:
    needs = f"needs {exceeded[3]} more than the device has"
  elif allocated:
    needs = f"asks for {_gigabytes(allocated[1])} more{f', and {free[1]} are free' if free else ' than are free'}"
  else:
    needs = f"needs more memory than the device has ({message[:200]})"
  return (
    f"per_device_batch_size={config.per_device_batch_size:g} with max_target_length={config.max_target_length} does "
    f"not fit: the step {needs}; use a smaller batch (gradient_accumulation_steps makes up for it), remat_policy=full "
    f"(here {config.remat_policy}), or more devices to shard over."
  )


def _gigabytes(size: str) -> str:
  number = re.fullmatch(r"(\d+)(?: ?(?:bytes|B))?", size)
  return f"{int(number[1]) / 2**30:.2f}GiB" if number else size
