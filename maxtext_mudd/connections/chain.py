"""The aggregates of a whole model as one chain of fused passes, whose backward pass moves as little memory as it can.

Differentiated one by one, every aggregate adds to the gradient of every source before it: a read and a write of all the
sums, once per block. Here only the gradients that the next blocks need are added at once; the rest of a group of
aggregates follows in one pass, when the group's lowest one is reached. And where a block is computed again in the
backward pass, its streams are made in the pass that goes back through the aggregate above it, which reads the same
sources anyway.

What one aggregate's backward pass has to tell another's travels as a cotangent: `Chain.mail` and `Chain.echo` are
zeros that nothing reads in the forward pass, and their "gradients" are the message. Every entry has one reader and one
writer, so nothing is ever added to it. The gradients of sources, parameters and all else are the true ones.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from maxtext_mudd.kernels import sharded, tpu
from maxtext_mudd.kernels.tpu import Sent, Settings, Weights
from maxtext_mudd.kernels.tpu_common import Origin
from maxtext_mudd.topology import Aggregate, Topology

AGGREGATES_PER_GROUP = 4  # within 3 % of the best uniform number for 24 to 42 blocks
LAST_OUTPUT_NAME = "mudd_last_output"  # for the policy of rematerialisation


class Letter(NamedTuple):
  """What an aggregate sends to the sources below its group: zeros forward, stream gradients and weights backward."""

  gradients: list[Float[Array, "B T D"]]
  hidden: Float[Array, "B T K"] | None
  a: Float[Array, "C N"]
  w2: Float[Array, "K C N"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
  """What flows between blocks. Not a tuple: stock layers unpack tuples.

  Attributes:
    sources: X_0 to X_i, pre-normed where `mudd_pre_norm` is on.
    newest: X_i as the block returned it, where that is not the last source.
    newest_before: the same for the last aggregate passed.
    weights: of the last aggregate passed, where its streams are to be made again; `echo`: these streams.
    mail: letters of the aggregates ahead in this group.
  """

  sources: tuple[Float[Array, "B T D"], ...]
  newest: Float[Array, "B T D"] | None = None
  newest_before: Float[Array, "B T D"] | None = None
  weights: Weights | None = None
  echo: list[Float[Array, "B T D"]] | None = None
  mail: list[Letter] = dataclasses.field(default_factory=list)

  @property
  def output(self) -> Float[Array, "B T D"]:
    """X_i."""
    return self.sources[-1] if self.newest is None else self.newest

  def append(self, source, output) -> "Chain":
    newest = None if self.newest is None else output
    return dataclasses.replace(self, sources=(*self.sources, source), newest=newest)


def name_last(chain: Chain) -> Chain:
  """The chain behind the last block, its output named: the aggregate after it needs X_L in the backward pass, and the
  block would be computed twice for it."""
  last, newest = (
    None if x is None else checkpoint_name(x, LAST_OUTPUT_NAME) for x in (chain.sources[-1], chain.newest)
  )
  return dataclasses.replace(chain, sources=(*chain.sources[:-1], last), newest=newest)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where an aggregate stands in the chain; sources by their number.

  Attributes:
    aggregate: itself.
    before: the aggregate below, if any.
    above: those above in its group, lowest first.
    is_first: whether it is the lowest of its group.
    is_top: whether there is none above in the model, in_top_group: none above its group; then no sums of gradients
      exist yet.
    floor: the newest source of the group's lowest aggregate; gradients of sources below it can wait.
  """

  aggregate: Aggregate
  before: Aggregate | None
  above: tuple[Aggregate, ...]
  is_first: bool
  is_top: bool
  in_top_group: bool
  floor: int


