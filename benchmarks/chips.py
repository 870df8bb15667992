"""What a device is, and the peak that MFU is a share of."""

import os
import platform

# Dense bfloat16 TFLOP/s by JAX's device_kind, as the makers state them. Of a form that is not here, MFU is not known:
# those for PCIe are slower.
PEAK_TFLOPS = {
  "NVIDIA H200": 989.0,
  "NVIDIA H100 80GB HBM3": 989.0,
  "NVIDIA A100-SXM4-40GB": 312.0,
  "NVIDIA A100-SXM4-80GB": 312.0,
  "TPU v5": 459.0,  # v5p
  "TPU v5p": 459.0,
  "TPU v5 lite": 197.0,  # v5e
  "TPU v5e": 197.0,
  "TPU v6 lite": 918.0,  # v6e
  "TPU v6e": 918.0,
  "TPU7x": 2307.0 / 2,  # two JAX devices a chip
}


def peak_tflops(kind: str, dtype: str) -> float | None:
  """None where it is not known, or the model does not compute in bfloat16."""
  return PEAK_TFLOPS.get(kind) if dtype == "bfloat16" else None


def memory_bytes(device) -> int | None:
  """What programs can have of it; of a CPU, the machine's memory, shared by its devices."""
  limit = (device.memory_stats() or {}).get("bytes_limit")
  if limit is None and device.platform == "cpu":
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // device.client.device_count()
  return limit


def peak_bytes(device) -> int | None:
  """The most that this process has held on it so far, by the device's own account."""
  return (device.memory_stats() or {}).get("peak_bytes_in_use")


def describe(devices) -> str:
  first = devices[0]
  if first.platform != "cpu":
    return f"{len(devices)} × {first.device_kind}"
  return f"CPU ({platform.machine()}, {os.cpu_count()} cores, {len(devices)} JAX device{'s'[: len(devices) - 1]})"
