"""The q, k, v and residual streams, and what lets a stock decoder layer read them.

A stock layer computes `norm(x)`, attention of it, and `x + attention`. With `Streams` for x, the norm becomes three
(LN_q, LN_k, LN_v), attention projects each stream by its own matrix, and the sum takes the residual stream: Eq. 7 of
the paper, with the layer's own `__call__` unchanged.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
from jaxtyping import Array, Float
from maxtext.layers.attentions import Attention
from maxtext.models.gpt3 import Gpt3MultiHeadAttention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
  """What a decoupled block reads. Not a tuple: stock layers unpack tuples.

  Attributes:
    q, k, v: inputs of the query, key and value projections, [B,T,D].
    r: the residual stream, [B,T,D]; None after the norms, where nothing reads it.
    norm_parameter: where layers are scanned, some may have LN_q for all streams: (parameter of LN_k or LN_v, of LN_q)
      -> the one that holds in this layer. None: every stream has its own.
  """

  q: Any
  k: Any
  v: Any
  r: Any = None
  norm_parameter: Callable | None = dataclasses.field(default=None, metadata={"static": True})

  def __add__(self, update: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return self.r + update

  __radd__ = __add__


def pick(inputs: Any, stream: str) -> Float[Array, "B T D"]:
  """One stream of `Streams`; anything else serves every stream."""
  return getattr(inputs, stream) if isinstance(inputs, Streams) else inputs


class StreamNorm(nnx.Module):
  """Three attention norms of the kind of the stock one: LN_q, LN_k, LN_v (paper, Eq. 7; released: "sepln")."""

  def __init__(self, norm: nnx.Module):
    self.q = norm
    self.k = nnx.clone(norm)
    self.v = nnx.clone(norm)

  def __call__(self, inputs: Streams | Float[Array, "B T D"], **kwargs) -> Streams:
    choose = inputs.norm_parameter if isinstance(inputs, Streams) else None
    norms = {"q": self.q, "k": self._chosen(self.k, choose), "v": self._chosen(self.v, choose)}
    return Streams(*(norm(pick(inputs, c), **kwargs) for c, norm in norms.items()))

  def _chosen(self, norm: nnx.Module, choose: Callable | None) -> nnx.Module:
    if choose is None:
      return norm
    graphdef, own = nnx.split(norm)
    return nnx.merge(graphdef, jax.tree.map(choose, own, nnx.state(self.q)))


class MultiwayAttention(Attention):
  """Stock attention, each projection reading its own stream; the KV cache works as it does there."""

  def query_projection(self, inputs_q, out_sharding=None):
    return super().query_projection(pick(inputs_q, "q"), out_sharding=out_sharding)

  def kv_projection(self, inputs_kv, proj_name, out_sharding=None):
    stream = {"key": "k", "value": "v"}[proj_name]
    return super().kv_projection(pick(inputs_kv, stream), proj_name, out_sharding=out_sharding)


class MultiwayGpt3Attention(Gpt3MultiHeadAttention):
  """The same for gpt3, whose one `projection` method serves query, key, value and output."""

  def projection(self, projection_layer, inputs):
    stream = {id(self.query): "q", id(self.key): "k", id(self.value): "v"}.get(id(projection_layer), "q")
    return super().projection(projection_layer, pick(inputs, stream))


_MULTIWAY = {Attention: MultiwayAttention, Gpt3MultiHeadAttention: MultiwayGpt3Attention}


def decouple(layer: nnx.Module, norm_name: str) -> None:
  """Makes a stock decoder layer read `Streams`: three norms for its attention norm, and the multiway attention.

  The attention object keeps its parameters and its place; only its class becomes the subclass, which adds no state.
  """
  setattr(layer, norm_name, StreamNorm(getattr(layer, norm_name)))
  layer.self_attention.__class__ = _MULTIWAY[type(layer.self_attention)]
