"""The carry of single layers, a list of block outputs, and one backward pass over all aggregates.

If JAX differentiated each aggregate separately, each would read and write the gradient accumulator of every source
before it: at 32 blocks their backward passes would move 1772 arrays [B,T,D]. Here they move 1177, because gradients are
accumulated in groups of four aggregates:

- The backward pass of an aggregate adds only to the accumulators of its near sources, those within its group, which the
  backward passes of the blocks between them need. It keeps its stream gradients and weights.
- After the backward pass of the group's earliest aggregate, which runs last, one pass (`push`) adds what all four
  contribute to the accumulators of older sources. It reads and writes each of these once.

Rematerialisation is fused into these passes. Where a block is recomputed (`remat_policy: full`) its streams are, too;
the backward pass of the next aggregate reads the same sources anyway and returns them: 124 arrays instead of 651. An
example with 8 blocks, where DA_8 is the last and has one stream:

  backward through   reads                                  accumulates into     returns besides
  DA_8               X_0..X_8, gradients of 1 stream        X_5..X_8             streams of DA_7
  block 8                                                                        gradients of the streams of DA_7
  DA_7               X_0..X_7, gradients of 4 streams       X_5..X_7             streams of DA_6
  ...
  DA_5               X_0..X_5, gradients of 4 streams       X_5                  streams of DA_4
  push of DA_5..8    gradients of 13 streams                X_0..X_4

JAX passes cotangents from later operations to earlier ones. This module passes the kept gradients and the recomputed
streams in the same way, although they are not derivatives: they are the cotangents of `History.pending` and
`History.recomputed`, which are zero in the forward pass, where nothing reads them and the compiler drops them. One
operation makes each of these cotangents and one reads it, so that JAX never adds two of them. All gradients that a
caller sees are derivatives.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from maxtext_mudd.connections.base import Link, Plan, Site
from maxtext_mudd.kernels import HiddenLayer, Passes, Pending, WeightMLP, Weights, accumulation_dtype, map_columns

AGGREGATES_PER_GROUP = 4  # the traffic of a step is within 3 % of that of the best number, for 24 to 42 blocks
LAST_OUTPUT_NAME = "mudd_last_output"  # for the policy of rematerialisation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
  """What flows between blocks. Not a tuple: stock layers unpack tuples.

  Attributes:
    sources: extra embeddings, oldest first, then X_0 (the embedding) to X_i; pre-normed where `mudd_pre_norm` is on.
    newest: X_i as the block returned it; None: it is the last source.
    weights: of the last aggregate, where the backward pass of the next recomputes its streams; else None.
    recomputed: zeros; their cotangents are the streams of the last aggregate, recomputed by the backward pass of the
      next.
    pending: zeros, one item for each later aggregate of the group; its cotangent has the stream gradients and the
      weights of that aggregate, which `push` needs.
  """

  sources: tuple[Float[Array, "B T D"], ...]
  newest: Float[Array, "B T D"] | None = None
  weights: Weights | None = None
  recomputed: list[Float[Array, "B T D"]] | None = None
  pending: list[Pending] = dataclasses.field(default_factory=list)

  @classmethod
  def start(cls, sources: Sequence[Float[Array, "B T D"]], newest: Float[Array, "B T D"] | None, *_) -> "History":
    """The history before the first block; what a buffer needs besides is not used."""
    return cls(tuple(sources), newest)

  @property
  def output(self) -> Float[Array, "B T D"]:
    """X_i."""
    return self.sources[-1] if self.newest is None else self.newest

  @property
  def output_shape(self) -> tuple[int, ...]:
    return self.output.shape

  def through(self, link: Link, parameters: Any, state: Any, arguments: Any) -> tuple["History", Any]:
    """The history after a block, and what else the block returned.

    Args:
      parameters: of the aggregate, state: of the block; they may hold the same arrays.
    """
    number = len(self.sources) + link.plan.oldest
    if link.weights is None:
      source, output, rest = link.block(state, number, None, self.output, arguments)
      return self.append(source, output), rest
    weights = link.weights(parameters, number, self.output, self.newest is None)
    here = PlacedAggregate(place(link.plan, link.site.block), link.passes)

    def block(state, sums, output, arguments):
      return link.block(state, number, sums, output, arguments)

    if link.recomputed:
      return through_block(here, block, state, self, weights, arguments)
    sums, after = aggregate(here, self, weights)
    source, output, rest = block(state, sums, self.output, arguments)
    return after.append(source, output), rest

  def sums(self, link: Link, parameters: Any) -> list[Float[Array, "B T D"]]:
    """The sums of a site once more, besides those in `through`, as for keys and values that later blocks use. They are
    differentiated separately, since only one operation may make the cotangents of `pending` and `recomputed`."""
    alone = dataclasses.replace(link, plan=dataclasses.replace(link.plan, sites={link.site.block: link.site}))
    sums, _ = History(self.sources, self.newest).mix(alone, parameters)
    return sums

  def close(self, sown: Any) -> tuple["History", Any]:
    """The history after the last block; a buffer has to know where that is."""
    return self, sown

  def mix(self, link: Link, parameters: Any) -> tuple[list[Float[Array, "B T D"]], "History"]:
    """The sums of a site that no block reads, such as DA_L, and the history for the next such site."""
    history = name_last(self)
    number = len(self.sources) + link.plan.oldest
    weights = link.weights(parameters, number, history.output, history.newest is None)
    return aggregate(PlacedAggregate(place(link.plan, link.site.block), link.passes), history, weights)

  def append(self, source: Float[Array, "B T D"], output: Float[Array, "B T D"]) -> "History":
    newest = None if self.newest is None else output
    return dataclasses.replace(self, sources=(*self.sources, source), newest=newest)


def name_last(history: History) -> History:
  """The history after the last block, its output named for the policy of rematerialisation: the backward pass of the
  aggregate after it needs X_L, for which the block would be computed twice."""
  last, newest = (
    None if x is None else checkpoint_name(x, LAST_OUTPUT_NAME) for x in (history.sources[-1], history.newest)
  )
  return dataclasses.replace(history, sources=(*history.sources[:-1], last), newest=newest)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where an aggregate stands among the others; sources are named by their number.

  Attributes:
    aggregate: its site.
    oldest: the oldest source of the model.
    previous: the one before it, if any.
    later_in_group: the later ones of its group, in order.
    is_first_of_group: whether no other of its group is earlier.
    is_last: whether no aggregate of the model is later.
    in_last_group: whether its group is the last; then the sources have no accumulators yet.
    oldest_near: the newest source of the group's first aggregate; older sources are left to `push`.
  """

  aggregate: Site
  oldest: int
  previous: Site | None
  later_in_group: tuple[Site, ...]
  is_first_of_group: bool
  is_last: bool
  in_last_group: bool
  oldest_near: int

  def by_number(self, arrays: Sequence[Array]) -> dict[int, Array]:
    """Arrays of all sources so far, oldest first, by the number of the source."""
    return dict(enumerate(arrays, self.oldest))


