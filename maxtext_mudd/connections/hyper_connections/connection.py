"""Hyper-Connections, static or dynamic (DHC×n; Zhu et al., arXiv 2409.19606): n residual streams, mixed before each
sublayer and written to after it. A baseline of the MUDDFormer paper.

For the sublayer number s, from 0 (attention, FFN, attention, ...), and streams H [n,D]:

  α = [onehot(s mod n) | I_n] + s_α·tanh(norm(H) W_α)    [n,n+1]
  β = 1 + s_β·tanh(norm(H) w_β)                          [n]

`multi_stream` says how a sublayer reads and writes; its W is αᵀ.
"""

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxtext_mudd.connections.mesh import contract
from maxtext_mudd.connections.multi_stream import connection as multi_stream
from maxtext_mudd.connections.norms import StreamNorm
from maxtext_mudd.kernels import accumulation_dtype

DYNAMIC_SCALE_INIT = 0.01
LAYER_NORM_EPSILON = 1e-5  # Algorithm 2 of the paper leaves PyTorch's default
HEADS = {"mean": multi_stream.mean, "sum": multi_stream.total}


class HyperWeights(nnx.Module):
  """α and β of one sublayer.

  Parameters, in `weight_dtype`: `static_alpha` [n,n+1] = [onehot(s mod n) | I_n] and `static_beta` [n] = 1, learned
  unless `mudd_static` is off; where `mudd_dynamic` is on, `w_alpha` [D,n+1] and `w_beta` [D,1] zero, their scales
  `alpha_scale` and `beta_scale` [1] 0.01, and the norm's scale [D] one (and bias [D] zero). So the model starts as the
  plain Transformer.
  """

  def __init__(self, config, sublayer: int):
    self.config = config
    n, dtype = config.mudd_expansion_rate, config.weight_dtype
    if config.mudd_static:
      self.static_alpha = nnx.Param(self._initial_alpha(sublayer, dtype), out_sharding=(None, None))
      self.static_beta = nnx.Param(jnp.ones((n,), dtype), out_sharding=(None,))
    if config.mudd_dynamic:
      is_layer_norm = config.mudd_hyper_norm == "layer"
      epsilon = LAYER_NORM_EPSILON if is_layer_norm else config.normalization_layer_epsilon
      self.norm = StreamNorm(config, epsilon, subtracts_mean=is_layer_norm)
      self.w_alpha = nnx.Param(jnp.zeros((config.emb_dim, n + 1), dtype), out_sharding=("embed", None))
      self.w_beta = nnx.Param(jnp.zeros((config.emb_dim, 1), dtype), out_sharding=("embed", None))
      scale = jnp.full((1,), DYNAMIC_SCALE_INIT, dtype)
      self.alpha_scale = nnx.Param(scale, out_sharding=(None,))
      self.beta_scale = nnx.Param(scale, out_sharding=(None,))

  def _initial_alpha(self, sublayer: int | Int[Array, ""], dtype) -> Float[Array, "n n+1"]:
    n = self.config.mudd_expansion_rate
    first = (jnp.arange(n) == sublayer % n).astype(dtype)
    return jnp.concatenate([first[:, None], jnp.eye(n, dtype=dtype)], axis=1)

  def __call__(self, streams: multi_stream.StreamList, sublayer):
    """See `multi_stream.connection.SublayerWeights`."""
    config = self.config
    wide = accumulation_dtype(streams[0].dtype)
    alpha, beta = self._initial_alpha(sublayer, wide), jnp.ones((len(streams),), wide)
    if config.mudd_static:
      alpha, beta = self.static_alpha[...].astype(wide), self.static_beta[...].astype(wide)
    rows = [alpha[i] for i in range(len(streams))]
    entries = [beta[i, None] for i in range(len(streams))]
    if config.mudd_dynamic:
      w = jnp.concatenate([self.w_alpha[...], self.w_beta[...]], axis=1).astype(config.dtype)
      for i, h in enumerate(streams):
        dynamic = jnp.tanh(contract("btd,dk->btk", self.norm(h), w, wide))
        rows[i] = rows[i] + self.alpha_scale[...].astype(wide) * dynamic[..., :-1]
        entries[i] = entries[i] + self.beta_scale[...].astype(wide) * dynamic[..., -1:]
    return jnp.stack(rows, axis=-1), entries


def build(config, blocks, *, starts: bool, finishes: bool) -> multi_stream.StreamsConnection:
  """Hyper-Connections of one block or stack. With `mudd_hyper_end: mean` the final norm's epsilon weighs as much as in
  the plain Transformer that the model starts as; the paper's sum is n times as large, which the final norm removes."""

  def make(sublayer: int) -> HyperWeights:
    return HyperWeights(config, sublayer)

  head = HEADS[config.mudd_hyper_end]
  return multi_stream.StreamsConnection(config, blocks, make, head, starts=starts, finishes=finishes)
