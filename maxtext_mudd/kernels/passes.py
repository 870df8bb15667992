"""The passes of `mix` (forward, backward, push), run by one of its implementations, on one device or on a mesh.

`mix` runs the forward and the backward pass of one aggregate. `connections/history.py` differentiates all aggregates of
a model together, which moves less memory. It calls the passes directly, and also `push`, which `mix` does not use.

On a mesh, every device runs a pass on its rows (tokens) and its part of D. Small sums over devices precede and follow
it. Where the axes of the mesh are automatic, the compiler partitions the passes in plain JAX.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from maxtext_mudd.kernels import tpu, xla
from maxtext_mudd.kernels.operands import Buffer, Gradients, Pending, Sources
from maxtext_mudd.kernels.weights import (
  Activations,
  ChannelWeights,
  HiddenLayer,
  WeightMLP,
  Weights,
  hidden_gradients,
  hidden_layer,
  with_hidden,
)

IMPLEMENTATIONS = ("xla", "pallas", "pallas_interpret")


@dataclasses.dataclass(frozen=True)
class Passes:
  """The passes of one implementation, on one device or on the mesh of a sharding.

  Attributes:
    implementation: one of `IMPLEMENTATIONS`.
    sharding: sharding of a source on several devices: B, T and D may be sharded. None: one device, or the compiler
      partitions the passes in plain JAX.
    strict: whether memory that was never written reads as NaN under "pallas_interpret", and races are reported. The
      interpreter then calls Python from the compiled program, which `jax.checkpoint` does not support.
    whole_buffers: whether passes in plain JAX read all entries of a buffer, not only a prefix with the valid ones. For
      the stages of a pipeline, which run as one batch: a switch between prefixes would compute all of them.
  """

  implementation: str
  sharding: NamedSharding | None = None
  strict: bool = False
  whole_buffers: bool = False

  @jax.named_scope("depth_aggregate")
  def forward(self, sources: Sources, weights: Weights) -> list[Float[Array, "B T D"]]:
    """x^c = sum_j W[..., c, j] * X_j (paper, Eq. 5)."""
    self._check_channels(weights)
    layout = _Layout(self.sharding)

    def on_device(sources, weights):
      weights, _ = layout.with_hidden(sources, weights)
      return self._of_device.forward(sources, weights, **self._options_of_buffers)

    return layout.map(on_device, (layout.sources(sources), layout.weights(weights)), layout.rows)(sources, weights)

  @jax.named_scope("depth_aggregate")
  def backward(
    self,
    sources: Sources,
    weights: Weights,
    gradients: Sequence[Float[Array, "B T D"]],
    near: tuple[int, ...] | None = None,
    totals: Sequence[Float[Array, "B T D"]] | Float[Array, "S B T D"] | None = None,
    recompute: Weights | None = None,
    keep_hidden: bool = False,
  ) -> Gradients:
    """Gradients of the weights and of the sources, from the gradients of the streams.

    Args:
      sources: the sources of the aggregate.
      weights: its weights.
      gradients: gradients of its C streams.
      near: indices of the sources whose gradients are computed ("near" sources), in order; the last is the newest
        source. The gradients of the others are left to `push`. Default: all sources. A buffer takes no other value.
      totals: gradient accumulators of the near sources, or of the entries of a buffer, to which this pass adds. Entries
        that are not valid may change. Default: zeros.
      recompute: weights of another aggregate of the same list of sources, whose streams are recomputed in this pass. A
        buffer takes None only.
      keep_hidden: whether to return the hidden layer of a `WeightMLP`, for `push`.
    """
    near = tuple(range(len(sources))) if near is None and not isinstance(sources, Buffer) else near
    self._check_channels(weights, recompute)
    layout = _Layout(self.sharding)
    keep_hidden = keep_hidden and isinstance(weights, WeightMLP)
    options = {"near": near, "keep_hidden": keep_hidden} | self._options_of_buffers
    pass_of_device = functools.partial(self._of_device.backward, **options)
    on_device = functools.partial(_backward_on_device, layout, pass_of_device, keep_hidden)
    arguments = (sources, weights, list(gradients), totals, recompute)
    in_specs = (
      layout.sources(sources),
      layout.weights(weights),
      layout.rows,
      layout.sources(totals),
      layout.weights(recompute),
    )
    out_specs = Gradients(
      layout.entries if near is None else layout.rows,
      layout.weights(weights),
      layout.tokens if keep_hidden else None,
      None if recompute is None else layout.rows,
    )
    return layout.map(on_device, in_specs, out_specs)(*arguments)

  @jax.named_scope("depth_aggregate")
  def push(
    self, pushed: Sequence[Pending], totals: Sequence[Float[Array, "B T D"]] | None, count: int
  ) -> list[Float[Array, "B T D"]]:
    """Adds what several aggregates contribute to the gradients of `count` sources to their accumulators.

    Args:
      pushed: the aggregates; the weights of each are for these sources.
      totals: the gradient accumulators of the sources. Default: zeros.
      count: number of sources.

    Returns:
      The accumulators.
    """
    for aggregate in pushed:
      self._check_channels(None, aggregate.weights)
    layout = _Layout(self.sharding)
    on_device = functools.partial(self._of_device.push, count=count, **self._options)
    specs = [Pending(layout.rows, layout.weights(aggregate.weights)) for aggregate in pushed]
    return layout.map(on_device, (specs, layout.sources(totals)), layout.rows)(list(pushed), totals)

  def _check_channels(self, weights: Weights | None, others: Weights | None = None) -> None:
    """Raises ValueError for `ChannelWeights` that fused kernels do not take: with several heads, or in a push or for
    streams that are recomputed (`others`)."""
    if self.implementation == "xla":
      return
    if isinstance(weights, ChannelWeights) and weights.w.shape[3] > 1:
      raise ValueError(
        f"w has {weights.w.shape[3]} heads, and implementation={self.implementation!r} mixes with one; use 'xla'."
      )
    if isinstance(others, ChannelWeights):
      raise ValueError(f"implementation={self.implementation!r} takes no ChannelWeights in a history; use 'xla'.")

  def placed(self, weights: Weights) -> Weights:
    """Weights as the passes take them: where the axes of the mesh are explicit, they and their gradients are sharded in
    one way."""
    layout = _Layout(self.sharding)
    if self.sharding is None or not layout.mesh.are_all_axes_explicit:
      return weights
    return layout.placed(weights, layout.weights(weights))

  @property
  def _of_device(self):
    """The module with the passes of one device."""
    return xla if self.implementation == "xla" else tpu

  @property
  def _options(self) -> dict:
    """What its passes take besides."""
    if self.implementation == "xla":
      return {}
    return {"interpret": self.implementation != "pallas" and (tpu.STRICTLY if self.strict else True)}

  @property
  def _options_of_buffers(self) -> dict:
    """What its passes that take buffers take besides."""
    return {"whole_buffers": self.whole_buffers} if self.implementation == "xla" else self._options


def _backward_on_device(
  layout: "_Layout", pass_of_device: Callable, keep_hidden: bool, sources, weights, gradients, totals, recompute
) -> Gradients:
  """The backward pass on the rows and the part of D of one device, then sums over devices of gradients of weights."""
  kernel_weights, hidden = layout.with_hidden(sources, weights)
  recompute, _ = layout.with_hidden(sources, recompute)
  grads = pass_of_device(sources, kernel_weights, gradients, totals=totals, recompute=recompute)
  if hidden is None:
    return grads._replace(weights=layout.sum_weights(grads.weights))
  grad_hidden = grads.weights.hidden
  newest = _newest(sources, weights)
  grad_newest, grad_w1 = hidden_gradients(newest, weights.w1, hidden, grad_hidden, **layout.width_parts)
  of_second = {name: getattr(grads.weights, name) for name in ("w2", "a", "scale")}
  grad_weights = dataclasses.replace(weights, w1=grad_w1, **of_second)
  grad_sources = grads.sources
  if weights.newest is not None:
    grad_weights = dataclasses.replace(grad_weights, newest=grad_newest.astype(newest.dtype))
  elif isinstance(sources, Buffer):
    at_newest = jax.lax.dynamic_index_in_dim(grad_sources, sources.count - 1, keepdims=False)
    at_newest = (at_newest + grad_newest).astype(newest.dtype)
    grad_sources = jax.lax.dynamic_update_index_in_dim(grad_sources, at_newest, sources.count - 1, 0)
  else:
    grad_sources = [*grad_sources[:-1], (grad_sources[-1] + grad_newest).astype(newest.dtype)]
  kept = kernel_weights.hidden if keep_hidden else None
  return grads._replace(sources=grad_sources, weights=layout.sum_weights(grad_weights), hidden=kept)


def _newest(sources: Sources, weights: WeightMLP) -> Float[Array, "B T D"]:
  if weights.newest is not None:
    return weights.newest
  return sources.newest if isinstance(sources, Buffer) else sources[weights.source]


class _Layout:
  """How operands are sharded: which axes of a mesh split B, T and D. Without a sharding there is one device.

  Attributes:
    tokens, rows, entries: specs of arrays [B,T,...], [B,T,D] and [S,B,T,D].
    row_axes: names of the mesh axes that split B and T.
    width: names of the mesh axes that split D.
    width_parts: the arguments `sum_parts` and `parts` of `hidden_layer`; empty where D is not split.
  """

  def __init__(self, sharding: NamedSharding | None):
    batch, length, width = (*(() if sharding is None else sharding.spec), None, None, None)[:3]
    self.mesh = None if sharding is None else sharding.mesh
    self.tokens = P(batch, length)
    self.rows = P(batch, length, width)
    self.entries = P(None, batch, length, width)
    self.width = _names(width)
    self.row_axes = _names(batch) + _names(length)
    self.width_parts = {}
    if self.width:
      parts = functools.reduce(lambda number, name: number * self.mesh.shape[name], self.width, 1)
      self.width_parts = {"sum_parts": lambda x: jax.lax.psum(x, self.width), "parts": parts}

  def map(self, function: Callable, in_specs, out_specs) -> Callable:
    if self.mesh is None:
      return function
    mapped = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if not self.mesh.are_all_axes_explicit:
      return mapped
    return lambda *operands: mapped(*self.placed(operands, in_specs))

  def placed(self, operands, specs):
    """Operands with these specs. Explicit axes of a mesh do not let `shard_map` change them."""
    specs = jax.tree.leaves(jax.tree_util.tree_broadcast(specs, operands), is_leaf=lambda x: isinstance(x, P))
    leaves, tree = jax.tree.flatten(operands)
    return jax.tree.unflatten(tree, [jax.reshard(x, NamedSharding(self.mesh, spec)) for x, spec in zip(leaves, specs)])

  def sources(self, sources):
    """Specs of sources or of their gradients."""
    if isinstance(sources, Buffer):
      return Buffer(self.entries, P())
    return self.entries if hasattr(sources, "ndim") else self.rows

  def weights(self, weights: Weights | None):
    """Specs of weights or of their gradient."""
    if weights is None:
      return None
    if isinstance(weights, WeightMLP):
      newest = None if weights.newest is None else self.rows
      weights = dataclasses.replace(weights, w1=P(self.width or None, None), newest=newest)
    elif isinstance(weights, HiddenLayer):
      weights = dataclasses.replace(weights, hidden=self.tokens)
    if isinstance(weights, WeightMLP | HiddenLayer):
      return dataclasses.replace(weights, w2=P(), a=P(), scale=None if weights.scale is None else P())
    if isinstance(weights, ChannelWeights):
      return ChannelWeights(self.tokens, None if weights.a is None else P(None, self.width or None))
    return self.tokens if weights.ndim == 4 else P()

  def with_hidden(self, sources: Sources, weights: Weights | None) -> tuple[Weights | None, Activations | None]:
    """Where D is split, replaces a `WeightMLP` by its hidden layer: the product with W1 is a sum over devices, which a
    kernel of one device cannot compute. Returns (weights for the kernel, the hidden layer or None)."""
    if not self.width or not isinstance(weights, WeightMLP):
      return weights, None
    newest = _newest(sources, weights)
    hidden = hidden_layer(newest, weights.w1, weights.activation, weights.epsilon, **self.width_parts)
    return with_hidden(weights, hidden.value.astype(newest.dtype)), hidden

  def sum_weights(self, gradient: Weights) -> Weights:
    """The gradient of weights, summed over the devices that hold terms of it."""
    all_axes = self.row_axes + self.width
    if isinstance(gradient, WeightMLP | HiddenLayer):
      scale = None if gradient.scale is None else _sum(gradient.scale, all_axes)
      summed = dataclasses.replace(gradient, w2=_sum(gradient.w2, all_axes), a=_sum(gradient.a, all_axes), scale=scale)
      if isinstance(gradient, WeightMLP):
        return dataclasses.replace(summed, w1=_sum(gradient.w1, self.row_axes))
      return dataclasses.replace(summed, hidden=_sum(gradient.hidden, self.width))
    if isinstance(gradient, ChannelWeights):
      of_channels = None if gradient.a is None else _sum(gradient.a, self.row_axes)
      return ChannelWeights(_sum(gradient.w, self.width), of_channels)
    return _sum(gradient, self.width if gradient.ndim == 4 else all_axes)


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  return jax.lax.psum(x, axes) if axes else x


def _names(axes) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