def place(plan: Plan, block: int) -> Place:
  """The place of DA_block."""
  blocks = sorted(plan.sites)
  number = blocks.index(block)
  end = len(blocks) - 1
  last = end - (end - number) // AGGREGATES_PER_GROUP * AGGREGATES_PER_GROUP
  first = max(0, last - AGGREGATES_PER_GROUP + 1)
  aggregate_at = plan.sites.get
  return Place(
    aggregate=aggregate_at(block),
    oldest=plan.oldest,
    previous=aggregate_at(blocks[number - 1]) if number else None,
    later_in_group=tuple(aggregate_at(b) for b in blocks[number + 1 : last + 1]),
    is_first_of_group=number == first,
    is_last=number == end,
    in_last_group=last == end,
    oldest_near=blocks[first],
  )


class PlacedAggregate(NamedTuple):
  """An aggregate at its place, with the passes that run it; all static."""

  place: Place
  passes: Passes


def aggregate(here: PlacedAggregate, history: History, weights: Weights) -> tuple[list[Float[Array, "B T D"]], History]:
  """The streams of one aggregate, and the history after it."""

  @jax.custom_vjp
  def call(history, weights):
    return _streams(here, history, weights), _after(here, history, weights, recomputes=False)

  def forward(history, weights):
    return call(history, weights), (_residuals(history), weights)

  def backward(inputs, cotangents):
    to_streams, to_history = cotangents
    return _backward(here, *inputs, to_streams, to_history)

  call.defvjp(forward, backward)
  return call(history, weights)


