"""Manifold-constrained Hyper-Connections (mHC, Xie et al., arXiv 2512.24880), and mHC-lite (arXiv 2601.05732).

Before each sublayer, for each token and streams X [n,D], where x̂ = RMS(X) over all n·D numbers:

  A_pre  = σ(α_1 x̂ φ_pre + b_pre)                        [n]
  A_post = 2 σ(α_2 x̂ φ_post + b_post)                    [n]
  R      = S(α_3 x̂ φ_res + b_res)                        [n,n], with rows and columns that sum to one
  X ← R X + A_post ⊗ F(A_pre X)

In the terms of `multi_stream`, W is A_pre above R, and β is A_post. `mudd_mhc_mixing` names the code whose S, norm
and orientation of the logits are used:

  deepseek      [source, target] logits. Softmax over targets, plus ε; then division by sums over sources and over
                targets in turn, over sources last. So the rows of R are exact, as in the paper. RMSNorm with ε in the
                root; A_pre + ε. This is DeepSeek-V4 in TileKernels, transformers and MaxText.
  megatron      [target, source] logits. Exp; then division by sums over sources and by sums over targets in turn, none
                taken below ε. The columns of R are exact. The norm divides by RMS + ε. This is Megatron-LM at d98e8a6;
                other versions of it compute `deepseek`.
  lite          [source, target] logits. Division by sums over sources and by sums over targets in turn, in logarithms.
                The columns of R are exact. A norm with scale, without ε. This is the baseline of mHC-lite's authors.
  permutations  mHC-lite itself: a convex sum of all n! permutation matrices [source, target], weighted by a softmax.
                Rows and columns are exact. The norm of lite.

Other keys set how streams end and how parameters start. With the default values this is DeepSeek-V4 as in MaxText;
transformers starts φ from N(0, 0.02²) (`mudd_mhc_phi_init: normal`) and α at 1. Megatron-LM ends in the mean. mHC-lite
and its baseline end in the sum, with `mudd_mhc_phi_init: zero` and `mudd_mhc_bias_init: identity`.

Logits of one orientation mean the transposed matrices in the other: a checkpoint belongs to one value of the key. ε of
the norm is `normalization_layer_epsilon`, 1e-6 in all these codes. φ is cast to `dtype`, as in MaxText; products, norms
and S are computed in at least float32.
"""

import itertools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from maxtext_mudd.connections.mesh import contract
from maxtext_mudd.connections.mhc.keys import has_norm_scale, mixing_logits
from maxtext_mudd.connections.multi_stream import connection as multi_stream
from maxtext_mudd.kernels import accumulation_dtype, mix

NORMAL_STD = 0.02  # of transformers' deepseek_v4
SMALLEST_NORM = 1e-12  # of a token's streams, as in mHC-lite, so that a token of zeros has a gradient
OFF_DIAGONAL = -8.0  # static logits of mHC-lite: exp(-8) is 3e-4


def sinkhorn_deepseek(logits: Float[Array, "... n n"], steps: int, epsilon: float) -> Float[Array, "... n n"]:
  """[source, target] from [source, target]: softmax over targets, then sums over sources, targets, ..., sources."""
  m = jax.nn.softmax(logits, axis=-1) + epsilon
  m = m / (m.sum(-2, keepdims=True) + epsilon)
  for _ in range(steps - 1):
    m = m / (m.sum(-1, keepdims=True) + epsilon)
    m = m / (m.sum(-2, keepdims=True) + epsilon)
  return m


def sinkhorn_megatron(logits: Float[Array, "... n n"], steps: int, epsilon: float) -> Float[Array, "... n n"]:
  """[target, source] from [target, source]: sums over sources, then over targets, none taken below ε."""
  m = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  for _ in range(steps):
    m = m / jnp.maximum(m.sum(-1, keepdims=True), epsilon)
    m = m / jnp.maximum(m.sum(-2, keepdims=True), epsilon)
  return m


