"""A Vision Transformer with depth connections.

The model is that of big_vision's baseline (Beyer et al., arXiv 2205.01580): patch embedding, fixed sines and cosines of
both coordinates, pre-norm blocks, LayerNorm, the mean over patches, and one linear layer. Each block has a depth
connection, which makes its inputs. Connections work token by token; attention is between all patches.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32
import numpy as np

from maxtext_mudd import connections
from maxtext_mudd.connections.base import Connection
from maxtext_mudd.connections.connection import HistoryConnection
from maxtext_mudd.connections.mudd import Dense
from maxtext_mudd.connections.mudd.aggregate import DepthAggregate
from maxtext_mudd.vit.config import VitConfig

Key = UInt32[Array, "2"]  # of random numbers; None: no dropout

_CONNECTION_SEED = 0x6D756464  # separates the keys of the connections from those of the plain model
_TEMPERATURE = 10_000.0


class Attention(nnx.Module):
  """Attention between all patches. With separate streams, each projection reads its own, through its class
  (`blocks.streams.decouple`)."""

  def __init__(self, config: VitConfig, rngs: nnx.Rngs):
    self.heads = config.heads
    self.query, self.key, self.value, self.out = (_linear(config, config.width, config.width, rngs) for _ in range(4))

  def __call__(self, x: Any) -> Float[Array, "B T D"]:
    query, key, value = (y.reshape(*y.shape[:2], self.heads, -1) for y in (self.query(x), self.key(x), self.value(x)))
    mixed = jax.nn.dot_product_attention(query, key, value)
    return self.out(mixed.reshape(*mixed.shape[:2], -1))


class Mlp(nnx.Module):
  """The MLP of a block, with GELU (tanh-approximated, as in big_vision)."""

  def __init__(self, config: VitConfig, rngs: nnx.Rngs):
    near_zero = nnx.initializers.normal(1e-6)
    self.wi = _linear(config, config.width, config.mlp_dim, rngs, bias_init=near_zero)
    self.wo = _linear(config, config.mlp_dim, config.width, rngs, bias_init=near_zero)
    self.dropout = config.dropout

  def __call__(self, x: Float[Array, "B T D"], key: Key | None) -> Float[Array, "B T D"]:
    return self.wo(drop(nnx.gelu(self.wi(x)), self.dropout, key, 0))


class EncoderBlock(nnx.Module):
  """A pre-norm block, whose connection makes what its sublayers read."""

  def __init__(self, config: VitConfig, rngs: nnx.Rngs):
    self.dropout = config.dropout
    self.rematerialises = config.remat
    self.attention_norm = _layer_norm(config, rngs)
    self.attention = Attention(config, rngs)
    self.mlp_norm = _layer_norm(config, rngs)
    self.mlp = Mlp(config, rngs)

  def connect(self, connection: Connection) -> None:
    """Puts a connection around the block."""
    self.connection = connection
    connection.adapt(self)

  def __call__(self, x: Any, key: Key | None) -> Any:
    """The output for what `Connection.read` returns: an array [B,T,D], `Streams` or a `SublayerInput`."""
    x = x + drop(self.attention(self.attention_norm(x)), self.dropout, key, 1)
    return x + drop(self.mlp(self.mlp_norm(x), key), self.dropout, key, 2)

  def through(self, carry: Any, key: Key | None) -> Any:
    """The carry of the connections after this block."""
    graphdef, params, others = nnx.split(self, nnx.Param, ...)

    def block(state, *inputs):
      *inputs, key = inputs
      layer = nnx.merge(graphdef, *state)
      output = layer(layer.connection.read(*inputs), key)
      _, _, others = nnx.split(layer, nnx.Param, ...)
      return layer.connection.write(output), output, others

    if self.rematerialises and not isinstance(self.connection, HistoryConnection):  # which recomputes by itself
      block = jax.checkpoint(block)
    carry, others = self.connection.through(block, (params, others), carry, key)
    nnx.update(self, others)
    return carry


class ViT(nnx.Module):
  """From images [B,H,W,C], in [-1, 1], to logits [B,classes] in float32.

  Initial values are those of big_vision: Xavier uniform for kernels, LeCun normal for the patch embedding, zero for the
  head. Parameters of the plain model start the same with and without connections.

  Args:
    mesh: of the devices, with the axes data and fsdp.
  """

  def __init__(self, config: VitConfig, mesh: jax.sharding.Mesh, rngs: nnx.Rngs):
    self.config = config
    pixels = config.patch**2 * config.channels
    self.embedding = _linear(config, pixels, config.width, rngs, kernel_init=nnx.initializers.lecun_normal())
    self.blocks = nnx.List(EncoderBlock(config, rngs) for _ in range(config.depth))
    self.norm = _layer_norm(config, rngs)
    self.head = _linear(config, config.width, config.classes, rngs, kernel_init=nnx.initializers.zeros)
    family = family_of(config)
    for number, block in enumerate(self.blocks, 1):
      of_connection = nnx.Rngs(params=jax.random.fold_in(rngs.params.key[...], _CONNECTION_SEED + number))
      ends = {"starts": number == 1, "finishes": number == config.depth}
      block.connect(family.build(config, (number,), mesh, of_connection, **ends))
    family.share(self)
    scale = family.output_init_scale(config)
    if scale != 1:
      for block in self.blocks:
        for writer in (block.attention.out, block.mlp.wo):
          writer.kernel.set_value(scale * writer.kernel.get_value())

  def __call__(self, images: Float[Array, "B H W C"], key: Key | None = None) -> Float[Array, "B classes"]:
    """
    Args:
      key: of dropout; None: no dropout.
    """
    config, side = self.config, self.config.image_size // self.config.patch
    x = self.embedding(patches(images, config.patch).astype(config.dtype))
    x = x + jnp.asarray(sines_and_cosines(side, side, config.width), x.dtype)
    carry = self.blocks[0].connection.start(drop(x, config.dropout, key, 0))
    for number, block in enumerate(self.blocks, 1):
      carry = block.through(carry, None if key is None else _fold(key, number))
    hidden, *_ = self.blocks[-1].connection.finish(carry)
    return self.head(self.norm(hidden).mean(1)).astype(jnp.float32)


class ScaledAggregate(DepthAggregate):
  """A DA whose aggregates are multiplied by a learned coefficient λ, before X_i is added: x^c = λ Σ_j W_cj X_j + X_i.

  Parameters: those of `DepthAggregate`, without static weights; `coefficient` [1] one. With `w2` zero the streams are
  X_i at the start.
  """

  def __init__(self, config, site, mesh, rngs):
    super().__init__(config, site, mesh, rngs)
    self.keeps_newest = False
    self.coefficient = nnx.Param(jnp.ones((1,), config.weight_dtype))

  def _initial_static(self, dtype, column=-1):
    return jnp.zeros((self.site.ways, len(self.site.sources)), dtype)

  def streams(self, sums, output):
    coefficient = self.coefficient[...].astype(output.dtype)
    return [coefficient * x + output for x in sums]


class _ScaledDense(Dense):
  @classmethod
  def aggregate(cls, config, site, mesh, rngs):
    return ScaledAggregate(config, site, mesh, rngs)


def family_of(config: VitConfig) -> type[connections.Family]:
  """The family of connections that a configuration names; without `mudd` the residual one."""
  return _ScaledDense if config.aggregate_coefficient else connections.FAMILIES[config.connection]


def patches(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B T P"]:
  """The pixels of each patch, in the order of a convolution's kernel: rows, columns, channels."""
  batch, height, width, channels = images.shape
  x = images.reshape(batch, height // size, size, width // size, size, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


def sines_and_cosines(rows: int, columns: int, width: int) -> Float[np.ndarray, "T D"]:
  """Fixed position embeddings: sin and cos of x, then of y, at `width`/4 frequencies from 1 to 1/10000."""
  quarter = width // 4
  frequencies = _TEMPERATURE ** -(np.arange(quarter) / max(quarter - 1, 1))
  y, x = (grid.reshape(-1, 1) * frequencies for grid in np.mgrid[:rows, :columns])
  return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], -1)


def drop(x: Float[Array, "..."], rate: float, key: Key | None, number: int) -> Float[Array, "..."]:
  """Dropout.

  Args:
    number: of the place, so that places with one key drop different entries.
  """
  if key is None or rate == 0:
    return x
  kept = jax.random.bernoulli(_fold(key, number), 1 - rate, x.shape)
  return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


def _fold(key: Key, number: int) -> Key:
  return jax.random.fold_in(key, number)


def _linear(config: VitConfig, inputs: int, outputs: int, rngs: nnx.Rngs, **kwargs) -> nnx.Linear:
  kwargs = {"kernel_init": nnx.initializers.xavier_uniform(), **kwargs}
  return nnx.Linear(inputs, outputs, dtype=config.dtype, rngs=rngs, **kwargs)


def _layer_norm(config: VitConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
  epsilon = config.normalization_layer_epsilon
  return nnx.LayerNorm(config.width, epsilon=epsilon, dtype=config.dtype, use_fast_variance=False, rngs=rngs)
