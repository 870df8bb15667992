"""Facts about JAX devices: their name, memory, and the peak speed that MFU is a share of."""

import os
import platform

# Dense bfloat16 TFLOP/s by JAX's device_kind, as the manufacturers state them. MFU is unknown for other kinds, even for
# other forms of the same chip: the PCIe forms are slower.
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
  """Peak TFLOP/s of a device; None if it is unknown or the model does not compute in bfloat16."""
  return PEAK_TFLOPS.get(kind) if dtype == "bfloat16" else None


def memory_bytes(device) -> int | None:
  """Bytes of memory that programs can use on a device; for a CPU device, its share of the machine's memory."""
  limit = (device.memory_stats() or {}).get("bytes_limit")
  if limit is None and device.platform == "cpu":
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // device.client.device_count()
  return limit


def peak_bytes(device) -> int | None:
  """The most bytes that this process has held on a device so far, as the device reports them; None if it does not."""
  return (device.memory_stats() or {}).get("peak_bytes_in_use")


def describe(devices) -> str:
  """The devices in words, for tables."""
  first = devices[0]
  if first.platform != "cpu":
    return f"{len(devices)} × {first.device_kind}"
  return f"CPU ({platform.machine()}, {os.cpu_count()} cores, {len(devices)} JAX device{'s'[: len(devices) - 1]})"