def place(topology: Topology, block: int) -> Place:
  """The place of DA_block."""
  blocks = sorted(topology.aggregates)
  number = blocks.index(block)
  top = len(blocks) - 1
  last = top - (top - number) // AGGREGATES_PER_GROUP * AGGREGATES_PER_GROUP
  first = max(0, last - AGGREGATES_PER_GROUP + 1)
  aggregate_at = topology.aggregates.get
  return Place(
    aggregate=aggregate_at(block),
    before=aggregate_at(blocks[number - 1]) if number else None,
    above=tuple(aggregate_at(b) for b in blocks[number + 1 : last + 1]),
    is_first=number == first,
    is_top=number == top,
    in_top_group=last == top,
    floor=blocks[first],
  )


class Link(NamedTuple):
  """One aggregate with what its passes need; all static."""

  place: Place
  settings: Settings
  sharding: NamedSharding | None


def aggregate(link: Link, chain: Chain, weights: Weights) -> tuple[list[Float[Array, "B T D"]], Chain]:
  """The streams of one aggregate, and the chain behind it."""

  @jax.custom_vjp
  def call(chain, weights):
    return _streams(link, chain, weights), _behind(link, chain, weights, echoes=False)

  def forward(chain, weights):
    return call(chain, weights), (_kept(chain), weights)

  def backward(inputs, cotangents):
    to_streams, to_chain = cotangents
    return _send_back(link, *inputs, to_streams, to_chain)

  call.defvjp(forward, backward)
  return call(chain, weights)


def through_block(
  link: Link, block: Callable, state: Any, chain: Chain, weights: Weights, arguments: Any
) -> tuple[Chain, Any]:
  """An aggregate and the block that reads it, where the block is computed again in the backward pass.

  Args:
    block: (state, streams, X_i, arguments) -> (source, output, anything else); a pure function.

  Returns:
    the chain with the block's output, and what else it returned.
  """
  echoes = not link.place.is_top
  # Traced once, here: what is in force around the model's call, like quantization by interception, is not any more when
  # the backward pass is traced.
  sums = jax.eval_shape(functools.partial(_streams, link), chain, weights)
  block, closed_over = jax.closure_convert(block, state, sums, chain.output, arguments)

  @jax.custom_vjp
  def call(state, chain, weights, arguments, closed_over):
    source, output, rest = block(state, _streams(link, chain, weights), chain.output, arguments, *closed_over)
    return _behind(link, chain, weights, echoes).append(source, output), rest

  def forward(state, chain, weights, arguments, closed_over):
    return call(state, chain, weights, arguments, closed_over), (state, _kept(chain), weights, arguments, closed_over)

  def backward(inputs, cotangents):
    state, chain, weights, arguments, closed_over = inputs
    to_chain, to_rest = cotangents
    streams = to_chain.echo if echoes else _streams(link, chain, weights)
    to_source, to_output = to_chain.sources[-1], to_chain.newest
    to_chain = dataclasses.replace(to_chain, sources=to_chain.sources[:-1], newest=None)

    def outputs(*inputs):
      source, output, rest = block(*inputs)
      return (source, None if chain.newest is None else output, rest)

    _, vjp = jax.vjp(outputs, state, streams, chain.output, arguments, *closed_over)
    to_state, to_streams, to_newest, to_arguments, *to_closed_over = vjp((to_source, to_output, to_rest))
    to_chain, to_weights = _send_back(link, chain, weights, to_streams, to_chain, to_newest)
    return to_state, to_chain, to_weights, to_arguments, to_closed_over

  call.defvjp(forward, backward)
  return call(state, chain, weights, arguments, closed_over)


def _kept(chain: Chain) -> Chain:
  """What the backward pass needs of a chain: not the zeros."""
  return dataclasses.replace(chain, echo=None if chain.echo is None else [], mail=[])


def _streams(link: Link, chain: Chain, weights: Weights) -> list:
  own = link.place.aggregate.sources
  one = tpu.Aggregate(weights, Origin(newest=chain.newest if weights.w1 is not None else None), tuple(range(len(own))))
  return sharded.forward(link.settings, link.sharding, [chain.sources[j] for j in own], one)


