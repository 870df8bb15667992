"""Depth-wise aggregation of a list in float64 NumPy, written from Eqs. 5 and 6 and their derivatives; shares no code
with the package."""

from typing import NamedTuple

import numpy as np
import scipy.special

EPSILON = 1e-6


class Inputs(NamedTuple):
  """As `kernels.depth_aggregate` takes them: sources N·[B,T,D], newest [B,T,D] or None, w1 [D,K] and w2 [K,C,N] or
  None, a [C,N]. Or the gradients of these."""

  sources: list
  newest: np.ndarray | None
  w1: np.ndarray | None
  w2: np.ndarray | None
  a: np.ndarray


def aggregate(inputs: Inputs, cotangents, activation: str) -> tuple[list[np.ndarray], Inputs]:
  """(the C streams, the gradients of their inner products with `cotangents`)."""
  sources = np.stack([_wide(x) for x in inputs.sources])
  to_streams = np.stack([_wide(x) for x in cotangents])
  weights = np.broadcast_to(_wide(inputs.a), (*sources.shape[1:3], *inputs.a.shape))
  # Eq. 6: W = act(RMSNorm(X_i) W1) W2 + a
  if inputs.w1 is not None:
    w1, w2 = _wide(inputs.w1), _wide(inputs.w2)
    newest = sources[-1] if inputs.newest is None else _wide(inputs.newest)
    norm = np.sqrt(np.mean(newest**2, -1, keepdims=True) + EPSILON)
    normed = newest / norm
    hidden, slope = ACTIVATIONS[activation](normed @ w1)
    weights = weights + np.tensordot(hidden, w2, 1)
  # Eq. 5: x^c = sum_j W_cj X_j
  streams = np.einsum("btcn,nbtd->cbtd", weights, sources, optimize=True)

  to_sources = np.einsum("btcn,cbtd->nbtd", weights, to_streams, optimize=True)
  to_weights = np.einsum("cbtd,nbtd->btcn", to_streams, sources, optimize=True)
  to_newest, to_w1, to_w2 = None if inputs.newest is None else np.zeros_like(sources[0]), None, None
  if inputs.w1 is not None:
    to_w2 = np.tensordot(hidden, to_weights, ((0, 1), (0, 1)))
    to_pre_activation = slope * np.tensordot(to_weights, w2, ((2, 3), (1, 2)))
    to_w1 = np.tensordot(normed, to_pre_activation, ((0, 1), (0, 1)))
    to_normed = to_pre_activation @ w1.T
    through_norm = (to_normed - normed * np.mean(to_normed * normed, -1, keepdims=True)) / norm
    if inputs.newest is None:
      to_sources[-1] += through_norm
    else:
      to_newest = through_norm
  return list(streams), Inputs(list(to_sources), to_newest, to_w1, to_w2, to_weights.sum((0, 1)))


def _wide(x) -> np.ndarray:
  return np.asarray(x).astype(np.float64)


def _gelu(z):
  """(GELU, its slope), exact."""
  below = scipy.special.ndtr(z)
  return z * below, below + z * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)


def _gelu_tanh(z):
  inner = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
  to_inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
  t = np.tanh(inner)
  return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t**2) / 2 * to_inner


ACTIVATIONS = {"gelu": _gelu, "gelu_tanh": _gelu_tanh}
