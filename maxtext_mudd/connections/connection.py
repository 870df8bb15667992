"""The connections of blocks: the plain residual one, and that of families that mix the outputs of earlier blocks."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxtext_mudd import kernels
from maxtext_mudd.blocks import normed_streams, stacks, streams_read
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.blocks.streams import Streams, decouple
from maxtext_mudd.connections import kept, layout, metrics
from maxtext_mudd.connections.base import STREAMS, Aggregate, HistoryFamily, Link, Site
from maxtext_mudd.connections.buffer import HistoryBuffer
from maxtext_mudd.connections.history import History
from maxtext_mudd.connections.mesh import passes, source_sharding, with_whole_width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Passed:
  """What a stage of a pipeline passes on to the next.

  Attributes:
    entries: the arrays of the carry's buffer, [N, ...] each, of which `Family.held` says what is read later.
    whole: arrays [B,T,D] of the carry besides.
  """

  entries: tuple[Float[Array, "N ..."], ...]
  whole: Any


class PlainConnection(nnx.Module):
  """The residual connection: the carry is the output of the last block. Base class of families with another carry."""

  rematerialises = False
  entry_axes = ()

  def __init__(self, blocks: Sequence[int], *, starts: bool, finishes: bool):
    self.blocks = tuple(blocks)
    self.starts = starts
    self.finishes = finishes

  def adapt(self, layer: nnx.Module) -> None:
    """Changes nothing: a stock layer reads one array already."""

  def start(self, embedding: Float[Array, "B T D"], rematerialise: Callable | None = None):
    return embedding

  def through(self, block: Callable, state: Any, carry: Any, arguments: Any) -> tuple[Any, Any]:
    carry, _, rest = block(state, carry, arguments)
    return carry, rest

  def read(self, carry):
    kept.keep(self, "history", {"x": carry})
    kept.keep(self, "streams", {"x": carry})
    return carry

  def inputs(self, carry):
    return carry

  def write(self, output):
    return output

  def finish(self, carry, sown: Any = ()) -> tuple[Float[Array, "B T D"], Any, Any]:
    kept.keep(self, "history", {"x": carry}, last=True)
    kept.keep(self, "streams", {"x": carry}, last=True)
    return carry, carry, sown

  def pass_on(self, carry) -> Passed:
    return Passed((), carry)

  def resume(self, start, passed: Passed, block: Int[Array, ""]):
    return where_first(block, start, passed.whole)


def where_first(block: Int[Array, ""], of_first: Any, of_others: Any) -> Any:
  """Arrays of the first stage of a pipeline, before which there is no block, or those of other stages."""
  return jax.tree.map(lambda x, y: jnp.where(block == 0, x, y), of_first, of_others)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Embeddings:
  """What a connection starts with where the plan has extra embeddings.

  Attributes:
    token: X_0, which block 1 reads.
    extra: the sources -1, -2, ..., -m.
  """

  token: Float[Array, "B T D"]
  extra: tuple[Float[Array, "B T D"], ...]


class SourceNorms(nnx.Module):
  """The norms of several sources: `norm_1`, `norm_2`, ..."""

  def __init__(self, norms: Sequence[nnx.Module]):
    self.number = len(norms)
    for k, norm in enumerate(norms, 1):
      setattr(self, f"norm_{k}", norm)

  def __call__(self, sources: Sequence[Float[Array, "B T D"]]) -> tuple[Float[Array, "B T D"], ...]:
    """Each source, normed by the norm with its number."""
    return tuple(getattr(self, f"norm_{k}")(x) for k, x in enumerate(sources, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MtpInput:
  """What an MTP block that is connected receives.

  Attributes:
    stream: what the block reads.
    history: all sources so far, for the aggregate after the block. Only that aggregate may use it.
  """

  stream: Float[Array, "B T D"]
  history: History | HistoryBuffer


class ForMtp(nnx.Variable):
  """Holds the `MtpInput` of the first MTP block between the decoder, which returns arrays only, and that block."""


class HistoryConnection(PlainConnection):
  """The connection of a `HistoryFamily`: an aggregate before the block, and one after the last block.

  The carry is the history alone. Under rematerialisation a block keeps X_0..X_i, which exist once, and its streams are
  recomputed in the backward pass (memory in Table 6 of the paper). A custom policy that keeps `decoder_layer_input`
  keeps the streams of every block.

  Where layers are scanned, all blocks of a stack share one module. Its parameters are padded (`layout`), and the number
  of the block is known at run time only.
  """

  rematerialises = True
  entry_axes = ("btd",)

  def __init__(
    self,
    family: type[HistoryFamily],
    config,
    blocks: Sequence[int],
    mesh: jax.sharding.Mesh,
    rngs: nnx.Rngs,
    *,
    starts: bool,
    finishes: bool,
  ):
    super().__init__(blocks, starts=starts, finishes=finishes)
    self.config = config
    self.mesh = mesh
    self.plan = plan = family.plan(config)
    self.carry_type = HistoryBuffer if config.scan_layers else History
    if starts:
      self.embedding_norm = family.source_norm(config, rngs)
      extra_norms = [family.source_norm(config, rngs) for _ in range(plan.extra_embeddings)]
      self.extra_norms = SourceNorms(extra_norms) if any(extra_norms) else None
    if blocks:
      self.table = layout.table(plan, blocks, padded=config.scan_layers)
      self.output_norm = family.source_norm(config, rngs)
      site = self.table.padded
      self.depth_aggregate = family.aggregate(config, site, mesh, rngs) if site else None
    if finishes:
      self.final_site = plan.sites.get(plan.num_blocks)
      final = self.final_site
      self.final_depth_aggregate = family.aggregate(config, final, mesh, rngs) if final else None

  def adapt(self, layer: nnx.Module) -> None:
    if any(self.table.separate_norms):
      decouple(layer, block_spec(self.config), normed_streams(self.config, self.blocks[0]))

  def start(
    self, embedding: Float[Array, "B T D"] | Embeddings, rematerialise: Callable | None = None
  ) -> History | HistoryBuffer:
    embedding, extra = (embedding.token, embedding.extra) if self.plan.extra_embeddings else (embedding, ())
    norm = self.embedding_norm
    source, newest = (embedding, None) if norm is None else (norm(embedding), embedding)
    kept.keep(self, "history", {str(k): x for k, x in enumerate(extra, 1)})
    extra = extra if self.extra_norms is None else self.extra_norms(extra)
    sharding = source_sharding(self.config, self.mesh, source.shape)
    sources = (*reversed(extra), source)
    return self.carry_type.start(sources, newest, self.plan.num_blocks, sharding, rematerialise)

  def through(self, block: Callable, state: Any, carry: History | HistoryBuffer, arguments: Any):
    """`block` reads (number of the block, sums of Eq. 5 or None, X_i)."""
    self._keep_norms(carry, self.table.padded)
    link, parameters = self._link(carry, self.depth_aggregate, self.table.padded, self._weights, block)
    return carry.through(link, parameters, state, arguments)

  def read(self, number, sums, output: Float[Array, "B T D"]) -> Streams | Float[Array, "B T D"]:
    """The input of a block: four streams, or one array where they are all the same.

    Args:
      number: of the block; an array where layers are scanned.
      sums: of Eq. 5, one for each stream of the site; None where no block has a site.
      output: X_i.
    """
    table, module, streams = self.table, self.depth_aggregate, {"x": output}
    kept.keep(self, "history", streams)
    if module is not None:
      streams = dict(zip(table.padded.streams, module.streams(sums, output)))
      if not table.makes_all and not module.keeps_newest:
        makes = _at(table.makes, table, number)
        streams = {stream: jnp.where(makes[c], x, output) for c, (stream, x) in enumerate(streams.items())}
      if self._is_recorded:
        weights = self._weights(module, number, output, False)
        visible = self._fill(_at(table.visible, table, number)) if self.config.scan_layers else None
        self._sow(module, output, weights, streams, self._newest_column(number), visible)
      if kept.is_on("weights"):
        self._keep_weights(self._weights(module, number, output, False), table.padded.streams, output)
    one = streams.pop("x", output)
    if not streams and not any(table.separate_norms):
      kept.keep(self, "streams", {"x": one})
      return one
    if streams and "x" in table.padded.streams:  # a stack with blocks of one stream and blocks of several
      is_one = _at(table.makes, table, number)[table.padded.streams.index("x")]
      streams = {stream: jnp.where(is_one, one, x) for stream, x in streams.items()}
    choose = None
    if not all(table.separate_norms):
      has_own = _at(table.separate_norms, table, number)

      def choose(parameter, of_q):
        return jnp.where(has_own, parameter, of_q)

    streams = {stream: streams.get(stream, one) for stream in STREAMS}
    if kept.is_on("streams"):  # in single layers, of which the number is known
      kept.keep(self, "streams", {stream: streams[stream] for stream in streams_read(self.config, self.blocks[0])})
    return Streams(*streams.values(), choose)

  def inputs(self, carry: History) -> Streams | Float[Array, "B T D"]:
    module, site, sums = self.depth_aggregate, self.table.padded, None
    if module is not None:
      self._keep_norms(carry, site)
      link, parameters = self._link(carry, module, site, self._weights)
      sums = carry.sums(link, parameters)
    return self.read(self.blocks[0], sums, carry.output)

  def write(self, output: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """What later sites mix."""
    return output if self.output_norm is None else self.output_norm(output)

  def finish(self, carry: History | HistoryBuffer, sown: Any = ()) -> tuple[Float[Array, "B T D"], Any, Any]:
    carry, sown = carry.close(sown)
    if self.final_depth_aggregate is None:
      hidden, _, sown = super().finish(carry.output, sown)
      return hidden, carry, sown
    (hidden, *of_mtp), carry = self._final_streams(carry)
    if of_mtp:
      self.for_mtp = ForMtp(MtpInput(*of_mtp, carry))
    return hidden, carry, sown

  def pass_on(self, carry: HistoryBuffer) -> Passed:
    return Passed(carry.buffer.arrays, carry.newest)

  def resume(self, start: HistoryBuffer, passed: Passed, block: Int[Array, ""]) -> HistoryBuffer:
    (sources,), (first,) = passed.entries, start.buffer.arrays
    at_start = 1 - self.plan.oldest  # how many sources there are before the first block
    sources = sources.at[:at_start].set(where_first(block, first[:at_start], sources[:at_start]))
    buffer = start.buffer.resumed([sources], block)
    return HistoryBuffer(buffer, block + at_start, where_first(block, start.newest, passed.whole))

  def _final_streams(self, carry: History | HistoryBuffer):
    """The streams of a DA that no block reads, and the history for the next such DA."""
    module, site, output = self.final_depth_aggregate, self.final_site, carry.output
    self._keep_norms(carry, site, last=True)
    link, parameters = self._link(carry, module, site, self._final_weights)
    sums, carry = carry.mix(link, parameters)
    streams = module.streams(sums, output)
    by_name = dict(zip(site.streams, streams))
    if self._is_recorded:
      weights = module.weights(output, len(site.sources) - 1, None)
      self._sow(module, output, weights, by_name, -1, None, last=True)
    kept.keep(self, "history", {"x": output}, last=True)
    kept.keep(self, "streams", by_name, last=True)
    if kept.is_on("weights"):
      weights = self._final_weights(module, site.block + 1, output, False)
      self._keep_weights(weights, site.streams, output, last=True)
    return streams, carry

  @property
  def _is_recorded(self) -> bool:
    return bool(self.config.record_internal_nn_metrics or metrics.totals() is not None)

  def _keep_norms(self, carry: History | HistoryBuffer, site: Site | None, last=False) -> None:
    if site is not None and kept.is_on("norms"):
      sources = [carry.sources[number - self.plan.oldest] for number in site.sources]
      kept.keep_norms(self, sources, site.streams, last=last)

  def _keep_weights(self, weights: kernels.Weights, streams: str, output: Float[Array, "B T D"], last=False) -> None:
    weights, _ = kernels.token_weights([output], weights)
    kept.keep(self, "weights", {stream: weights[:, :, c] for c, stream in enumerate(streams)}, last=last)

  def _sow(self, module: nnx.Module, output, weights: kernels.Weights, streams: dict, column, visible, last=False):
    """What docs/metrics.md lists: all of it with `record_internal_nn_metrics`, otherwise the part of a total."""

    def dynamic(newest):
      newest, w1 = with_whole_width(newest), with_whole_width(weights.w1, axis=0)
      mlp = dataclasses.replace(kernels.replace_static(weights, jnp.zeros_like), newest=newest, w1=w1)
      return kernels.token_weights([newest], mlp)[0]

    is_dynamic = isinstance(weights, kernels.WeightMLP)
    if is_dynamic:
      metrics.sow_largest(module, dynamic(metrics.sample(output)), last=last)
    if not self.config.record_internal_nn_metrics:
      return
    metrics.sow_aggregate(module, output, weights, streams, column, last=last)
    metrics.sow(module, metrics.ALL, {"output_norm": metrics.root_mean_square(output)}, last=last)
    if is_dynamic:
      metrics.sow_dynamic(module, dynamic(output), "".join(streams), visible, last=last)

  def _link(self, carry, module: Aggregate | None, site: Site | None, weights: Callable, block: Callable | None = None):
    """The static part of an aggregate with the block that reads it, and the aggregate's parameters."""
    runs = passes(self.config, self.mesh, carry.output_shape)
    recomputed = self.config.remat_policy == "full"
    if module is None:
      return Link(self.plan, None, runs, None, block, recomputed), None
    graphdef, parameters = nnx.split(module)

    def from_parameters(parameters, number, output, is_source: bool) -> kernels.Weights:
      return runs.placed(weights(nnx.merge(graphdef, parameters), number, output, is_source))

    return Link(self.plan, site, runs, from_parameters, block, recomputed), parameters

  def _newest_column(self, number):
    return number - 1 - self.plan.oldest if self.config.scan_layers else len(self.table.padded.sources) - 1

  def _weights(self, module: Aggregate, number, output: Float[Array, "B T D"], is_source: bool) -> kernels.Weights:
    """Weights of the sources in the carry that a block's site may see: of all entries of a buffer. A stream that the
    site does not make, or any stream where there is no site, has weights of the newest source alone."""
    table, column = self.table, self._newest_column(number)
    if not self.config.scan_layers:
      weights = _weights(module, output, column, None, is_source)
      return kept.edited(weights, table.padded, self.plan.oldest, output)
    visible = _at(table.visible, table, number)
    weights = _weights(module, output, column, visible, is_source)
    exists = self._fill(visible)
    is_newest = jnp.arange(len(exists)) == column
    makes = None if table.makes_all else _at(table.makes, table, number)[:, None]
    if makes is not None:
      exists = makes & exists
    weights = kernels.map_columns(weights, lambda x: jnp.where(exists, self._fill(x), 0))
    if makes is not None and module.keeps_newest:
      weights = kernels.replace_static(weights, lambda a: jnp.where(makes, a, is_newest.astype(a.dtype)))
    return weights

  def _final_weights(
    self, module: Aggregate, number, output: Float[Array, "B T D"], is_source: bool
  ) -> kernels.Weights:
    sources = self.final_site.sources
    weights = _weights(module, output, len(sources) - 1, None, is_source)
    if not self.config.scan_layers:
      return kept.edited(weights, self.final_site, self.plan.oldest, output)
    at, entries = jnp.asarray(sources) - self.plan.oldest, self.final_site.block + 1 - self.plan.oldest
    return kernels.map_columns(weights, lambda x: jnp.zeros((*x.shape[:-1], entries), x.dtype).at[..., at].set(x))

  def _fill(self, x: Array) -> Array:
    """Padded with zeros to all entries of a buffer."""
    entries = self.plan.num_blocks + 1 - self.plan.oldest
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, entries - x.shape[-1])])