def _behind(link: Link, chain: Chain, weights: Weights, echoes: bool) -> Chain:
  """The chain after an aggregate: sources as they are, room for what comes back."""
  place, like = link.place, chain.output

  def letter(ahead: Aggregate):
    shape = ahead.ways, len(ahead.sources)
    return Letter(
      [jnp.zeros_like(like)] * ahead.ways,
      jnp.zeros((*like.shape[:-1], ahead.hidden), like.dtype) if ahead.hidden else None,
      jnp.zeros(shape, weights.a.dtype),
      jnp.zeros((ahead.hidden, *shape), weights.a.dtype) if ahead.hidden else None,
    )

  return dataclasses.replace(
    chain,
    newest_before=chain.newest,
    weights=weights if echoes else None,
    echo=[jnp.zeros_like(like)] * place.aggregate.ways if echoes else None,
    mail=[letter(ahead) for ahead in place.above] if place.is_first else chain.mail[1:],
  )


def _send_back(
  link: Link, chain: Chain, weights: Weights, to_streams, behind: Chain, to_newest=None
) -> tuple[Chain, Weights]:
  """Cotangents of the chain before an aggregate and of its weights.

  Args:
    to_streams: gradients of its streams.
    behind: cotangent of the chain after it.
    to_newest: what else reaches X_i.
  """
  place, settings, sharding = link
  own = place.aggregate
  read = sorted({*own.sources, *(place.before.sources if chain.echo is not None else ())})
  again = None
  if chain.echo is not None:
    origin = Origin(newest=chain.newest_before if chain.weights.w1 is not None else None)
    again = tpu.Aggregate(chain.weights, origin, _positions(place.before, read))
  near = tuple(j for j in own.sources if j >= place.floor)
  totals = list(behind.sources)
  apart = chain.newest is not None and weights.w1 is not None
  made = sharded.backward(
    settings,
    sharding,
    [chain.sources[j] for j in read],
    to_streams,
    tpu.Aggregate(weights, Origin(newest=chain.newest if apart else None), _positions(own, read)),
    near=tuple(read.index(j) for j in near),
    totals=None if place.is_top else [totals[j] for j in near],
    again=again,
    keep_hidden=True,
  )
  for j, gradient in zip(near, made.near):
    totals[j] = gradient
  letter = Letter(list(to_streams), made.hidden, weights.a, weights.w2)
  if place.is_first:
    _deliver(link, [letter, *behind.mail], totals)
  newest = None
  if chain.newest is not None:
    newest = behind.newest if behind.newest is not None else jnp.zeros_like(chain.newest)
    newest = newest if made.newest is None else newest + made.newest
    newest = newest if to_newest is None else newest + to_newest
  elif to_newest is not None:
    totals[-1] = totals[-1] + to_newest
  to_chain = dataclasses.replace(
    _zeros(chain),
    sources=tuple(totals),
    newest=newest,
    echo=made.streams,
    mail=[] if place.is_first else [letter, *behind.mail],
  )
  return to_chain, jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), made.weights, weights)


def _deliver(link: Link, letters: list[Letter], totals: list) -> None:
  """Adds what the aggregates of a group send to the sources below it."""
  place, settings, sharding = link
  group = (place.aggregate, *place.above)
  far = sorted({j for member in group for j in member.sources if j < place.floor})
  if not far:
    return
  sent = [
    Sent(
      letter.gradients, Origin(hidden=letter.hidden), Weights(letter.a, letter.w2), _positions(member, far, missing=-1)
    )
    for member, letter in zip(group, letters)
  ]
  sums = sharded.push(settings, sharding, sent, None if place.in_top_group else [totals[j] for j in far], len(far))
  for j, total in zip(far, sums):
    totals[j] = total


def _positions(member: Aggregate, read: list[int], missing: int | None = None) -> tuple[int, ...]:
  return tuple(read.index(j) if j in read else missing for j in member.sources)


def _zeros(tree):
  return jax.tree.map(jnp.zeros_like, tree)
