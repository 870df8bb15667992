"""Mixing in depth in float64 NumPy, written from Eqs. 5 and 6 and their derivatives; shares no code with the package.

Weights are a dict of arrays by name, in one of five forms:

  array [B,T,C,N]                              of every token
  w [B,T,C,1,N], a [C,D,N]                     of every token, and of every channel
  a [C,N]                                      static
  a [C,N], w2 [K,C,N], hidden [B,T,K]          of a hidden layer
  a [C,N], w2 [K,C,N], w1 [D,K]                of an MLP on a source, or on `newest` [B,T,D], where there is that, too
  and scale [C,N]                              where the dynamic weights are bounded
"""

from typing import NamedTuple

import numpy as np
import scipy.special


class Mixed(NamedTuple):
  """What mixing makes.

  Attributes:
    streams: [C,B,T,D].
    sources: gradients [N,B,T,D] of the sources; zero for those that are not valid.
    weights: gradients by name; zero for sources that are not valid.
    hidden: the hidden layer [B,T,K] of an MLP, or None.
  """

  streams: np.ndarray
  sources: np.ndarray
  weights: dict[str, np.ndarray]
  hidden: np.ndarray | None


def mix(sources, weights: dict, cotangents, count=None, source=-1, activation="gelu", epsilon=1e-6, cap=None) -> Mixed:
  """The streams of N sources, and gradients of the inner products of the streams with `cotangents`.

  Args:
    count: the number of valid sources, the first ones; None: all.
    source: index of the source that an MLP reads.
    cap: dynamic weights W are replaced by scale · cap · tanh(W / cap).
  """
  number = len(sources)
  valid = number if count is None else int(count)
  x = np.stack([_wide(x) for x in sources[:valid]])
  to_streams = np.stack([_wide(x) for x in cotangents])
  weights = {name: _wide(value) for name, value in weights.items()}
  weights |= {name: weights[name][..., :valid] for name in ("array", "a", "w", "w2", "scale") if name in weights}
  hidden = None
  if "w1" in weights:
    newest = weights.get("newest", x[source])
    norm = np.sqrt(np.mean(newest**2, -1, keepdims=True) + epsilon)
    normed = newest / norm
    hidden, slope = ACTIVATIONS[activation](normed @ weights["w1"])
  # Eq. 5: x^c = sum_j W_cj X_j
  w = _token_weights(weights, hidden, x.shape[1:3], cap)
  streams = np.einsum("btcn,nbtd->cbtd", w, x, optimize=True)
  to_x = np.einsum("btcn,cbtd->nbtd", w, to_streams, optimize=True)
  if "w" in weights:
    streams += np.einsum("cdn,nbtd->cbtd", weights["a"], x, optimize=True)
    to_x += np.einsum("cdn,cbtd->nbtd", weights["a"], to_streams, optimize=True)
  to_w = np.einsum("cbtd,nbtd->btcn", to_streams, x, optimize=True)
  to_weights = {"array": to_w} if "array" in weights else {"a": to_w.sum((0, 1))}
  if "w" in weights:
    to_weights = {"w": to_w[:, :, :, None], "a": np.einsum("cbtd,nbtd->cdn", to_streams, x, optimize=True)}
  if "w2" in weights:
    value = weights["hidden"] if hidden is None else hidden
    if cap is not None:
      share = np.tanh(np.tensordot(value, weights["w2"], 1) / cap)
      if "scale" in weights:
        to_weights["scale"] = (to_w * cap * share).sum((0, 1))
      to_w = to_w * weights.get("scale", 1) * (1 - share**2)
    to_weights["w2"] = np.einsum("btk,btcn->kcn", value, to_w, optimize=True)
    to_hidden = np.einsum("btcn,kcn->btk", to_w, weights["w2"], optimize=True)
    if hidden is None:
      to_weights["hidden"] = to_hidden
    else:
      to_pre_activation = slope * to_hidden
      to_weights["w1"] = np.einsum("btd,btk->dk", normed, to_pre_activation, optimize=True)
      to_normed = to_pre_activation @ weights["w1"].T
      to_newest = (to_normed - normed * np.mean(to_normed * normed, -1, keepdims=True)) / norm
      if "newest" in weights:
        to_weights["newest"] = to_newest
      else:
        to_x[source] += to_newest

  def whole(gradient, axis):
    missing = [(0, 0)] * gradient.ndim
    missing[axis] = (0, number - valid)
    return np.pad(gradient, missing)

  to_weights |= {name: whole(to_weights[name], -1) for name in ("array", "a", "w", "w2", "scale") if name in to_weights}
  return Mixed(streams, whole(to_x, 0), to_weights, hidden)


def push(pushed) -> np.ndarray:
  """Gradients [N,B,T,D] of N sources through the streams of several aggregates, whose weights are no MLPs.

  Args:
    pushed: pairs of the gradients of an aggregate's streams and its weights, and the cap of dynamic weights if any.
  """
  total = 0
  for cotangents, weights, *cap in pushed:
    to_streams = np.stack([_wide(x) for x in cotangents])
    weights = {name: _wide(value) for name, value in weights.items()}
    w = _token_weights(weights, None, to_streams.shape[1:3], *cap)
    total = total + np.einsum("btcn,cbtd->nbtd", w, to_streams, optimize=True)
  return total


def _token_weights(weights: dict, hidden, tokens, cap=None) -> np.ndarray:
  """W [B,T,C,N]. Eq. 6: W = act(RMSNorm(newest) W1) W2 + a."""
  if "array" in weights:
    return weights["array"]
  if "w" in weights:
    return weights["w"][:, :, :, 0]
  static = np.broadcast_to(weights["a"], (*tokens, *weights["a"].shape))
  if "w2" not in weights:
    return static
  dynamic = np.tensordot(weights["hidden"] if hidden is None else hidden, weights["w2"], 1)
  return static + (dynamic if cap is None else weights.get("scale", 1) * cap * np.tanh(dynamic / cap))


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