def through_block(
  here: PlacedAggregate, block: Callable, state: Any, history: History, weights: Weights, arguments: Any
) -> tuple[History, Any]:
  """An aggregate and the block that reads it, both recomputed in the backward pass.

  Args:
    block: (state, streams, X_i, arguments) -> (source, output, anything else); a pure function.

  Returns:
    the history with the block's output, and what else it returned.
  """
  recomputes = not here.place.is_last
  # Traced here, during the model's call: quantization by interception, for one, is no longer active when the backward
  # pass is traced.
  streams = jax.eval_shape(functools.partial(_streams, here), history, weights)
  block, closed_over = jax.closure_convert(block, state, streams, history.output, arguments)

  @jax.custom_vjp
  def call(state, history, weights, arguments, closed_over):
    streams = _streams(here, history, weights)
    source, output, rest = block(state, streams, history.output, arguments, *closed_over)
    return _after(here, history, weights, recomputes).append(source, output), rest

  def forward(*inputs):
    state, history, weights, arguments, closed_over = custom_vjp_primal_tree_values(inputs)
    outputs = call(state, history, weights, arguments, closed_over)
    return outputs, (state, _residuals(history), weights, arguments, closed_over)

  def backward(inputs, cotangents):
    state, history, weights, arguments, closed_over = inputs
    # The next aggregate has no backward pass where a loss reads only what blocks returned besides, as routers' losses.
    has_streams = recomputes and not isinstance(cotangents[0].recomputed[0], SymbolicZero)
    to_history, to_rest = jax.tree.map(_instantiate, cotangents)
    streams = to_history.recomputed if has_streams else _streams(here, history, weights)
    to_source, to_output = to_history.sources[-1], to_history.newest
    to_history = dataclasses.replace(to_history, sources=to_history.sources[:-1], newest=None)

    def outputs(*inputs):
      source, output, rest = block(*inputs)
      return source, None if history.newest is None else output, rest

    _, vjp = jax.vjp(outputs, state, streams, history.output, arguments, *closed_over)
    to_state, to_streams, to_newest, to_arguments, *to_closed_over = vjp((to_source, to_output, to_rest))
    to_history, to_weights = _backward(here, history, weights, to_streams, to_history, to_newest)
    return to_state, to_history, to_weights, to_arguments, to_closed_over

  call.defvjp(forward, backward, symbolic_zeros=True)
  return call(state, history, weights, arguments, closed_over)


def _instantiate(cotangent):
  """An array for a cotangent that is known to be zero."""
  if not isinstance(cotangent, SymbolicZero):
    return cotangent
  make = np.zeros if cotangent.dtype == jax.dtypes.float0 else jnp.zeros
  return make(cotangent.shape, cotangent.dtype)


def _residuals(history: History) -> History:
  """What the backward pass needs of a history: not the zeros."""
  return dataclasses.replace(history, recomputed=None if history.recomputed is None else [], pending=[])


def _streams(here: PlacedAggregate, history: History, weights: Weights) -> list[Float[Array, "B T D"]]:
  sources = here.place.by_number(history.sources)
  return here.passes.forward([sources[j] for j in here.place.aggregate.sources], weights)


def _after(here: PlacedAggregate, history: History, weights: Weights, recomputes: bool) -> History:
  """The history after an aggregate: sources as they are, zeros for what comes back."""
  place, like = here.place, history.output

  def pending(ahead: Site) -> Pending:
    wide = accumulation_dtype(like.dtype)
    shape = (ahead.ways, len(ahead.sources))
    if isinstance(weights, WeightMLP):
      hidden = jnp.zeros((*like.shape[:-1], ahead.hidden), like.dtype)
      scale = None if weights.scale is None else jnp.zeros(shape, wide)
      w2, a = jnp.zeros((ahead.hidden, *shape), wide), jnp.zeros(shape, wide)
      kept = HiddenLayer(hidden, w2, a, scale, weights.cap)
    else:
      kept = jnp.zeros((*weights.shape[:-2], *shape), wide)  # of all tokens, or of each
    return Pending([jnp.zeros_like(like)] * ahead.ways, here.passes.placed(kept))

  return dataclasses.replace(
    history,
    weights=weights if recomputes else None,
    recomputed=[jnp.zeros_like(like)] * place.aggregate.ways if recomputes else None,
    pending=[pending(ahead) for ahead in place.later_in_group] if place.is_first_of_group else history.pending[1:],
  )