def sinkhorn_lite(logits: Float[Array, "... n n"], steps: int, epsilon: float) -> Float[Array, "... n n"]:
  """[source, target] from [source, target], in logarithms: sums over sources, then over targets. ε is not used."""
  for _ in range(steps):
    logits = logits - jax.nn.logsumexp(logits, axis=-2, keepdims=True)
    logits = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  return jnp.exp(logits)


SINKHORN = {"deepseek": sinkhorn_deepseek, "megatron": sinkhorn_megatron, "lite": sinkhorn_lite}


def permutations(n: int) -> np.ndarray:
  """All permutation matrices [n!,n,n], the identity first."""
  return np.eye(n)[list(itertools.permutations(range(n)))]


class ManifoldWeights(nnx.Module):
  """W and β of one sublayer.

  Parameters, in `weight_dtype`, where M is n², or n! with permutations: `phi_pre` and `phi_post` [n,D,n], `phi_res`
  [n,D,M], `alpha` [3], `b_pre` and `b_post` [n], `b_res` [M]; `norm_scale` [n,D] where the norm has one.
  With `mudd_mhc_bias_init: zero` streams that are equal stay equal up to what φ makes of them, and the model starts as
  the plain Transformer up to that: it reads n/2 times x, which the sublayer's norm rescales, and writes x + F.
  """

  def __init__(self, config, sublayer: int, rngs: nnx.Rngs):
    self.config = config
    n, dtype, m = config.mudd_expansion_rate, config.weight_dtype, mixing_logits(config)
    self.phi_pre, self.phi_post, self.phi_res = (_phi(config, columns, rngs) for columns in (n, n, m))
    self.alpha = nnx.Param(jnp.full((3,), config.mudd_mhc_alpha_init, dtype), out_sharding=(None,))
    for name, value in zip(("b_pre", "b_post", "b_res"), self._initial_biases(sublayer)):
      setattr(self, name, nnx.Param(value.astype(dtype), out_sharding=(None,)))
    if has_norm_scale(config):
      self.norm_scale = nnx.Param(jnp.ones((n, config.emb_dim), dtype), out_sharding=(None, "norm"))

  def _initial_biases(self, sublayer: int) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " M"]]:
    config = self.config
    n = config.mudd_expansion_rate
    if config.mudd_mhc_bias_init == "zero":
      return jnp.zeros(n), jnp.zeros(n), jnp.zeros(mixing_logits(config))
    one_stream = jnp.where(jnp.arange(n) == sublayer % n, 1.0, -1.0)
    if config.mudd_mhc_mixing == "permutations":
      mixing = jnp.where(jnp.arange(mixing_logits(config)) == 0, 0, OFF_DIAGONAL)
    else:
      mixing = jnp.where(jnp.eye(n) == 1, 0, OFF_DIAGONAL).reshape(-1)
    return one_stream, one_stream, mixing

  def __call__(self, streams: multi_stream.StreamList, sublayer):
    """See `multi_stream.connection.SublayerWeights`."""
    config = self.config
    n, wide = len(streams), accumulation_dtype(streams[0].dtype)
    phi = jnp.concatenate([self.phi_pre[...], self.phi_post[...], self.phi_res[...]], axis=-1)
    if has_norm_scale(config):
      phi = self.norm_scale[...][..., None] * phi
    dynamic = _normed_product(config, streams, phi)
    alpha = self.alpha[...].astype(wide)
    scales = jnp.repeat(alpha, np.array([n, n, mixing_logits(config)]), total_repeat_length=phi.shape[-1])
    biases = jnp.concatenate([self.b_pre[...], self.b_post[...], self.b_res[...]]).astype(wide)
    logits = scales * dynamic + biases
    read = jax.nn.sigmoid(logits[..., :n])
    if config.mudd_mhc_mixing == "deepseek":
      read = read + config.mudd_mhc_epsilon
    write = 2 * jax.nn.sigmoid(logits[..., n : 2 * n])
    w = jnp.concatenate([read[..., None, :], self.mixing(logits[..., 2 * n :])], axis=-2)
    return w, [write[..., i, None] for i in range(n)]

  def mixing(self, logits: Float[Array, "B T M"]) -> Float[Array, "B T n n"]:
    """R: entry [i,j] is what stream j contributes to stream i."""
    config = self.config
    n, code = config.mudd_expansion_rate, config.mudd_mhc_mixing
    if code == "permutations":
      convex, matrices = jax.nn.softmax(logits), jnp.asarray(permutations(n), logits.dtype)
      return jnp.einsum("btm,mij->btji", convex, matrices, precision=jax.lax.Precision.HIGHEST)
    m = SINKHORN[code](logits.reshape(*logits.shape[:-1], n, n), config.mudd_mhc_steps, config.mudd_mhc_epsilon)
    return m if code == "megatron" else m.swapaxes(-1, -2)


