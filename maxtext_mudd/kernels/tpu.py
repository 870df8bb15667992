"""The three passes of the fused kernel on [B,T,D] arrays of one device: layouts outside the kernels, block sizes."""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxtext_mudd.kernels import tpu_backward, tpu_common, tpu_forward, tpu_push
from maxtext_mudd.kernels.tpu_common import Operands, Origin, Shape, repeat_columns


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is static in every pass. `interpret`: False, or how Pallas interprets the kernel."""

  activation: str
  epsilon: float
  interpret: object = False


class Weights(NamedTuple):
  """The weights of one aggregate, as in `depth_aggregate`: w1 [D,K], w2 [K,C,N], a [C,N]; or their gradients."""

  a: Float[Array, "C N"]
  w2: Float[Array, "K C N"] | None = None
  w1: Float[Array, "D K"] | None = None


class Aggregate(NamedTuple):
  """One aggregate among `sources` of a pass.

  Attributes:
    weights: its weights.
    origin: what they are made from, [B,T,D] or [B,T,K], where that is not its newest source.
    positions: its sources among those of the pass, oldest first.
  """

  weights: Weights
  origin: Origin
  positions: tuple[int, ...]


class Gradients(NamedTuple):
  """What the backward pass makes; shapes of what they are gradients of.

  Attributes:
    near: of the near sources, added to `totals`.
    newest: of `Origin.newest`, to_hidden: of `Origin.hidden`; None where there is none.
    weights: float32.
    hidden: [B,T,K], `Origin.hidden` for `push`; None where the weights are static.
    streams: of the aggregate before.
  """

  near: list
  newest: Float[Array, "B T D"] | None
  to_hidden: Float[Array, "B T K"] | None
  weights: Weights
  hidden: Float[Array, "B T K"] | None
  streams: list | None


class Sent(NamedTuple):
  """What one aggregate sends back: the gradients of its streams, and its weights. `positions` as in `Aggregate`, -1 for
  a source that is not in the pass."""

  gradients: list
  origin: Origin
  weights: Weights
  positions: tuple[int, ...]


def forward(settings: Settings, sources: Sequence[Float[Array, "B T D"]], aggregate: Aggregate) -> list:
  """The streams of one aggregate."""
  flat, lead = _flatten(sources)
  shape = _shape(settings, flat, len(flat) + aggregate.weights.a.shape[0] + 1)
  origin, _ = _flatten(aggregate.origin)
  operands = _lay_out(aggregate.weights, aggregate.positions, len(flat), shape.dtype)
  streams = tpu_forward.forward(shape, flat, origin, operands, interpret=settings.interpret)
  return _unflatten(streams, lead)


def backward(
  settings: Settings,
  sources: Sequence[Float[Array, "B T D"]],
  gradients: Sequence[Float[Array, "B T D"]],
  aggregate: Aggregate,
  near: tuple[int, ...],
  totals: Sequence[Float[Array, "B T D"]] | None = None,
  again: Aggregate | None = None,
  keep_hidden: bool = False,
) -> Gradients:
  """Gradients of the weights and of the sources `near`, which end with the newest; and the streams of `again`."""
  flat, lead = _flatten(sources)
  coming, _ = _flatten(list(gradients))
  totals, _ = _flatten(totals)
  origin, _ = _flatten(aggregate.origin)
  positions, weights = aggregate.positions, aggregate.weights
  arrays = len(flat) + len(coming) + (1 if totals is None else 2) * len(near) + 2 * (origin.newest is not None)
  arrays += 0 if again is None else again.weights.a.shape[0] + 1
  shape = _shape(settings, flat, arrays)
  full = _lay_out(weights, positions, len(flat), shape.dtype, repeat=False)
  at_near = _columns(full, near)
  whole = tpu_backward.Whole(
    near=_repeat(at_near),
    w1=None if origin.hidden is not None else full.w1,
    w2=full.w2,
    again=None if again is None else _lay_out(again.weights, again.positions, len(flat), shape.dtype),
  )
  rows = tpu_backward.Rows(totals, flat, coming, origin, None if again is None else _flatten(again.origin)[0])
  made, sums = tpu_backward.backward(
    shape,
    rows,
    whole,
    near,
    None if again is None else again.positions[-1],
    keep_hidden=keep_hidden,
    interpret=settings.interpret,
  )
  own = jnp.asarray(positions)
  return Gradients(
    near=_unflatten(made.near, lead),
    newest=_unflatten(made.newest, lead),
    to_hidden=_unflatten(made.to_hidden, lead),
    weights=Weights(
      sums.a[:, own],
      None if sums.w2 is None else jnp.transpose(sums.w2[:, :, own], (1, 0, 2)),
      None if sums.w1 is None else sums.w1[0],
    ),
    hidden=_unflatten(made.hidden, lead),
    streams=_unflatten(made.streams, lead),
  )


def push(
  settings: Settings, sent: Sequence[Sent], totals: Sequence[Float[Array, "B T D"]] | None, count: int
) -> list[Float[Array, "B T D"]]:
  """Adds what several aggregates send to `count` sources; `totals` None: nothing was sent to them before."""
  flat_totals, _ = _flatten(totals)
  flat_sent = [
    tpu_push.Sent(
      _flatten(one.gradients)[0],
      _flatten(one.origin)[0],
      _lay_out(one.weights, one.positions, count, one.gradients[0].dtype),
    )
    for one in sent
  ]
  lead = sent[0].gradients[0].shape[:-1]
  streams = sum(len(one.gradients) for one in sent)
  shape = _shape(settings, flat_sent[0].gradients, streams + (1 if totals is None else 2) * count)
  made = tpu_push.push(shape, flat_sent, flat_totals, count, interpret=settings.interpret)
  return _unflatten(made, lead)


def _flatten(tree):
  """[B,T,n] arrays as [B·T,n], and B, T of the first."""
  arrays = jax.tree.leaves(tree)
  lead = arrays[0].shape[:-1] if arrays else None
  return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), tree), lead


def _unflatten(tree, lead):
  return jax.tree.map(lambda x: x.reshape(*lead, x.shape[-1]), tree)


def _shape(settings: Settings, arrays, count: int) -> Shape:
  rows, width = arrays[0].shape
  dtype = jnp.dtype(arrays[0].dtype)
  block = tpu_common.block_rows(rows, count, width, dtype)
  return Shape(rows, width, block, dtype, settings.activation, settings.epsilon)


def _lay_out(weights: Weights, positions: tuple[int, ...], count: int, dtype, *, repeat: bool = True) -> Operands:
  """Operands over all `count` sources of a pass: zero columns for those that are not its own."""

  def spread(x):
    if positions == tuple(range(count)):
      return x
    kept = [k for k, position in enumerate(positions) if position >= 0]
    at = jnp.asarray([positions[k] for k in kept], jnp.int32)
    return jnp.zeros((*x.shape[:-1], count), x.dtype).at[..., at].set(x[..., jnp.asarray(kept, jnp.int32)])

  static = spread(weights.a.astype(jnp.float32))[:, None, :]
  w2 = None if weights.w2 is None else spread(jnp.transpose(weights.w2, (1, 0, 2)).astype(dtype))
  w1 = None if weights.w1 is None else weights.w1.astype(dtype)
  operands = Operands(static, w2, w1)
  return _repeat(operands) if repeat else operands


def _columns(operands: Operands, columns: tuple[int, ...]) -> Operands:
  at = jnp.asarray(columns)
  w2 = None if operands.w2 is None else operands.w2[..., at]
  return Operands(operands.a[..., at], w2, None)


def _repeat(operands: Operands) -> Operands:
  w2 = None if operands.w2 is None else repeat_columns(operands.w2)
  return Operands(repeat_columns(operands.a), w2, operands.w1)
