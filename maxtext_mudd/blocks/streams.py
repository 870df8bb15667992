"""The query, key, value and residual streams, and the changes that let a stock decoder layer read them.

A stock layer computes `norm(x)`, attention of that, and `x + attention`. With `Streams` as x, the norm becomes three
(LN_q, LN_k, LN_v), each projection of attention reads its own stream, and the residual stream is added. This is Eq. 7
of the paper. `Streams` pass through the `__call__`s of the layer and of its attention, which do not change: until a
projection, they only shard their input and ask for its shape.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import operator
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.inference.kvcache import MlaKVCache
from maxtext.layers.attention_mla import MLA
from maxtext.layers.linears import DenseGeneral
from maxtext.layers.mhc import ManifoldConstrainedHyperConnections
from maxtext.models.gpt3 import Gpt3MultiHeadAttention
from maxtext.models.qwen3 import Qwen3NextGatedDeltaNet
from maxtext.utils.sharding import logical_to_mesh_axes

from maxtext_mudd.blocks import BlockSpec
from maxtext_mudd.blocks.classes import change_class

# The stream that a projection of attention reads, by its name in MaxText's attention modules. What decides how much is
# written and forgotten in a gated delta net reads what its keys read. In compressed attention the vectors that are keys
# and values, and their gates, read k.
_READS = {
  "query": "q",
  "key": "k",
  "value": "v",
  "wq_a": "q",
  "wk": "k",
  "weights_proj": "q",
  "in_proj_ba": "k",
  "wkv": "k",
  "kv_proj": "k",
  "gate_proj": "k",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
  """The four inputs of a block. Not a tuple, since stock layers unpack tuples.

  Attributes:
    q, k, v: Inputs of the query, key and value projections, [B,T,D] each; before MaxText's mHC, [B,T,n,D]. After the
      norms, None for a projection that the layer does not have.
    r: The residual stream, [B,T,D]. After the norms it is normed for a feed-forward block that shares the norm of
      attention, and None for others.
    norm_parameter: Chooses between (parameter of LN_k or LN_v, the same of LN_q) for one layer of a scanned stack in
      which some blocks have LN_q alone. None if every stream has its own norm.
  """

  q: Any
  k: Any
  v: Any
  r: Any = None
  norm_parameter: Callable | None = dataclasses.field(default=None, metadata={"static": True})

  def __add__(self, update: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return self.r + update

  __radd__ = __add__

  @property
  def shape(self) -> tuple[int, ...]:
    return self.q.shape


class StreamNorm(nnx.Module):
  """Copies of the stock attention norm: LN_q, LN_k and LN_v of Eq. 7 (`sepln` in the authors' code).

  Args:
    streams: those that have a norm, q first. The residual stream has one for a feed-forward block that shares the norm
      of attention. Values that are keys have none, nor have keys and values of an earlier layer.
  """

  def __init__(self, norm: nnx.Module, streams: str):
    for stream in streams:
      setattr(self, stream, norm if stream == "q" else nnx.clone(norm))

  def __call__(self, inputs: Streams, **kwargs) -> Streams:
    choose = inputs.norm_parameter
    normed = {
      stream: self._chosen(getattr(self, stream), choose)(getattr(inputs, stream), **kwargs)
      for stream in "qkvr"
      if hasattr(self, stream)
    }
    return Streams(**{"k": None, "v": None, **normed})

  def _chosen(self, norm: nnx.Module, choose: Callable | None) -> nnx.Module:
    if choose is None or norm is self.q:
      return norm
    graphdef, parameters = nnx.split(norm)
    return nnx.merge(graphdef, jax.tree.map(choose, parameters, nnx.state(self.q)))


@functools.cache
def reading(module_class: type[nnx.Module], attribute: str) -> type[nnx.Module]:
  """A module class that reads one attribute of its input, such as one of `Streams`."""

  class Reading(module_class):
    @functools.wraps(module_class.__call__)
    def __call__(self, inputs, *args, **kwargs):
      return super().__call__(getattr(inputs, attribute), *args, **kwargs)

  Reading.__name__ = Reading.__qualname__ = f"{module_class.__name__}Reading{attribute.capitalize()}"
  return Reading


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which columns of a fused projection read which stream, along the first axis of its output features.

  Attributes:
    groups: the number of equal groups of columns.
    parts: of each group, in order: (stream, number of columns).
  """

  groups: int
  parts: tuple[tuple[str, int], ...]


@functools.cache
def _reading_by_columns(projection_class: type[DenseGeneral], columns: Columns) -> type[DenseGeneral]:
  class ReadingByColumns(projection_class):
    """Computes one product for each part of the columns, from the stream of that part."""

    @functools.wraps(projection_class.__call__)
    def __call__(self, inputs: Streams, *args, **kwargs):
      graphdef, params, others = nnx.split(self, nnx.Param, ...)
      axis, outputs, first = inputs.q.ndim - 1, [], 0
      for stream, size in columns.parts:
        part = nnx.merge(graphdef, self._columns(params, slice(first, first + size)), others)
        part.out_features_shape = (columns.groups * size, *self.out_features_shape[1:])
        output = projection_class.__call__(part, getattr(inputs, stream), *args, **kwargs)
        outputs.append(output.reshape(*output.shape[:axis], columns.groups, size, *output.shape[axis + 1 :]))
        first += size
      output = jnp.concatenate(outputs, axis + 1)
      return output.reshape(*output.shape[:axis], -1, *output.shape[axis + 2 :])

    def _columns(self, params: nnx.State, of_group: slice) -> nnx.State:
      def cut(path, variable):
        axis = len(self.in_features_shape) if path[-1] == "kernel" else 0
        value = variable.get_value()
        value = value.reshape(*value.shape[:axis], columns.groups, -1, *value.shape[axis + 1 :])
        value = value[(slice(None),) * (axis + 1) + (of_group,)]
        return variable.replace(value.reshape(*value.shape[:axis], -1, *value.shape[axis + 2 :]))

      return nnx.from_flat_state((path, cut(path, variable)) for path, variable in nnx.to_flat_state(params))

  return ReadingByColumns


def _fused_projection(module: nnx.Module) -> tuple[DenseGeneral, Columns] | None:
  """The fused projection of an attention module, if it has one."""
  if isinstance(module, Qwen3NextGatedDeltaNet):
    key, value = module.head_k_dim, module.v_heads_per_k_head * module.head_v_dim
    parts = (("q", key), ("k", key), ("v", value), ("q", value))  # the last is the gate of the output
    return module.in_proj_qkvz, Columns(module.num_k_heads, parts)
  if not hasattr(module, "qkv_proj"):
    return None
  if isinstance(module, Gpt3MultiHeadAttention):
    return module.qkv_proj, Columns(1, (("q", 1), ("k", 1), ("v", 1)))
  # Each device that shares the heads has queries, keys and values of its part of them.
  axes = logical_to_mesh_axes(module.query_axis_names, module.mesh, module.config.logical_axis_rules)
  shards = math.prod(module.mesh.shape[axis] for axis in _axes(axes[2]))
  q, kv = module.num_query_heads // shards, module.num_kv_heads // shards
  return module.qkv_proj, Columns(shards, (("q", q), ("k", kv), ("v", kv)))


def _axes(of_dimension: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes that shard one dimension."""
  return (of_dimension,) if isinstance(of_dimension, str) else tuple(of_dimension or ())


class LatentAttention(MLA):
  """MaxText's latent attention with two latents, of keys and of values, that one matrix makes of their streams.

  The rotated part of keys is of their stream. Where both streams are equal this is stock attention with the same
  parameters. Methods of MaxText pass the two latents on as one array [B,T,2R], which a cache of latents holds, too.
  """

  def mla_kv_projection(self, inputs, inputs_positions, decoder_segment_ids, model_mode, previous_chunk):
    def latent_of(stream):  # in training mode, since only what both streams make is cached
      return MLA.mla_kv_projection(
        _Changed(self, _build_key_value=lambda latent, rotated, model_mode: (latent, rotated)),
        stream,
        inputs_positions,
        decoder_segment_ids,
        MODEL_MODE_TRAIN,
        None,
      )

    (of_keys, rotated, _), (of_values, *_) = latent_of(inputs.k), latent_of(inputs.v)
    latents = jnp.concatenate([of_keys, of_values], -1)
    key, value = self._build_key_value(latents, rotated, model_mode)
    cached, segments = [None, None], decoder_segment_ids
    if model_mode != MODEL_MODE_TRAIN and self.config.mla_naive_kvcache:
      cached = self.update_kv_caches(key, value, segments, model_mode, previous_chunk)
    elif model_mode != MODEL_MODE_TRAIN:
      cached = self.update_mla_kv_caches(latents, rotated, segments, model_mode, previous_chunk)
    return key, value, cached

  def _build_key_value(self, latents: Float[Array, "B T 2R"], rotated: Float[Array, "B T 1 P"], model_mode):
    of_keys, of_values = jnp.split(latents, 2, -1)
    key, _ = super()._build_key_value(of_keys, rotated, model_mode)
    _, value = super()._build_key_value(of_values, rotated, model_mode)
    return key, value


def _hold_two_latents(cache: MlaKVCache) -> None:
  """Makes a cache of latents, or the caches of a stack of layers, as wide as two latents."""
  cache.key_head_size *= 2
  orders = (cache.prefill_cache_axis_order, cache.ar_cache_axis_order)
  for variable, order in zip((cache.cached_prefill_key, cache.cached_ar_key), orders):
    if variable is not None:
      x = variable.get_value()
      variable.set_value(jnp.concatenate([x, x], order.index(3) - len(order)))


class _Changed:
  """An object with some attributes replaced, for methods of its class."""

  def __init__(self, of, **attributes):
    self.__dict__.update(attributes, _of=of)

  def __getattr__(self, name: str):
    return getattr(self._of, name)


class HyperConnections(ManifoldConstrainedHyperConnections):
  """MaxText's hyper-connections, which read the layer inputs of q, k and v out of one stream each.

  One set of weights reads all of them. What attention returns is added to the hyper-streams of the residual stream.
  Where all streams are equal these are stock hyper-connections, with the same parameters.
  """

  @functools.wraps(ManifoldConstrainedHyperConnections.__call__)
  def __call__(self, norm_fn, branch_fn, x: Streams, mhc_type, **kwargs):
    def layer_input(stream: Float[Array, "B T n D"]) -> Float[Array, "B T D"]:
      taken = []  # the rest of what stock computes of the stream is not used

      def branch(inputs_q, inputs_kv):
        taken.append(inputs_q)
        return inputs_q, None

      super(HyperConnections, self).__call__(lambda inputs: inputs, branch, stream, mhc_type)
      return taken[0]

    streams = Streams(*map(layer_input, (x.q, x.k, x.v)), norm_parameter=x.norm_parameter)
    return super().__call__(lambda _: norm_fn(streams), branch_fn, x.r, mhc_type, **kwargs)


def decouple(layer: nnx.Module, block: BlockSpec, streams: str) -> None:
  """Makes a stock decoder layer, or one with projections of Flax, read `Streams`.

  Its attention norm becomes three, LN_q, LN_k and LN_v, which start equal. Each projection of its attention then reads
  its own stream.

  Args:
    layer: a layer of that block.
    streams: those that its attention norm serves, `blocks.normed_streams`.
  """
  if block.attention_norm:
    setattr(layer, block.attention_norm, StreamNorm(getattr(layer, block.attention_norm), streams))
  attention = operator.attrgetter(block.attention)(layer)
  for path, module in list(nnx.iter_modules(attention)):
    if isinstance(module, (DenseGeneral, nnx.Linear)) and path[-1] in _READS:
      change_class(module, reading(type(module), _READS[path[-1]]))
    elif fused := _fused_projection(module):
      projection, columns = fused
      change_class(projection, _reading_by_columns(type(projection), columns))
  if isinstance(attention, MLA):
    change_class(attention, LatentAttention)
    if attention.MlaKVCache_0 is not None and not attention.config.mla_naive_kvcache:
      _hold_two_latents(attention.MlaKVCache_0)
  if hasattr(layer, "mhc_attention"):
    change_class(layer.mhc_attention, HyperConnections)
  if block.shares_norm:
    change_class(layer.mlp, reading(type(layer.mlp), "r"))
