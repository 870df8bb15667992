"""Whether a configuration fits the devices that it is for."""

import math
import re

import jax
from maxtext.utils import max_utils

from maxtext_mudd.errors import ConfigError

# What compilers, and devices, say; the TPU compiler's sizes end in G, others' in GiB.
_SIZE = r"([\d.]+ ?[KMGT]?(?:i?B|bytes)?)"
_EXCEEDED = re.compile(rf"(?:Used {_SIZE} of {_SIZE} (?:\w+). )?Exceeded (?:\w+ )?capacity by {_SIZE}")
_REQUIRED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available \w+ \(([\d.]+)([KMGT])\)")
_ALLOCATED = re.compile(rf"allocat\w+ {_SIZE}")
_FREE = re.compile(rf"{_SIZE} free")


def check_mesh(config) -> None:
  """Raises ConfigError for parallelisms whose product is not the number of devices, or of slices; and what JAX raises
  where it has no devices."""
  if config.elastic_enabled or config.subslice_shape:  # their devices are known later
    return
  if not config.compile_topology:
    jax.devices()  # MaxText's configuration takes none for one
  slices = max(config.num_slices, 1)
  _check_product(config, "ici", config.num_target_devices // slices, "device", " of a slice")
  if slices > 1:
    _check_product(config, "dcn", slices, "slice", "")


def _check_product(config, prefix: str, target: int, unit: str, where: str) -> None:
  values = getattr(config, f"{prefix}_parallelism")
  try:
    max_utils.fill_unspecified_mesh_axes(list(values), target, prefix.upper())
    return
  except AssertionError:
    pass
  given = {f"{prefix}_{axis}_parallelism": value for axis, value in zip(config.mesh_axes, values)}
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
  """One sentence if this is a compiler's or a device's refusal of a step that is too large."""
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