class MtpConnection(HistoryConnection):
  """What follows MTP block k, which counts as block L+k: an aggregate of one stream over the whole history."""

  def __init__(self, family: type[HistoryFamily], config, block: int, mesh: jax.sharding.Mesh, rngs: nnx.Rngs):
    super().__init__(family, config, (), mesh, rngs, starts=False, finishes=False)
    self.output_norm = family.source_norm(config, rngs)
    self.final_site = self.plan.sites[block]
    self.final_depth_aggregate = family.aggregate(config, self.final_site, mesh, rngs)

  def extend(self, history: History | HistoryBuffer, output: Float[Array, "B T D"]) -> MtpInput:
    """What the output head and the next MTP block read, from the history before the block and the block's output."""
    (stream,), history = self._final_streams(history.append(self.write(output), output))
    return MtpInput(stream, history)


def _weights(module: Aggregate, output: Float[Array, "B T D"], column, visible, is_source: bool) -> kernels.Weights:
  """The weights of an aggregate. Where X_i, the input of a `WeightMLP`, is one of the sources, it is taken from them,
  so that a kernel reads it once."""
  weights = module.weights(output, column, visible)
  if is_source and isinstance(weights, kernels.WeightMLP) and weights.newest is output:
    weights = dataclasses.replace(weights, newest=None)
  return weights


def _at(by_block: Sequence, table: layout.Table, number) -> Array:
  """The entry of the block with this number."""
  return jnp.asarray(by_block)[stacks.index(table.blocks, number)]