class WeightedHead(nnx.Module):
  """The hidden state Σ_k (σ(α x̂ φ + b) + ε)_k X_k, as in DeepSeek-V4.

  Parameters, in `weight_dtype`: `phi` [n,D,n], `alpha` [1], `b` [n].
  """

  def __init__(self, config, rngs: nnx.Rngs):
    self.config = config
    n, dtype = config.mudd_expansion_rate, config.weight_dtype
    self.phi = _phi(config, n, rngs)
    self.alpha = nnx.Param(jnp.full((1,), config.mudd_mhc_alpha_init, dtype), out_sharding=(None,))
    self.b = nnx.Param(jnp.zeros((n,), dtype), out_sharding=(None,))

  def __call__(self, streams: multi_stream.StreamList) -> Float[Array, "B T D"]:
    return mix(streams, self.weights(streams)[..., None, :], implementation="xla")[0]

  def weights(self, streams: multi_stream.StreamList) -> Float[Array, "B T n"]:
    config = self.config
    with jax.default_matmul_precision(config.matmul_precision.value):
      dynamic = _normed_product(config, streams, self.phi[...])
    logits = self.alpha[...].astype(dynamic.dtype) * dynamic + self.b[...].astype(dynamic.dtype)
    return jax.nn.sigmoid(logits) + config.mudd_mhc_epsilon


def _phi(config, columns: int, rngs: nnx.Rngs) -> nnx.Param:
  shape = (config.mudd_expansion_rate, config.emb_dim, columns)
  std = {"fan_in": (shape[0] * shape[1]) ** -0.5, "normal": NORMAL_STD, "zero": 0.0}[config.mudd_mhc_phi_init]
  value = std * jax.random.normal(rngs.params(), shape)
  return nnx.Param(value.astype(config.weight_dtype), out_sharding=(None, "embed", None))


def _normed_product(config, streams: multi_stream.StreamList, phi: Float[Array, "n D M"]) -> Float[Array, "B T M"]:
  """x̂ φ. The norm is applied to the product, which has fewer numbers than the streams."""
  wide = accumulation_dtype(streams[0].dtype)
  phi = phi.astype(config.dtype)
  product = sum(contract("btd,dm->btm", h, phi[i], wide) for i, h in enumerate(streams))
  squares = sum(jnp.square(h.astype(wide)).sum(-1, keepdims=True) for h in streams)
  mean_square = squares / (len(streams) * streams[0].shape[-1])
  if config.mudd_mhc_mixing == "deepseek":
    return product * jax.lax.rsqrt(mean_square + config.normalization_layer_epsilon)
  if config.mudd_mhc_mixing == "megatron":
    return product / (jnp.sqrt(mean_square) + config.normalization_layer_epsilon)
  return product / jnp.sqrt(jnp.maximum(mean_square, SMALLEST_NORM**2 / (len(streams) * streams[0].shape[-1])))


def build(config, blocks, rngs: nnx.Rngs, *, starts: bool, finishes: bool) -> multi_stream.StreamsConnection:
  """mHC of one block or stack."""

  def make(sublayer: int) -> ManifoldWeights:
    return ManifoldWeights(config, sublayer, rngs)

  end = config.mudd_mhc_end
  head = multi_stream.total if end == "sum" else multi_stream.mean
  if end == "weighted" and finishes:
    head = WeightedHead(config, rngs)
  return multi_stream.StreamsConnection(config, blocks, make, head, starts=starts, finishes=finishes)
