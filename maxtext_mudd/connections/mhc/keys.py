"""The keys of mHC, and the sizes that they do not allow. Imports neither JAX nor MaxText."""

import math
from typing import Literal

from maxtext_mudd.connections.keys import key
from maxtext_mudd.connections.multi_stream import StreamsKeys

MOST_PERMUTED_STREAMS = 5  # 120 permutations; six streams would need 720 logits for each token and sublayer
_SINKHORN = {"mudd_mhc_mixing": ("deepseek", "megatron", "lite")}


class ManifoldKeys(StreamsKeys):
  """The keys of `depth_connection=mhc`."""

  mudd_mhc_mixing: Literal["deepseek", "megatron", "lite", "permutations"] = key(
    "deepseek",
    "What makes mixing matrices doubly stochastic: Sinkhorn steps as in the named code (megatron: at d98e8a6), or "
    "permutations, mHC-lite's convex sum of all n! permutations.",
  )
  mudd_mhc_steps: int = key(20, "Sinkhorn steps.", needs=_SINKHORN, ge=1)
  mudd_mhc_epsilon: float = key(
    1e-6,
    "What is added to the sums of Sinkhorn steps, to A_pre (deepseek) and to the weights of the weighted end, or the "
    "smallest sum (megatron).",
    ge=0,
    allow_inf_nan=False,
  )
  mudd_mhc_alpha_init: float = key(0.01, "Initial value of the scales of the dynamic logits.", allow_inf_nan=False)
  mudd_mhc_phi_init: Literal["fan_in", "normal", "zero"] = key(
    "fan_in", "How φ starts: N(0, 1/(nD)) as in MaxText, N(0, 0.02²) as in transformers, or zero as in mHC-lite."
  )
  mudd_mhc_bias_init: Literal["zero", "identity"] = key(
    "zero",
    "How the static logits start: zero, so that all streams are read, mixed and written alike; or identity, as in "
    "mHC-lite: each sublayer reads one stream with weight 0.73, the others with 0.27, and streams hardly mix.",
  )
  mudd_mhc_end: Literal["weighted", "sum", "mean"] = key(
    "weighted", "What the streams become behind the last block: a sum with weights of every token, their sum, or mean."
  )


def mixing_logits(config) -> int:
  """Number of logits of one mixing matrix: n², or n! where it is a sum of permutations."""
  n = config.mudd_expansion_rate
  return math.factorial(n) if config.mudd_mhc_mixing == "permutations" else n * n


def has_norm_scale(config) -> bool:
  """Whether the norm of the streams has a learned scale. The other codes have it in φ."""
  return config.mudd_mhc_mixing in ("lite", "permutations")


def check_sizes(config) -> None:
  """Raises ValueError for numbers of streams that cannot be mixed, for initial values that never learn, and for an ε
  that nothing reads. `config` has `ManifoldKeys`."""
  if config.mudd_mhc_phi_init == "zero" and (config.mudd_mhc_bias_init == "zero" or config.mudd_mhc_alpha_init == 0):
    raise ValueError(
      f"mudd_mhc_phi_init=zero with mudd_mhc_bias_init={config.mudd_mhc_bias_init} and mudd_mhc_alpha_init="
      f"{config.mudd_mhc_alpha_init} has no gradient by which streams could part; use mudd_mhc_phi_init=fan_in, or "
      "mudd_mhc_bias_init=identity with another mudd_mhc_alpha_init than 0."
    )
  default = ManifoldKeys.model_fields["mudd_mhc_epsilon"].default
  if has_norm_scale(config) and config.mudd_mhc_end != "weighted" and config.mudd_mhc_epsilon != default:
    raise ValueError(
      f"mudd_mhc_epsilon={config.mudd_mhc_epsilon} does nothing with mudd_mhc_mixing={config.mudd_mhc_mixing} and "
      f"mudd_mhc_end={config.mudd_mhc_end}; leave it at {default}."
    )
  n = config.mudd_expansion_rate
  if n < 2:
    raise ValueError(f"mudd_expansion_rate={n} leaves mhc no streams to mix; use at least 2.")
  if config.mudd_mhc_mixing == "permutations" and n > MOST_PERMUTED_STREAMS:
    raise ValueError(
      f"mudd_expansion_rate={n} with mudd_mhc_mixing=permutations needs {math.factorial(n)} logits for each token and "
      f"sublayer; use at most {MOST_PERMUTED_STREAMS} streams, or mudd_mhc_mixing=deepseek."
    )
