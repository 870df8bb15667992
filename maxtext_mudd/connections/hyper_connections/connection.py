"""Hyper-Connections with dynamic weights, DHC×n (Zhu et al., arXiv 2409.19606): n residual streams, mixed before each
sublayer and written to after it. A baseline of the MUDDFormer paper.

For the sublayer with function F, streams H [n,D] and its number s from 0 (attention, FFN, attention, ...):

  α = [onehot(s mod n) | I_n] + s_α·tanh(norm(H) W_α)    [n,n+1]
  β = 1 + s_β·tanh(norm(H) w_β)                          [n]
  M = αᵀH;  H' = M[1:] + β ⊗ F(M[0])
"""

from collections.abc import Callable, Sequence
import dataclasses
import operator
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from maxtext.layers.normalizations import RMSNorm
from maxtext.models.gpt3 import Gpt3LayerNorm

from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.blocks.classes import change_class
from maxtext_mudd.connections.connection import PlainConnection
from maxtext_mudd.connections.norms import rms_norm
from maxtext_mudd.kernels import accumulation_dtype, mix

DYNAMIC_SCALE_INIT = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HyperStreams:
  """H: n residual streams, one [B,T,D] array each, never stacked. Not a tuple: stock layers unpack tuples."""

  streams: tuple[Float[Array, "B T D"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HyperCarry:
  """What flows between blocks. Stock layers see `hyper` alone: they shard every array that they take or return as a
  [B,T,D] array.

  Attributes:
    hyper: the residual streams.
    sublayer: number of the sublayer that reads them next, from 0; known at run time only where layers are scanned.
  """

  hyper: HyperStreams
  sublayer: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SublayerInput:
  """M, as a stock layer sees it: its norm reads M[0], and adding the sublayer's output F gives what comes next.

  Attributes:
    read: M[0], [B,T,D].
    carried: M[1:], n arrays [B,T,D].
    write: from M[1:] and F to the next SublayerInput or, after the FFN, to HyperStreams.
  """

  read: Any
  carried: tuple[Any, ...]
  write: Callable = dataclasses.field(metadata={"static": True})

  def __add__(self, output: Float[Array, "B T D"]):
    return self.write(self.carried, output)

  __radd__ = __add__


class HyperRMSNorm(RMSNorm):
  """RMSNorm, applied to M[0]."""

  def __call__(self, x: SublayerInput, **kwargs):
    return super().__call__(x.read, **kwargs)


class HyperGpt3LayerNorm(Gpt3LayerNorm):
  """GPT-3's LayerNorm, applied to M[0]."""

  def __call__(self, x: SublayerInput, **kwargs):
    return super().__call__(x.read, **kwargs)


_READING = {RMSNorm: HyperRMSNorm, Gpt3LayerNorm: HyperGpt3LayerNorm}


class SublayerConnection(nnx.Module):
  """α and β of one sublayer.

  Parameters, in `weight_dtype`: `static_alpha` [n,n+1] = [onehot(s mod n) | I_n] and `static_beta` [n] = 1, learned
  unless `mudd_static` is off; where `mudd_dynamic` is on, `w_alpha` [D,n+1] and `w_beta` [D,1] zero, their scales
  `alpha_scale` and `beta_scale` [1] 0.01, and the norm's scale [D] one. So the model starts as the plain Transformer.
  """

  def __init__(self, config, sublayer: int, rngs: nnx.Rngs):
    self.config = config
    n, dtype = config.mudd_expansion_rate, config.weight_dtype
    if config.mudd_static:
      self.static_alpha = nnx.Param(self._initial_alpha(sublayer, dtype), out_sharding=(None, None))
      self.static_beta = nnx.Param(jnp.ones((n,), dtype), out_sharding=(None,))
    if config.mudd_dynamic:
      self.norm = rms_norm(config, rngs)
      self.w_alpha = nnx.Param(jnp.zeros((config.emb_dim, n + 1), dtype), out_sharding=("embed", None))
      self.w_beta = nnx.Param(jnp.zeros((config.emb_dim, 1), dtype), out_sharding=("embed", None))
      scale = jnp.full((1,), DYNAMIC_SCALE_INIT, dtype)
      self.alpha_scale = nnx.Param(scale, out_sharding=(None,))
      self.beta_scale = nnx.Param(scale, out_sharding=(None,))

  def _initial_alpha(self, sublayer: int | Int[Array, ""], dtype) -> Float[Array, "n n+1"]:
    n = self.config.mudd_expansion_rate
    first = (jnp.arange(n) == sublayer % n).astype(dtype)
    return jnp.concatenate([first[:, None], jnp.eye(n, dtype=dtype)], axis=1)

  def weights(self, streams, sublayer) -> tuple[list[Float[Array, "B T n+1"]], list[Float[Array, "B T 1"]]]:
    """Rows of α and entries of β, one per stream, in at least float32."""
    config = self.config
    wide = accumulation_dtype(streams[0].dtype)
    static_alpha, static_beta = self._initial_alpha(sublayer, wide), jnp.ones((len(streams),), wide)
    if config.mudd_static:
      static_alpha, static_beta = self.static_alpha[...].astype(wide), self.static_beta[...].astype(wide)
    rows = [static_alpha[i] for i in range(len(streams))]
    entries = [static_beta[i, None] for i in range(len(streams))]
    if config.mudd_dynamic:
      w = jnp.concatenate([self.w_alpha[...], self.w_beta[...]], axis=1).astype(config.dtype)
      for i, h in enumerate(streams):
        dynamic = jnp.tanh(jnp.einsum("btd,dk->btk", self.norm(h), w, preferred_element_type=wide))
        rows[i] = rows[i] + self.alpha_scale[...].astype(wide) * dynamic[..., :-1]
        entries[i] = entries[i] + self.beta_scale[...].astype(wide) * dynamic[..., -1:]
    return rows, entries

  def __call__(self, hyper: HyperStreams, sublayer: Int[Array, ""], after: Callable) -> SublayerInput:
    """M of these streams; `after` takes the HyperStreams that the sublayer's output makes."""
    streams = hyper.streams
    with jax.default_matmul_precision(self.config.matmul_precision.value):
      alpha, beta = self.weights(streams, sublayer)
    wide = alpha[0].dtype
    # In plain JAX: XLA can fuse this with the writes before it, which are n times as many bytes as a sublayer's output.
    mixed = mix(streams, jnp.stack(alpha, axis=-1), implementation="xla")

    def write(carried, output):
      added = (m.astype(wide) + b * output.astype(wide) for m, b in zip(carried, beta))
      return after(HyperStreams(tuple(x.astype(output.dtype) for x in added)))

    return SublayerInput(mixed[0], tuple(mixed[1:]), write)


class HyperConnection(PlainConnection):
  """Hyper-connections of one block: one before attention, one before the FFN. Where layers are scanned, those of all
  blocks of a stack; the carry knows the number of the block."""

  def __init__(self, config, blocks: Sequence[int], rngs: nnx.Rngs, *, starts: bool, finishes: bool):
    super().__init__(blocks, starts=starts, finishes=finishes)
    self.config = config
    if blocks:
      first = 2 * (blocks[0] - 1)
      self.attention = SublayerConnection(config, first, rngs)
      self.feed_forward = SublayerConnection(config, first + 1, rngs)

  def adapt(self, layer: nnx.Module) -> None:
    """Makes the norms before attention and before the feed-forward block of the layer read M[0]."""
    block = block_spec(self.config)
    for path in (block.attention_norm, block.feed_forward_norm):
      norm = operator.attrgetter(path)(layer)
      change_class(norm, _READING[type(norm)])

  def start(self, embedding: Float[Array, "B T D"], rematerialise: Callable | None = None) -> HyperCarry:
    streams = HyperStreams((embedding,) * self.config.mudd_expansion_rate)
    return HyperCarry(streams, jnp.zeros((), jnp.int32))

  def through(self, block: Callable, state: Any, carry: HyperCarry, arguments: Any) -> tuple[HyperCarry, Any]:
    hyper, _, rest = block(state, carry.hyper, carry.sublayer, arguments)
    return HyperCarry(hyper, carry.sublayer + 2), rest

  def read(self, hyper: HyperStreams, sublayer: Int[Array, ""]) -> SublayerInput:
    def after_attention(hyper):
      return self.feed_forward(hyper, sublayer + 1, after=lambda last: last)

    return self.attention(hyper, sublayer, after_attention)

  def finish(self, carry: HyperCarry, sown: Any = ()) -> tuple[Float[Array, "B T D"], Any]:
    """The sum of the streams, over n. The final norm removes the factor again; without it the norm's epsilon would
    weigh less than in the plain Transformer that the model starts as. Equal streams give their value exactly."""
    first, *others = carry.hyper.streams
    wide = accumulation_dtype(first.dtype)
    excess = sum((h.astype(wide) - first.astype(wide) for h in others), jnp.zeros((), wide))
    return (first.astype(wide) + excess / len(carry.hyper.streams)).astype(first.dtype), sown
