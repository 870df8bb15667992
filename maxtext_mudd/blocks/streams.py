"""The query, key, value and residual streams, and the changes that let a stock decoder layer read them.

A stock layer computes `norm(x)`, attention of that, and `x + attention`. With `Streams` as x, the norm becomes three
(LN_q, LN_k, LN_v), each projection of attention reads its own stream, and the residual stream is added. This is Eq. 7
of the paper, and the layer's `__call__` does not change.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
from jaxtyping import Array, Float
from maxtext.layers.attentions import Attention
from maxtext.models.gpt3 import Gpt3MultiHeadAttention

from maxtext_mudd.blocks.classes import change_class


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
  """The four inputs of a block. Not a tuple, since stock layers unpack tuples.

  Attributes:
    q, k, v: Inputs of the query, key and value projections, [B,T,D] each.
    r: The residual stream, [B,T,D]. None after the norms, since attention does not read it.
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


class StreamNorm(nnx.Module):
  """Three copies of the stock attention norm: LN_q, LN_k and LN_v of Eq. 7 (`sepln` in the authors' code)."""

  def __init__(self, norm: nnx.Module):
    self.q = norm
    self.k = nnx.clone(norm)
    self.v = nnx.clone(norm)

  def __call__(self, inputs: Streams, **kwargs) -> Streams:
    k, v = (self._chosen(norm, inputs.norm_parameter) for norm in (self.k, self.v))
    return Streams(self.q(inputs.q, **kwargs), k(inputs.k, **kwargs), v(inputs.v, **kwargs))

  def _chosen(self, norm: nnx.Module, choose: Callable | None) -> nnx.Module:
    if choose is None:
      return norm
    graphdef, parameters = nnx.split(norm)
    return nnx.merge(graphdef, jax.tree.map(choose, parameters, nnx.state(self.q)))


class MultiwayAttention(Attention):
  """Stock attention in which each projection reads its own stream. The KV cache does not change."""

  def query_projection(self, inputs_q, out_sharding=None):
    return super().query_projection(inputs_q.q, out_sharding=out_sharding)

  def kv_projection(self, inputs_kv, proj_name, out_sharding=None):
    stream = {"key": inputs_kv.k, "value": inputs_kv.v}[proj_name]
    return super().kv_projection(stream, proj_name, out_sharding=out_sharding)


class MultiwayGpt3Attention(Gpt3MultiHeadAttention):
  """GPT-3's attention in which each projection reads its own stream; one method projects
  queries, keys, values and outputs."""

  def projection(self, projection_layer, inputs):
    stream = {id(self.query): "q", id(self.key): "k", id(self.value): "v"}.get(id(projection_layer))
    return super().projection(projection_layer, getattr(inputs, stream) if stream else inputs)


_MULTIWAY = {Attention: MultiwayAttention, Gpt3MultiHeadAttention: MultiwayGpt3Attention}


def decouple(layer: nnx.Module, norm_name: str) -> None:
  """Makes a stock decoder layer read `Streams`.

  Its attention norm becomes three, LN_q, LN_k and LN_v, which start equal. Each projection of its attention then reads
  its own stream.

  Args:
    layer: a layer of one of `BLOCKS`.
    norm_name: `BlockSpec.attention_norm` of its block.
  """
  setattr(layer, norm_name, StreamNorm(getattr(layer, norm_name)))
  change_class(layer.self_attention, _MULTIWAY[type(layer.self_attention)])
