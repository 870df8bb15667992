"""The passes of `mix` in plain JAX: Eqs. 5 and 6 of the paper and their derivatives, for every platform and dtype.

The backward pass is written by hand: JAX's automatic derivative takes 1.4 times as long on a CPU.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxtext_mudd.kernels.operands import Buffer, Gradients, Pending
from maxtext_mudd.kernels.weights import (
  Activations,
  HiddenLayer,
  WeightMLP,
  Weights,
  accumulation_dtype,
  hidden_gradients,
  hidden_layer,
  map_columns,
  product,
)

# A buffer is read as one of at most PARTS prefixes, in steps of at least SMALLEST_PART entries: more of them save
# little traffic and take long to compile.
PARTS, SMALLEST_PART = 4, 8


def forward(sources: Sequence[Float[Array, "B T D"]], weights: Weights) -> list[Float[Array, "B T D"]]:
  """x^c = sum_j W[..., c, j] * X_j (Eq. 5), summed in float32 or wider, rounded once."""
  w, _ = token_weights(sources, weights)
  streams = []
  # One sum for each stream. As one array [B,T,C,D], they made a train step on a CPU take 1.1 to 1.2 times as
  # long: XLA writes the array, then copies the streams out of it.
  for c in range(w.shape[2]):
    total = sum(w[:, :, c, j, None] * x.astype(w.dtype) for j, x in enumerate(sources))
    streams.append(total.astype(sources[-1].dtype))
  return streams


def backward(
  sources: Sequence[Float[Array, "B T D"]],
  weights: Weights,
  gradients: Sequence[Float[Array, "B T D"]],
  near: Sequence[int],
  totals: Sequence[Float[Array, "B T D"]] | None = None,
  recompute: Weights | None = None,
  keep_hidden: bool = False,
) -> Gradients:
  """Gradients of the sources `near` and of the weights; arguments as of `passes.backward`."""
  w, hidden = token_weights(sources, weights)
  wide = w.dtype
  to_streams = [x.astype(wide) for x in gradients]
  to_near = []
  for k, j in enumerate(near):
    total = _source_gradient(w, to_streams, j)
    to_near.append(total if totals is None else total + totals[k].astype(wide))
  to_w = jnp.stack([jnp.stack([jnp.sum(g * x.astype(wide), -1) for x in sources], -1) for g in to_streams], -2)
  to_weights, to_newest = _weight_gradients(sources, weights, hidden, to_w)
  if to_newest is not None:
    to_near[-1] += to_newest
  return Gradients(
    [x.astype(sources[-1].dtype) for x in to_near],
    to_weights,
    hidden.value.astype(sources[-1].dtype) if keep_hidden and hidden is not None else None,
    None if recompute is None else forward(sources, recompute),
  )


def push(
  pushed: Sequence[Pending], totals: Sequence[Float[Array, "B T D"]] | None, count: int
) -> list[Float[Array, "B T D"]]:
  """Adds the gradients that several aggregates send to `count` sources; arguments as of `passes.push`."""
  dtype = pushed[0].gradients[0].dtype
  wide = accumulation_dtype(dtype)
  terms = [(token_weights(one.gradients, one.weights)[0], [x.astype(wide) for x in one.gradients]) for one in pushed]
  sums = [sum(_source_gradient(w, to_streams, j) for w, to_streams in terms) for j in range(count)]
  if totals is not None:
    sums = [x + total.astype(wide) for x, total in zip(sums, totals)]
  return [x.astype(dtype) for x in sums]


def forward_buffer(buffer: Buffer, weights: Weights) -> list[Float[Array, "B T D"]]:
  """`forward` of the valid entries of a buffer."""

  def part(size):
    return forward(*_valid(buffer, weights, size))

  return _on_smallest_part(buffer, part)


def backward_buffer(
  buffer: Buffer, weights: Weights, gradients: Sequence[Float[Array, "B T D"]], totals: Float[Array, "S B T D"] | None
) -> Gradients:
  """`backward` of the valid entries of a buffer; arguments as of `passes.backward`."""
  if totals is None:
    totals = jnp.zeros_like(buffer.entries)

  def part(size):
    sources, columns = _valid(buffer, weights, size)
    made = backward(sources, columns, gradients, near=range(size), totals=list(totals[:size]))
    to_weights, to_newest = made.weights, None
    if isinstance(weights, WeightMLP) and weights.newest is None:
      to_newest, to_weights = to_weights.newest, dataclasses.replace(to_weights, newest=None)
    missing = len(buffer.entries) - size
    is_valid = jnp.arange(size) < buffer.count

    def whole(x):
      return jnp.pad(jnp.where(is_valid, x, 0), [(0, 0)] * (x.ndim - 1) + [(0, missing)])

    # Where a gradient is not finite, zero weights make NaN of it.
    sums = [jnp.where(is_valid[j], x, totals[j]) for j, x in enumerate(made.sources)]
    sums = totals.at[:size].set(jnp.stack(sums))
    if to_newest is not None:
      sums = sums.at[buffer.count - 1].add(to_newest.astype(sums.dtype))
    return Gradients(sums, map_columns(to_weights, whole))

  return _on_smallest_part(buffer, part)


def token_weights(
  sources: Sequence[Float[Array, "B T D"]], weights: Weights
) -> tuple[Float[Array, "B T C N"], Activations | None]:
  """(W of every token, in float32 or wider; the hidden layer where it is made here)."""
  shape, dtype = sources[-1].shape, sources[-1].dtype
  wide = accumulation_dtype(dtype)
  if not isinstance(weights, WeightMLP | HiddenLayer):
    return jnp.broadcast_to(weights.astype(wide), (*shape[:2], *weights.shape[-2:])), None
  hidden = None
  if isinstance(weights, WeightMLP):
    hidden = hidden_layer(_newest(sources, weights), weights.w1, weights.activation, weights.epsilon)
    weights = HiddenLayer(hidden.value.astype(dtype), weights.w2, weights.a)
  return product(weights.hidden, weights.w2.astype(dtype), 2, 0) + weights.a.astype(wide), hidden


def _weight_gradients(sources, weights: Weights, hidden: Activations | None, to_w: Float[Array, "B T C N"]):
  """(gradient of the weights; that of the newest source through them, None: there is none)."""
  if not isinstance(weights, WeightMLP | HiddenLayer):
    return (to_w if weights.ndim == 4 else to_w.sum((0, 1))), None
  value = weights.hidden if hidden is None else hidden.value.astype(sources[-1].dtype)
  to_w2 = product(value.astype(to_w.dtype), to_w, (0, 1), (0, 1))
  to_hidden = product(to_w, weights.w2.astype(value.dtype).astype(to_w.dtype), (2, 3), (1, 2))
  to_a = to_w.sum((0, 1))
  if hidden is None:
    return HiddenLayer(to_hidden, to_w2, to_a), None
  newest = _newest(sources, weights)
  to_newest, to_w1 = hidden_gradients(newest, weights.w1, hidden, to_hidden)
  to_weights = dataclasses.replace(weights, w1=to_w1, w2=to_w2, a=to_a)
  if weights.newest is None:
    return to_weights, to_newest
  return dataclasses.replace(to_weights, newest=to_newest.astype(newest.dtype)), None


def _newest(sources, weights: WeightMLP) -> Float[Array, "B T D"]:
  return sources[weights.source] if weights.newest is None else weights.newest


def _source_gradient(
  w: Float[Array, "B T C N"], to_streams: Sequence[Float[Array, "B T D"]], j: int
) -> Float[Array, "B T D"]:
  """[B,T,D], what the gradients of the streams of one aggregate add to that of source j."""
  return sum(w[:, :, c, j, None] * x for c, x in enumerate(to_streams))


def _valid(buffer: Buffer, weights: Weights, size: int) -> tuple[list[Float[Array, "B T D"]], Weights]:
  """The first `size` entries as sources, and their weights; zeros where an entry is not valid.

  What is not valid is replaced by zero, not multiplied by it: neither a NaN nor a gradient passes.
  """
  is_valid = jnp.arange(size) < buffer.count
  sources = [jnp.where(is_valid[j], x, 0) for j, x in enumerate(buffer.entries[:size])]
  weights = map_columns(weights, lambda x: jnp.where(is_valid, x[..., :size], 0))
  if isinstance(weights, WeightMLP) and weights.newest is None:
    weights = dataclasses.replace(weights, newest=buffer.newest)
  return sources, weights


def _on_smallest_part(buffer: Buffer, function: Callable):
  """`function` of the smallest size, in parts of the buffer, that holds all valid entries."""
  entries = len(buffer.entries)
  part = max(-(-entries // PARTS), SMALLEST_PART)
  sizes = [min(size, entries) for size in range(part, entries + part, part)]
  return jax.lax.switch((buffer.count - 1) // part, [lambda size=size: function(size) for size in sizes])
