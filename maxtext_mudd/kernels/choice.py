"""Which implementation an `implementation` stands for."""

from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "xla", "pallas", "pallas_interpret")
DTYPES = ("bfloat16", "float32")  # that the fused kernel takes

# Interpreted as strictly as can be: what the kernel never wrote reads as NaN, and races are looked for.
STRICTLY = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True, out_of_bounds_reads="uninitialized")


def is_fused(implementation: str, platform: str, dtype) -> bool:
  """Whether the fused kernel is meant; "auto" means it on TPU, for dtypes that it takes."""
  if implementation == "auto":
    return platform == "tpu" and jnp.dtype(dtype).name in DTYPES
  return implementation.startswith("pallas")


def interpretation(implementation: str):
  """How Pallas interprets the kernel inside a model; False: it is compiled. Not `STRICTLY`, which calls back to Python:
  `jax.checkpoint` does not take that."""
  return implementation == "pallas_interpret"
