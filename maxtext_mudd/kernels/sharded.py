"""The passes on a mesh: every device its own rows and its own part of D, and small reductions between them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxtext_mudd.kernels import tpu, tpu_buffer, tpu_common
from maxtext_mudd.kernels.tpu import Aggregate, Gradients, Sent, Settings, Weights
from maxtext_mudd.kernels.tpu_buffer import BufferGradients
from maxtext_mudd.kernels.tpu_common import Origin


def forward(settings: Settings, sharding: NamedSharding | None, sources, aggregate: Aggregate) -> list:
  """As `tpu.forward`, of sources laid out as `sharding` says; None: on one device."""
  if sharding is None:
    return tpu.forward(settings, sources, aggregate)
  layout = _Layout(sharding)
  positions = aggregate.positions

  def local(sources, weights, origin):
    aggregate = layout.with_hidden(settings, sources, Aggregate(weights, origin, positions))
    return tpu.forward(settings, sources, aggregate)

  specs = (layout.rows, layout.weights(aggregate.weights), layout.rows)
  return layout.map(local, specs, layout.rows)(sources, aggregate.weights, aggregate.origin)


def backward(
  settings: Settings,
  sharding: NamedSharding | None,
  sources,
  gradients,
  aggregate: Aggregate,
  near: tuple[int, ...],
  totals=None,
  again: Aggregate | None = None,
  keep_hidden: bool = False,
) -> Gradients:
  """As `tpu.backward`, of an aggregate without `Origin.hidden`. `hidden` is the same on all devices that share rows."""
  if sharding is None:
    return tpu.backward(settings, sources, gradients, aggregate, near, totals, again, keep_hidden)
  layout = _Layout(sharding)
  positions = aggregate.positions
  again_positions = None if again is None else again.positions

  def local(sources, gradients, weights, origin, totals, again_weights, again_origin):
    own = Aggregate(weights, origin, positions)
    before = None if again_positions is None else Aggregate(again_weights, again_origin, again_positions)
    if layout.width is None or weights.w1 is None:
      made = tpu.backward(settings, sources, gradients, own, near, totals, before, keep_hidden)
    else:
      made = _backward_by_width(settings, layout, sources, gradients, own, near, totals, before, keep_hidden)
    return made._replace(weights=layout.sum_weights(made.weights))

  tokens = P(*layout.rows[:2])
  weights = layout.weights(aggregate.weights)
  again_weights, again_origin = (None, None) if again is None else (again.weights, again.origin)
  keeps = keep_hidden and aggregate.weights.w2 is not None
  specs = (
    layout.rows,
    layout.rows,
    weights,
    layout.rows,
    None if totals is None else layout.rows,
    None if again is None else layout.weights(again_weights),
    None if again is None else layout.rows,
  )
  out_specs = Gradients(
    near=layout.rows,
    newest=layout.rows if aggregate.origin.newest is not None else None,
    to_hidden=None,
    weights=weights,
    hidden=tokens if keeps else None,
    streams=None if again is None else layout.rows,
  )
  call = layout.map(local, specs, out_specs)
  return call(sources, gradients, aggregate.weights, aggregate.origin, totals, again_weights, again_origin)


def push(
  settings: Settings, sharding: NamedSharding | None, sent: Sequence[Sent], totals, count: int
) -> list[jax.Array]:
  """As `tpu.push`; each `Sent` needs its `Origin.hidden`, or static weights."""
  if sharding is None:
    return tpu.push(settings, sent, totals, count)
  layout = _Layout(sharding)
  positions = [one.positions for one in sent]

  def local(gradients, origins, weights, totals):
    own = [Sent(*parts) for parts in zip(gradients, origins, weights, positions)]
    return tpu.push(settings, own, totals, count)

  gradients, origins, weights = ([getattr(one, name) for one in sent] for name in ("gradients", "origin", "weights"))
  tokens = P(*layout.rows[:2])
  specs = (layout.rows, tokens, P(), None if totals is None else layout.rows)
  return layout.map(local, specs, layout.rows)(gradients, origins, weights, totals)


def buffer_forward(settings: Settings, sharding: NamedSharding | None, buffer, count, newest, weights: Weights) -> list:
  """As `tpu_buffer.forward`; `newest` None: entry count - 1. `sharding` is that of one source."""
  if sharding is None:
    return tpu_buffer.forward(settings, buffer, count, weights, Origin(newest))
  layout = _Layout(sharding)

  def local(buffer, count, newest, weights):
    origin = Origin(newest)
    if layout.width is not None and weights.w1 is not None:
      h, *_ = _hidden(settings, layout, _newest(buffer, count, newest), weights.w1)
      weights, origin = weights._replace(w1=None), Origin(hidden=h)
    return tpu_buffer.forward(settings, buffer, count, weights, origin)

  rows = None if newest is None else layout.rows
  call = layout.map(local, (layout.entries, P(), rows, layout.weights(weights)), layout.rows)
  return call(buffer, count, newest, weights)


def buffer_backward(
  settings: Settings,
  sharding: NamedSharding | None,
  buffer,
  count,
  newest,
  weights: Weights,
  gradients,
  totals,
) -> BufferGradients:
  """As `tpu_buffer.backward`; the rest as in `buffer_forward`."""
  if sharding is None:
    return tpu_buffer.backward(settings, buffer, count, gradients, weights, Origin(newest), totals)
  layout = _Layout(sharding)

  def local(buffer, count, newest, weights, gradients, totals):
    if layout.width is None or weights.w1 is None:
      made = tpu_buffer.backward(settings, buffer, count, gradients, weights, Origin(newest), totals)
    else:
      x, w1 = _newest(buffer, count, newest), weights.w1
      given = _hidden(settings, layout, x, w1)
      static = weights._replace(w1=None)
      made = tpu_buffer.backward(settings, buffer, count, gradients, static, Origin(hidden=given[0]), totals)
      dw1, to_newest = _through_norm(layout, x, w1, given, made.to_hidden)
      made = made._replace(weights=made.weights._replace(w1=dw1), to_hidden=None)
      if newest is None:
        own = jax.lax.dynamic_index_in_dim(made.buffer, count - 1, keepdims=False)
        own = (own + to_newest).astype(own.dtype)
        made = made._replace(buffer=jax.lax.dynamic_update_index_in_dim(made.buffer, own, count - 1, 0))
      else:
        made = made._replace(newest=to_newest.astype(newest.dtype))
    return made._replace(weights=layout.sum_weights(made.weights))

  rows = None if newest is None else layout.rows
  specs = (
    layout.entries,
    P(),
    rows,
    layout.weights(weights),
    layout.rows,
    None if totals is None else layout.entries,
  )
  out_specs = BufferGradients(layout.entries, rows, None, layout.weights(weights))
  return layout.map(local, specs, out_specs)(buffer, count, newest, weights, gradients, totals)


def _newest(buffer, count, newest):
  return jax.lax.dynamic_index_in_dim(buffer, count - 1, keepdims=False) if newest is None else newest


class _Layout:
  """Mesh axes of the rows (B and T) and of the width."""

  def __init__(self, sharding: NamedSharding):
    batch, length, width = (*sharding.spec, None, None, None)[:3]
    self.mesh = sharding.mesh
    self.rows = P(batch, length, width)
    self.entries = P(None, batch, length, width)
    self.width = width
    self.row_axes = _names(batch) + _names(length)
    self.all_axes = self.row_axes + _names(width)

  def map(self, function, in_specs, out_specs):
    return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

  def weights(self, weights: Weights):
    return Weights(P(), *(None if x is None else spec for x, spec in zip(weights[1:], (P(), P(self.width, None)))))

  def sum_weights(self, gradients: Weights) -> Weights:
    """Over the devices that have a part of them."""
    a, w2, w1 = gradients
    return Weights(self.sum(a, self.all_axes), self.sum(w2, self.all_axes), self.sum(w1, self.row_axes))

  def whole_width(self, x) -> int:
    return x.shape[-1] * jax.lax.axis_size(self.width)

  def sum(self, x, axes):
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), x) if axes else x

  def with_hidden(self, settings: Settings, sources, aggregate: Aggregate) -> Aggregate:
    """Where D is sharded, the hidden layer is made here: its product with W1 is a sum over devices."""
    if self.width is None or aggregate.weights.w1 is None:
      return aggregate
    newest = sources[aggregate.positions[-1]] if aggregate.origin.newest is None else aggregate.origin.newest
    h, *_ = _hidden(settings, self, newest, aggregate.weights.w1)
    return aggregate._replace(weights=aggregate.weights._replace(w1=None), origin=Origin(hidden=h))


def _names(axes) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _hidden(settings: Settings, layout: _Layout, newest, w1):
  """(h, slope of the activation, z, inverse root mean square), after one reduction of [B,T,K+1] numbers."""
  wide = newest.astype(jnp.float32)
  square = jnp.sum(wide * wide, axis=-1, keepdims=True)
  product = tpu_common.product(newest, w1.astype(newest.dtype), ((2,), (0,)))
  summed = layout.sum(jnp.concatenate([product, square], axis=-1), layout.width)
  inverse = jax.lax.rsqrt(summed[..., -1:] / layout.whole_width(newest) + settings.epsilon)
  z = inverse * summed[..., :-1]
  h, slope = tpu_common.activation_and_slope(z, settings.activation)
  return h.astype(newest.dtype), slope, z, inverse


def _backward_by_width(
  settings, layout, sources, gradients, own: Aggregate, near, totals, before, keep_hidden
) -> Gradients:
  """The backward pass where D is sharded: what goes through W1 is done here, around a reduction of [B,T,K] numbers."""
  newest = sources[-1] if own.origin.newest is None else own.origin.newest
  w1 = own.weights.w1
  given = _hidden(settings, layout, newest, w1)
  h = given[0]
  static = Aggregate(own.weights._replace(w1=None), Origin(hidden=h), own.positions)
  if before is not None:
    before = layout.with_hidden(settings, sources, before)
  made = tpu.backward(settings, sources, gradients, static, near, totals, before)
  dw1, to_newest = _through_norm(layout, newest, w1, given, made.to_hidden)
  if own.origin.newest is None:
    made = made._replace(near=[*made.near[:-1], (made.near[-1] + to_newest).astype(newest.dtype)])
  else:
    made = made._replace(newest=to_newest.astype(newest.dtype))
  weights = made.weights._replace(w1=dw1)
  return made._replace(weights=weights, to_hidden=None, hidden=h if keep_hidden else None)


def _through_norm(layout: _Layout, newest, w1, given, to_hidden):
  """Gradients of W1 and, float32, of X_i, from that of the hidden layer; `given` as `_hidden` returned it."""
  _, slope, z, inverse = given
  dz = layout.sum(to_hidden, layout.width) * slope
  along = jnp.sum(dz * z, axis=-1, keepdims=True) / layout.whole_width(newest)
  scaled = (dz * inverse).astype(newest.dtype)
  dw1 = tpu_common.product(newest, scaled, ((0, 1), (0, 1)))
  to_newest = tpu_common.product(scaled, w1.astype(newest.dtype), ((2,), (1,)))
  return dw1, to_newest - newest.astype(jnp.float32) * (inverse**2 * along)
