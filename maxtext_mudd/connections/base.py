"""What a family of depth connections is. Imports neither JAX nor MaxText: command lines are checked before these are.

The package uses a family as a class and calls its class methods alone, which `Family` lists. There are two kinds of
families:

- Families that mix the outputs of earlier blocks derive from `HistoryFamily` and bring a module that makes the weights
  (`Aggregate`). What flows between blocks is `history.History`, or `buffer.HistoryBuffer` where layers are scanned.
- Families in which something else flows between blocks, or that make an input for each sublayer, bring a `Connection`
  of their own. `multi_stream` has what families of n residual streams share, `scored_sources` what families of sources
  with logits share.

Blocks count from 1, as in the paper: source 0 is the embedding, source i the output of block i. Extra embeddings, of
further tables, are the sources -1, -2, ..., older than source 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import types
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from maxtext_mudd.blocks import num_blocks
from maxtext_mudd.connections.family_keys import FamilyKeys, HistoryKeys, kernel_refusals

if TYPE_CHECKING:
  from flax import nnx
  import jax
  from jaxtyping import Array, Bool, Float, Int

  from maxtext_mudd.connections.connection import Embeddings, MtpConnection, Passed
  from maxtext_mudd.connections.keys import Refusal
  from maxtext_mudd.kernels import Passes, Weights

STREAMS = "qkvr"  # query, key, value and residual stream, in the order of the paper and of the released code


@dataclasses.dataclass(frozen=True)
class Site:
  """Description of one depth-wise aggregate DA_i. It has no parameters; `Aggregate` has them.

  Attributes:
    block: i, the block that it follows; the output of this block is its newest source.
    sources: the sources that it mixes, oldest first, the newest last.
    streams: the streams that it makes, a subset of "qkvr"; "x" for one stream that serves as all four. Where
      multi-token prediction (MTP) is connected, DA_L also makes "m", which the first MTP block reads.
    hidden: K, the hidden width of the weight MLP; 0 where the weights are static only.
    mlp: name of the weight MLP, which all sites with this name share; None: no other site has it.
  """

  block: int
  sources: tuple[int, ...]
  streams: str
  hidden: int = 0
  mlp: str | None = None

  @property
  def ways(self) -> int:
    """C, the number of streams."""
    return len(self.streams)


@dataclasses.dataclass(frozen=True)
class Plan:
  """All aggregates of a model.

  Attributes:
    num_blocks: L.
    sites: maps i to the description of DA_i. Where i is missing, block i+1 reads X_i as all its streams. Where MTP is
      connected, MTP block k counts as block L+k, and DA_{L+k} makes one stream, which the output head and the next MTP
      block read.
    separate_norms: blocks that have LN_q, LN_k and LN_v, beside those that read several streams of a site.
    extra_embeddings: m, the number of extra embeddings: sources -1 to -m.
  """

  num_blocks: int
  sites: Mapping[int, Site] = dataclasses.field(default_factory=dict)
  separate_norms: Sequence[int] = ()
  extra_embeddings: int = 0

  @property
  def oldest(self) -> int:
    """-m, the number of the oldest source. A history has its sources from this one on, so source j is number j + m."""
    return -self.extra_embeddings

  @property
  def mtp_blocks(self) -> tuple[int, ...]:
    """Numbers of the MTP blocks that are connected: L+1, L+2, ...; none where MTP reads the hidden state alone."""
    return tuple(block for block in sorted(self.sites) if block > self.num_blocks)

  def before(self, block: int) -> Site | None:
    """The aggregate whose streams `block` reads; None where it reads the output of the block before."""
    return self.sites.get(block - 1)

  def has_separate_norms(self, block: int) -> bool:
    """Whether a block has LN_q, LN_k and LN_v in place of one attention norm."""
    site = self.before(block)
    return (site is not None and site.streams != "x") or block in self.separate_norms


def check_plan(plan: Plan) -> None:
  """Raises ValueError for sites that no history can serve."""
  for block, site in plan.sites.items():
    if (
      site.block != block
      or list(site.sources) != sorted({*site.sources} & {*range(plan.oldest, block + 1)})
      or (site.sources[-1:] != (block,))
    ):
      raise ValueError(
        f"the site after block {block} is {site}; its block must be {block}, its sources some of {plan.oldest} to "
        f"{block}, in order, with {block} as the last."
      )
  last, (number, ways) = plan.sites.get(plan.num_blocks), ("two", 2) if plan.mtp_blocks else ("one", 1)
  if last and last.ways != ways:
    raise ValueError(f"the site after the last block makes the streams {last.streams!r}; it must make {number}.")


@dataclasses.dataclass(frozen=True)
class Cost:
  """What connections add to the plain model.

  Attributes:
    parameters: all parameters that the plain model has not.
    weight_parameters: those among them that Eq. 13 of the paper counts (W1 and W2); 0 for families without them.
    embedding_parameters: those among them that are tables of extra embeddings.
    flops: forward FLOPs per token.
    activations: arrays [B,T,D] that are kept at the peak beyond those of the plain model (Appendix E).
  """

  parameters: int = 0
  weight_parameters: int = 0
  embedding_parameters: int = 0
  flops: int = 0
  activations: int = 0


def itemsize(config) -> int:
  """Bytes of a number in `dtype`."""
  return 2 if str(getattr(config.dtype, "value", config.dtype)).endswith("16") else 4


def logits_arrays(config, per_token: int) -> int:
  """How many arrays [B,T,D] in `dtype` take as much memory as so many float32 logits for each token, and gradients."""
  return -(-2 * 4 * per_token // (itemsize(config) * config.emb_dim))


@dataclasses.dataclass(frozen=True)
class Held:
  """What the buffer of a carry holds between two blocks of a pipeline, as far as configurations say.

  Attributes:
    number: of entries that are written; they are the first ones.
    read: those that a later block or the hidden state reads. The others need not be passed on.
    whole: how many further arrays [B,T,D] the carry has, which are always passed on.
    capacity: how many entries the buffer has, written or not.
    bytes_per_token: of what is kept beside each entry, such as logits.
  """

  number: int
  read: tuple[int, ...]
  whole: int
  capacity: int = 0
  bytes_per_token: int = 0


@dataclasses.dataclass(frozen=True)
class Link:
  """What `History.through` and `HistoryBuffer.through` take besides arrays: DA_i and its reader, block i+1.

  Attributes:
    plan: of the model.
    site: of DA_i; None: the block reads X_i, and `weights` is None.
    passes: how the aggregate runs.
    weights: (parameters of the aggregate, i + 1, X_i, whether X_i is the newest source) -> weights of the sources.
    block: (state of the block, i + 1, sums of Eq. 5 or None, X_i, arguments) -> (X_{i+1} as later aggregates mix it,
      X_{i+1}, rest), a pure function; see `Connection.through` for `rest`. None after the last block.
    recomputed: whether the block is recomputed in the backward pass.
  """

  plan: Plan
  site: Site | None
  passes: Passes
  weights: Callable | None
  block: Callable | None
  recomputed: bool


class Family(Protocol):
  """The interface of a family. `BaseFamily` has the defaults.

  Attributes:
    Keys: group of configuration keys, with their checks; `MuddConfig` inherits it.
    takes_explicit_axes: whether models run on meshes with explicit axes (`shard_mode=explicit`).
    reads: "sublayer" if the family needs the outputs of attention and of the FFN one by one, since it makes an input
      for each or adds them up by itself; otherwise "block".
    depth_axes: names of the axes of an `Aggregate`'s parameters that depend on the site, by the last name of a
      parameter's path: "sources" (one entry for each source of the site), "streams" (one for each stream), "hidden" (K
      entries), None (any other axis). Parameters of scanned layers are padded along these axes to one shape.
    stream_modules: modules of an `Aggregate` that exist only where its site makes a stream, by name, and the stream.
    matrices: by the last name of a parameter's path, the axes of the rows and of the columns of the matrix that it is,
      for optimizers that orthogonalise matrices. Axes but 0 count from the end, since scanned layers insert axis 1.
      Queries, static weights and the scales of norms are no matrices.
    static_weights: last names of the parameters that are weights of all tokens.
    start_modules: attributes that a `Connection` has only if it starts, finish_modules: only if it finishes.
  """

  Keys: ClassVar[type[FamilyKeys]]
  takes_explicit_axes: ClassVar[bool]
  reads: ClassVar[Literal["block", "sublayer"]]
  depth_axes: ClassVar[Mapping[str, tuple[str | None, ...]]]
  matrices: ClassVar[Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]]
  static_weights: ClassVar[tuple[str, ...]]
  stream_modules: ClassVar[Mapping[str, str]]
  start_modules: ClassVar[tuple[str, ...]]
  finish_modules: ClassVar[tuple[str, ...]]

  @classmethod
  def check_sizes(cls, config) -> None:
    """Raises ValueError, in one sentence, for keys that do not fit the sizes of the model."""

  @classmethod
  def refusals(cls, config) -> Iterable[Refusal]:
    """What the family does not work with; `config` is a whole `MuddConfig`."""

  @classmethod
  def plan(cls, config) -> Plan:
    """Its aggregates at the inputs of blocks, from a configuration with sizes; none if it has aggregates for each
    sublayer, or residual streams."""

  @classmethod
  def cost(cls, config) -> Cost:
    """What it adds to the plain model of these sizes."""

  @classmethod
  def output_init_scale(cls, config) -> float:
    """Factor on the initial values of the kernels whose outputs are added to what blocks pass on."""

  @classmethod
  def held(cls, config, block: int) -> Held:
    """What the carry holds behind a block, with which a stage of a pipeline that ends there is left."""

  @classmethod
  def why_not_plain(cls, config) -> str | None:
    """Why the family cannot be put into a trained plain model without changing its logits.

    Returns:
      a sentence without a full stop, which names the setting and what would work. None: with the initial values of the
      connections, the model computes what the plain model computes, bit for bit where no operations are fused.
    """

  @classmethod
  def stabilising(cls, config) -> list[str]:
    """What keeps deep models from diverging and is not set yet: its keys, as "mudd_pre_norm=true"."""

  @classmethod
  def build(
    cls, config, blocks: Sequence[int], mesh: jax.sharding.Mesh, rngs: nnx.Rngs, *, starts: bool, finishes: bool
  ) -> Connection:
    """The connection of one block, or of all blocks of a scanned stack.

    Args:
      blocks: their numbers; none where the connection only starts and finishes, as before scanned stacks.
      starts: whether `Connection.start` is called on it.
      finishes: whether `Connection.finish` is called on it.
    """

  @classmethod
  def share(cls, decoder: nnx.Module) -> None:
    """Lets the connections of a new decoder have parameters in common."""

  @classmethod
  def build_for_mtp(cls, config, block: int, mesh: jax.sharding.Mesh, rngs: nnx.Rngs) -> MtpConnection:
    """What follows an MTP block, one of `Plan.mtp_blocks`. Only families whose plan has such blocks bring it."""


class BaseFamily:
  """What a family is unless it says otherwise. A subclass brings `cost` and `build`, and `plan` if it has sites."""

  Keys = FamilyKeys
  takes_explicit_axes = False
  reads = "block"
  depth_axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = types.MappingProxyType({})
  matrices: ClassVar[Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]] = types.MappingProxyType({})
  static_weights = ()
  stream_modules: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
  start_modules = ()
  finish_modules = ()

  @classmethod
  def check_sizes(cls, config) -> None:
    """Any sizes will do."""

  @classmethod
  def refusals(cls, config) -> Iterable[Refusal]:
    return ()

  @classmethod
  def plan(cls, config) -> Plan:
    return Plan(num_blocks(config))

  @classmethod
  def output_init_scale(cls, config) -> float:
    return 1.0

  @classmethod
  def held(cls, config, block: int) -> Held:
    return Held(0, (), whole=1)

  @classmethod
  def why_not_plain(cls, config) -> str | None:
    return (
      f"depth_connection={config.depth_connection} does not say that its models start as the plain model "
      "(Family.why_not_plain); use dense or hyper_connections"
    )

  @classmethod
  def stabilising(cls, config) -> list[str]:
    return []

  @classmethod
  def share(cls, decoder: nnx.Module) -> None:
    """No connections have parameters in common."""


class Connection(Protocol):
  """The part of a family that lives in one block or in one scanned stack: an `nnx.Module`.

  The decoder calls `start` on the embedding, `through` for each block, and `finish` after the last one. Each layer
  receives a carry from the layer before it and returns a new one: X_i for the residual connection, X_0..X_i for
  families with a history, the n residual streams for Hyper-Connections, `ScoredCarry` for sources with logits. It must
  not be a tuple, since MaxText's layers unpack tuples.

  Attributes:
    blocks: numbers of the blocks.
    starts, finishes: as given to `Family.build`.
    rematerialises: whether `through` decides by itself what is kept for the backward pass of scanned layers; otherwise
      MaxText's loop recomputes blocks by the policy.
    entry_axes: of one entry of each array of the carry's buffer: "btd" for sources, for others as "mbt".
  """

  blocks: tuple[int, ...]
  starts: bool
  finishes: bool
  rematerialises: bool
  entry_axes: tuple[str, ...]

  def adapt(self, layer: nnx.Module) -> None:
    """Changes a stock layer, once, after it is built, so that it accepts what `read` returns: by three attention norms,
    for example, or by norms that take a pytree."""

  def start(self, embedding: Float[Array, "B T D"] | Embeddings, rematerialise: Callable | None = None) -> Any:
    """The carry before the first block.

    Args:
      embedding: X_0; `Embeddings` for a family whose plan has extra ones.
      rematerialise: for scanned layers: wraps the function of a block in `jax.checkpoint` with MaxText's policy. None:
        the whole block is recomputed in the backward pass. Single layers ignore it.
    """

  def through(self, block: Callable, state: Any, carry: Any, arguments: Any) -> tuple[Any, Any]:
    """Runs one block: makes its inputs from the carry, calls it, and adds its output to the carry.

    Args:
      block: (state, *inputs, arguments) -> (what `write` returns, output, rest), a pure function that calls
        `read(*inputs)` and `write(output)` of the connection in the layer that `state` makes. `rest` is what the layer
        returns besides its output: the KV cache, and state that is not a parameter, such as sown losses. A family
        without history calls `block(state, carry, arguments)`; `HistoryConnection` gives (number of the block, sums,
        X_i).

    Returns:
      the carry after the block, and its `rest`.
    """

  def read(self, *inputs) -> Any:
    """The argument of the stock layer, from the inputs that `through` gives; called in the layer. Its arrays are
    [B,T,D]: stock layers shard all of them so."""

  def inputs(self, carry: Any) -> Any:
    """The argument of the stock layer for which `through` calls `read`, without running the block; of single layers
    only. The decoder asks so for keys and values that later blocks use."""

  def write(self, output: Any) -> Any:
    """What the carry keeps of the layer's output; called in the layer. The block returns arrays [B,T,D] only, which it
    shards."""

  def finish(self, carry: Any, sown: Any = ()) -> tuple[Float[Array, "B T D"], Any, Any]:
    """The hidden state after the last block. Where MTP is connected, the `MtpInput` of its first block becomes an
    attribute, a variable of the type `ForMtp`.

    Args:
      sown: floating arrays that scanned blocks left beside the carry, which a loss may read.

    Returns:
      the hidden state; the carry, whose arrays may be read now; and `sown` as losses have to read it.
    """

  def pass_on(self, carry: Any) -> Passed:
    """What the next stage of a pipeline needs of the carry that `finish` returned."""

  def resume(self, start: Any, passed: Passed, block: Int[Array, ""]) -> Any:
    """The carry of a stage of a pipeline.

    Args:
      start: what `start` returned in this stage.
      passed: from the stage before, with zeros in entries that did not cross the boundary.
      block: number of blocks before this stage. With 0 the carry is `start`.
    """


class Aggregate(Protocol):
  """The module of a `HistoryFamily` at one site.

  Attributes:
    keeps_newest: whether every stream equals X_i where its weight is one for the newest source and zero for others.
      Scanned layers then have a block without an aggregate, or without some of the streams, by such weights. Not so
      with a norm before or after the sum.
  """

  keeps_newest: bool

  def weights(self, output: Float[Array, "B T D"], column: int | Array, visible: Bool[Array, " N"] | None) -> Weights:
    """Weights [C,N], weights of every token [B,T,C,N], or a `kernels.WeightMLP`, for the sources of the site. All
    aggregates of a model have the same kind. A pure function: changes of state are lost.

    Args:
      output: X_i. A `WeightMLP` whose `newest` is this very array is computed with the sums, where a kernel can.
      column: of the newest source among the sources; where layers are scanned, it is known at run time only.
      visible: which of the N sources the block's site has. Where layers are scanned, the site is padded to hold those
        of all blocks, and weights of other sources are set to zero afterwards; a softmax has to leave them out before.
        None: all.
    """

  def streams(self, sums: list[Float[Array, "B T D"]], output: Float[Array, "B T D"]) -> list[Float[Array, "B T D"]]:
    """The streams of the site, from the sums of Eq. 5 and X_i."""


class HistoryFamily(BaseFamily):
  """A family that mixes the outputs of earlier blocks. A subclass brings `plan`, `cost`, and an `Aggregate`.

  The subclass may be the `Aggregate` itself, an `nnx.Module` that is built from (config, site, mesh, rngs).
  """

  Keys = HistoryKeys
  takes_explicit_axes = True
  start_modules = ("embedding_norm", "extra_norms")
  finish_modules = ("final_depth_aggregate",)

  @classmethod
  def check_sizes(cls, config) -> None:
    check_plan(cls.plan(config))

  @classmethod
  def refusals(cls, config) -> Iterable[Refusal]:
    return kernel_refusals(config)

  @classmethod
  def aggregate(cls, config, site: Site, mesh: jax.sharding.Mesh, rngs: nnx.Rngs) -> Aggregate:
    """The module at one site; where layers are scanned, at a site that is padded to hold those of all blocks."""
    return cls(config, site, mesh, rngs)

  @classmethod
  def norms_sources(cls, config) -> bool:
    """Whether `source_norm` returns a norm."""
    return False

  @classmethod
  def source_norm(cls, config, rngs: nnx.Rngs) -> nnx.Module | None:
    """The norm of every source before it is mixed; None: sources are mixed as they are."""
    return None

  @classmethod
  def held(cls, config, block: int) -> Held:
    """All sources so far. A block without an aggregate before it reads the newest source, or X_i beside it."""
    plan, is_normed = cls.plan(config), cls.norms_sources(config)
    read = {source for site in plan.sites.values() if site.block >= block for source in site.sources}
    read = {source for source in read if source <= block} | (set() if is_normed else {block})
    entries, capacity = (x + 1 - plan.oldest for x in (block, plan.num_blocks))
    return Held(entries, tuple(source - plan.oldest for source in sorted(read)), int(is_normed), capacity)

  @classmethod
  def build(cls, config, blocks, mesh, rngs, *, starts, finishes) -> Connection:
    from maxtext_mudd.connections.connection import HistoryConnection

    return HistoryConnection(cls, config, blocks, mesh, rngs, starts=starts, finishes=finishes)

  @classmethod
  def build_for_mtp(cls, config, block, mesh, rngs) -> MtpConnection:
    from maxtext_mudd.connections.connection import MtpConnection

    return MtpConnection(cls, config, block, mesh, rngs)