def _backward(
  here: PlacedAggregate, history: History, weights: Weights, to_streams, after: History, to_newest=None
) -> tuple[History, Weights]:
  """Cotangents of the history before an aggregate and of its weights.

  Args:
    to_streams: gradients of its streams.
    after: cotangent of the history after it.
    to_newest: what else is added to the gradient of X_i.
  """
  place, passes = here
  site = place.aggregate
  read, recompute = site.sources, None
  if history.recomputed is not None:
    read = tuple(sorted({*site.sources, *place.previous.sources}))
    recompute = _among(history.weights, place.previous.sources, read)
  near = tuple(j for j in site.sources if j >= place.oldest_near)
  sources, totals = place.by_number(history.sources), place.by_number(after.sources)
  gradients = passes.backward(
    [sources[j] for j in read],
    _among(weights, site.sources, read),
    to_streams,
    near=tuple(read.index(j) for j in near),
    totals=None if place.is_last else [totals[j] for j in near],
    recompute=recompute,
    keep_hidden=True,
  )
  for j, gradient in zip(near, gradients.sources):
    totals[j] = gradient
  to_weights = map_columns(gradients.weights, lambda x: _columns(x, [read.index(j) for j in site.sources]))
  leaves = [gradient.astype(x.dtype) for gradient, x in zip(*map(jax.tree.leaves, (to_weights, weights)))]
  to_weights = jax.tree.unflatten(jax.tree.structure(weights), leaves)  # with the `source` that it had
  pending = [Pending(list(to_streams), _for_push(weights, gradients.hidden, to_streams[0].dtype)), *after.pending]
  if place.is_first_of_group:
    _push(here, pending, totals)
    pending = []
  newest = None
  if history.newest is not None:
    newest = after.newest if after.newest is not None else jnp.zeros_like(history.newest)
    newest = newest if to_newest is None else newest + to_newest
  elif to_newest is not None:
    totals[site.block] = totals[site.block] + to_newest
  zeros = jax.tree.map(jnp.zeros_like, history.weights)
  return History(tuple(totals.values()), newest, zeros, gradients.streams, pending), to_weights


def _for_push(weights: Weights, hidden: Float[Array, "B T K"] | None, dtype) -> Weights:
  """The weights as `push` takes them and `History.pending` holds them, for sources of this dtype."""
  wide = accumulation_dtype(dtype)
  if isinstance(weights, WeightMLP):
    scale = None if weights.scale is None else weights.scale.astype(wide)
    return HiddenLayer(hidden, weights.w2.astype(wide), weights.a.astype(wide), scale, weights.cap)
  return weights.astype(wide)


def _push(here: PlacedAggregate, pending: list[Pending], totals: dict[int, Array]) -> None:
  """Adds what the aggregates of a group send to older sources, to `totals` in place."""
  place = here.place
  group = (place.aggregate, *place.later_in_group)
  far = tuple(sorted({j for member in group for j in member.sources if j < place.oldest_near}))
  if not far:
    return
  pushed = [Pending(one.gradients, _among(one.weights, member.sources, far)) for member, one in zip(group, pending)]
  sums = here.passes.push(pushed, None if place.in_last_group else [totals[j] for j in far], len(far))
  for j, total in zip(far, sums):
    totals[j] = total


def _among(weights: Weights, given: Sequence[int], sources: Sequence[int]) -> Weights:
  """Weights of the sources `given` as weights of `sources`: zero for sources that have none, and without the others."""
  if tuple(given) == tuple(sources):
    return weights
  kept = [k for k, j in enumerate(given) if j in sources]
  at = jnp.asarray([sources.index(given[k]) for k in kept], jnp.int32)

  def spread(x):
    return jnp.zeros((*x.shape[:-1], len(sources)), x.dtype).at[..., at].set(_columns(x, kept))

  weights = map_columns(weights, spread)
  if isinstance(weights, WeightMLP):
    weights = dataclasses.replace(weights, source=sources.index(given[-1]))
  return weights


def _columns(x: Array, columns: Sequence[int]) -> Array:
  return x if list(columns) == list(range(x.shape[-1])) else x[..., jnp.asarray(columns, jnp.int32)]
