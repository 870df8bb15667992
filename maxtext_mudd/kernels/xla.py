"""The passes of `mix` in plain JAX, for every platform and dtype: Eqs. 5 and 6 of the paper and their derivatives.

The derivatives are written by hand: JAX's automatic derivative takes 1.4 times as long on a CPU.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxtext_mudd.kernels.operands import Buffer, Gradients, Pending, Sources
from maxtext_mudd.kernels.weights import (
  Activations,
  ChannelWeights,
  HiddenLayer,
  WeightMLP,
  Weights,
  accumulation_dtype,
  bounded,
  hidden_gradients,
  hidden_layer,
  map_columns,
  product,
  with_hidden,
)

# A pass over a buffer reads the smallest of several prefixes that holds all valid entries. There are at most PARTS
# prefixes, and their lengths differ by at least SMALLEST_PART entries: with more, compiling is slow and traffic hardly
# falls.
PARTS, SMALLEST_PART = 4, 8


def forward(sources: Sources, weights: Weights, whole_buffers: bool = False) -> list[Float[Array, "B T D"]]:
  """x^c = sum_j W[..., c, j] * X_j (Eq. 5), summed in float32 or wider, rounded once. Of a buffer, sums over its valid
  entries."""
  if isinstance(sources, Buffer):
    buffer = sources
    return _on_shortest_prefix(buffer, lambda size: forward(*_valid(buffer, weights, size)), whole_buffers)
  w, _ = token_weights(sources, weights)
  streams = []
  # Each stream is a sum of its own. With one array [B,T,C,D] for all streams, a train step on a CPU takes 1.1 to 1.2
  # times as long: XLA writes the array, then copies the streams out of it.
  for c in range(w.shape[2]):
    total = sum(_weights_of_source(w, weights, c, j, x.shape[-1]) * x.astype(w.dtype) for j, x in enumerate(sources))
    streams.append(total.astype(sources[-1].dtype))
  return streams


def backward(
  sources: Sources,
  weights: Weights,
  gradients: Sequence[Float[Array, "B T D"]],
  near: Sequence[int] | None,
  totals: Sequence[Float[Array, "B T D"]] | Float[Array, "S B T D"] | None = None,
  recompute: Weights | None = None,
  keep_hidden: bool = False,
  whole_buffers: bool = False,
) -> Gradients:
  """Gradients of the near sources, or of the entries of a buffer, and of the weights; arguments as in
  `Passes.backward`."""
  if isinstance(sources, Buffer):
    return _backward_buffer(sources, weights, gradients, totals, whole_buffers)
  w, hidden = token_weights(sources, weights)
  dtype = w.dtype
  grad_streams = [x.astype(dtype) for x in gradients]
  grad_near = []
  for k, j in enumerate(near):
    total = _source_gradient(w, weights, grad_streams, j)
    grad_near.append(total if totals is None else total + totals[k].astype(dtype))
  grad_w = _token_gradients(sources, weights, grad_streams)
  grad_weights, grad_newest = _weight_gradients(sources, weights, hidden, grad_streams, grad_w)
  if grad_newest is not None:
    grad_near[-1] += grad_newest
  return Gradients(
    [x.astype(sources[-1].dtype) for x in grad_near],
    grad_weights,
    hidden.value.astype(sources[-1].dtype) if keep_hidden and hidden is not None else None,
    None if recompute is None else forward(sources, recompute),
  )


def push(
  pushed: Sequence[Pending], totals: Sequence[Float[Array, "B T D"]] | None, count: int
) -> list[Float[Array, "B T D"]]:
  """Adds what several aggregates contribute to the gradients of `count` sources; arguments as in `Passes.push`."""
  dtype = pushed[0].gradients[0].dtype
  sum_dtype = accumulation_dtype(dtype)
  terms = [
    (
      token_weights(aggregate.gradients, aggregate.weights)[0],
      aggregate.weights,
      [x.astype(sum_dtype) for x in aggregate.gradients],
    )
    for aggregate in pushed
  ]
  sums = [sum(_source_gradient(*term, j) for term in terms) for j in range(count)]
  if totals is not None:
    sums = [x + total.astype(sum_dtype) for x, total in zip(sums, totals)]
  return [x.astype(dtype) for x in sums]


def _backward_buffer(
  buffer: Buffer,
  weights: Weights,
  gradients: Sequence[Float[Array, "B T D"]],
  totals: Float[Array, "S B T D"] | None,
  whole_buffers: bool,
) -> Gradients:
  """`backward` over the valid entries of a buffer."""
  if totals is None:
    totals = jnp.zeros_like(buffer.entries)

  def on_prefix(size):
    sources, prefix_weights = _valid(buffer, weights, size)
    grads = backward(sources, prefix_weights, gradients, near=range(size), totals=list(totals[:size]))
    grad_weights, grad_newest = grads.weights, None
    if isinstance(weights, WeightMLP) and weights.newest is None:
      grad_newest, grad_weights = grad_weights.newest, dataclasses.replace(grad_weights, newest=None)
    after_prefix = len(buffer.entries) - size
    is_valid = jnp.arange(size) < buffer.count

    def pad_columns(x):
      return jnp.pad(jnp.where(is_valid, x, 0), [(0, 0)] * (x.ndim - 1) + [(0, after_prefix)])

    # `where` selects the valid entries. Zero weights alone would not do: zero times a gradient that is inf is NaN.
    sums = [jnp.where(is_valid[j], x, totals[j]) for j, x in enumerate(grads.sources)]
    sums = jax.lax.dynamic_update_slice_in_dim(totals, jnp.stack(sums), 0, 0)
    if grad_newest is not None:
      total = jax.lax.dynamic_index_in_dim(sums, buffer.count - 1, keepdims=False) + grad_newest.astype(sums.dtype)
      sums = jax.lax.dynamic_update_index_in_dim(sums, total, buffer.count - 1, 0)
    return Gradients(sums, map_columns(grad_weights, pad_columns))

  return _on_shortest_prefix(buffer, on_prefix, whole_buffers)


def token_weights(
  sources: Sequence[Float[Array, "B T D"]], weights: Weights
) -> tuple[Float[Array, "B T C N"], Activations | None]:
  """W of every token, in float32 or wider; of `ChannelWeights` w [B,T,C,H,N]; and the hidden layer of a `WeightMLP`,
  None for other weights."""
  shape, dtype = sources[-1].shape, sources[-1].dtype
  sum_dtype = accumulation_dtype(dtype)
  if isinstance(weights, ChannelWeights):
    return weights.w.astype(sum_dtype), None
  if not isinstance(weights, WeightMLP | HiddenLayer):
    return jnp.broadcast_to(weights.astype(sum_dtype), (*shape[:2], *weights.shape[-2:])), None
  hidden = None
  if isinstance(weights, WeightMLP):
    hidden = hidden_layer(_newest(sources, weights), weights.w1, weights.activation, weights.epsilon)
    weights = with_hidden(weights, hidden.value.astype(dtype))
  dynamic, *_ = bounded(_dynamic(weights, dtype), weights.scale, weights.cap)
  return dynamic + weights.a.astype(sum_dtype), hidden


def _dynamic(weights: HiddenLayer, dtype) -> Float[Array, "B T C N"]:
  return product(weights.hidden, weights.w2.astype(dtype), 2, 0)


def _token_gradients(sources, weights: Weights, grad_streams) -> Float[Array, "B T C N"] | Float[Array, "B T C H N"]:
  """The gradient of what `token_weights` returns."""
  heads = weights.w.shape[3:4] if isinstance(weights, ChannelWeights) else ()

  def of_source(gradient, x):
    product = gradient * x.astype(gradient.dtype)
    return product.reshape(*product.shape[:2], *heads, -1).sum(-1)

  return jnp.stack([jnp.stack([of_source(g, x) for x in sources], -1) for g in grad_streams], 2)


def _weight_gradients(sources, weights: Weights, hidden: Activations | None, grad_streams, grad_w):
  """The gradient of the weights; and that of the newest source through a `WeightMLP`, None for other weights."""
  if isinstance(weights, ChannelWeights):
    grad_a = None
    if weights.a is not None:
      by_stream = [jnp.stack([jnp.sum(g * x.astype(g.dtype), (0, 1)) for x in sources], -1) for g in grad_streams]
      grad_a = jnp.stack(by_stream)
    return ChannelWeights(grad_w, grad_a), None
  if not isinstance(weights, WeightMLP | HiddenLayer):
    return (grad_w if weights.ndim == 4 else grad_w.sum((0, 1))), None
  dtype = sources[-1].dtype
  value = weights.hidden if hidden is None else hidden.value.astype(dtype)
  grad_a, grad_scale = grad_w.sum((0, 1)), None
  if weights.cap is not None:
    of_hidden = weights if hidden is None else with_hidden(weights, value)
    _, slope, by_scale = bounded(_dynamic(of_hidden, dtype), weights.scale, weights.cap)
    grad_scale = None if weights.scale is None else (grad_w * by_scale).sum((0, 1))
    grad_w = grad_w * slope
  grad_w2 = product(value.astype(grad_w.dtype), grad_w, (0, 1), (0, 1))
  grad_hidden = product(grad_w, weights.w2.astype(value.dtype).astype(grad_w.dtype), (2, 3), (1, 2))
  if hidden is None:
    return dataclasses.replace(weights, hidden=grad_hidden, w2=grad_w2, a=grad_a, scale=grad_scale), None
  newest = _newest(sources, weights)
  grad_newest, grad_w1 = hidden_gradients(newest, weights.w1, hidden, grad_hidden)
  grad_weights = dataclasses.replace(weights, w1=grad_w1, w2=grad_w2, a=grad_a, scale=grad_scale)
  if weights.newest is None:
    return grad_weights, grad_newest
  return dataclasses.replace(grad_weights, newest=grad_newest.astype(newest.dtype)), None


def _newest(sources, weights: WeightMLP) -> Float[Array, "B T D"]:
  return sources[weights.source] if weights.newest is None else weights.newest


def _source_gradient(
  w: Float[Array, "B T C N"], weights: Weights, grad_streams: Sequence[Float[Array, "B T D"]], j: int
) -> Float[Array, "B T D"]:
  """What the gradients of the streams of one aggregate contribute to the gradient of source j."""
  return sum(_weights_of_source(w, weights, c, j, x.shape[-1]) * x for c, x in enumerate(grad_streams))


def _weights_of_source(
  w, weights: Weights, c: int, j: int, width: int
) -> Float[Array, "B T 1"] | Float[Array, "B T D"]:
  """The weights of one source in one stream, from those of `token_weights`."""
  if not isinstance(weights, ChannelWeights):
    return w[:, :, c, j, None]
  of_channels = w[:, :, c, :, j]
  if of_channels.shape[-1] > 1:
    of_channels = jnp.repeat(of_channels, width // of_channels.shape[-1], axis=-1)
  return of_channels if weights.a is None else of_channels + weights.a[c, :, j].astype(w.dtype)


def _valid(buffer: Buffer, weights: Weights, size: int) -> tuple[list[Float[Array, "B T D"]], Weights]:
  """The first `size` entries as sources, and their weights, with zeros where an entry is not valid.

  Invalid values are replaced by zero, not multiplied by it, so that neither NaN nor a gradient gets through.
  """
  is_valid = jnp.arange(size) < buffer.count
  sources = [jnp.where(is_valid[j], x, 0) for j, x in enumerate(buffer.entries[:size])]
  weights = map_columns(weights, lambda x: jnp.where(is_valid, x[..., :size], 0))
  if isinstance(weights, WeightMLP) and weights.newest is None:
    weights = dataclasses.replace(weights, newest=buffer.newest)
  return sources, weights


def _on_shortest_prefix(buffer: Buffer, function: Callable, whole_buffers: bool):
  """Calls `function` with the length of the shortest prefix of the buffer that holds all valid entries."""
  entries = len(buffer.entries)
  if whole_buffers:
    return function(entries)
  part = max(-(-entries // PARTS), SMALLEST_PART)
  sizes = [min(size, entries) for size in range(part, entries + part, part)]
  return jax.lax.switch((buffer.count - 1) // part, [lambda size=size: function(size) for size in sizes])
