"""MUDDFormer (arXiv 2502.12170) from tokens to logits, in plain JAX: the file to read first, and to copy from.

tests/test_muddformer.py checks that its outputs match the authors' PyTorch and JAX code, that its gradients match their
JAX code, and that the package's MUDD models match this file. "Released" marks what the authors' code does where the
paper says something else, or nothing.

Shapes: B batch, T length, D width, V vocabulary; L blocks, each with H heads of width P and an FFN of width F. The
depth-wise aggregate DA_i after block i has N = i + 1 sources X_0..X_i, C ways (streams) and an MLP of hidden width K.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

STREAMS = "qkvr"  # query, key, value and residual stream, in the paper's order
EPSILON = 1e-6
ROPE_BASE = 10_000
Hidden = Float[Array, "B T D"]  # X_i or a stream


@dataclasses.dataclass(frozen=True)
class Config:
  """The paper's hyperparameters; default: the 405M model of Fig. 3."""

  layers: int = 24
  width: int = 1024
  heads: int = 16
  ffn: int = 2816
  vocabulary: int = 50432
  reallocate_ffn: bool = True  # Eq. 9
  pre_norm: bool = False  # Eq. 10: RMSNorm of every source
  post_norm: str = ""  # Eq. 10: streams that get an RMSNorm; if any, X_i is added to all. Paper: "qkvr". Released: "r"
  qk_norm: bool = False  # released PyTorch models: RMSNorm of the query and key of each head
  gelu_tanh: bool = False  # released JAX code: GELU approximated by tanh; PyTorch: exact


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, " D"] | float = 1.0) -> Float[Array, "*batch D"]:
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON) * scale


def rotary(x: Float[Array, "B T H P"]) -> Float[Array, "B T H P"]:
  """Rotates each pair (p, p + P/2) by an angle proportional to the position."""
  half = x.shape[-1] // 2
  angle = jnp.arange(x.shape[1])[:, None, None] / ROPE_BASE ** (jnp.arange(half) / half)
  first, second, cos, sin = x[..., :half], x[..., half:], jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(xq: Hidden, xk: Hidden, xv: Hidden, params: dict, config: Config) -> Hidden:
  """MHA(X^Q, X^K, X^V), causal."""
  query = jnp.einsum("btd,dhp->bthp", xq, params["query"])
  key = jnp.einsum("btd,dhp->bthp", xk, params["key"])
  value = jnp.einsum("btd,dhp->bthp", xv, params["value"])
  if config.qk_norm:
    query, key = rms_norm(query, params["query_norm"]), rms_norm(key, params["key_norm"])
  scores = jnp.einsum("bthp,bshp->bhts", rotary(query), rotary(key)) / math.sqrt(query.shape[-1])
  is_visible = jnp.tri(query.shape[1], dtype=bool)
  probabilities = jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf))
  return jnp.einsum("bhts,bshp,hpd->btd", probabilities, value, params["out"])


def feed_forward(x: Hidden, params: dict) -> Hidden:
  return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def transformer_block(xq: Hidden, xk: Hidden, xv: Hidden, xr: Hidden, params: dict, config: Config) -> Hidden:
  """X_i = B'(X^Q, X^K, X^V, X^R), Eq. 7, for Transformer++: RMSNorm, rotary position embedding, SwiGLU."""
  normed = [rms_norm(x, scale) for x, scale in zip((xq, xk, xv), params["attention_norms"])]
  xa = attention(*normed, params, config) + xr
  return feed_forward(rms_norm(xa, params["ffn_norm"]), params) + xa


def mixing_weights(x: Hidden, params: dict, config: Config) -> Float[Array, "B T C N"]:
  """A_i(X_i) = GELU(RMSNorm(X_i) W_1) W_2 + a_i, Eq. 6, of all streams. This norm has no scale: W_1 absorbs one."""
  activations = jax.nn.gelu(rms_norm(x) @ params["w1"], approximate=config.gelu_tanh)
  return jnp.einsum("btk,kcn->btcn", activations, params["w2"]) + params["a"]


def aggregate(sources: list[Hidden], weights: Float[Array, "B T C N"]) -> list[Hidden]:
  """wsum(A_i, X_:i) = sum_j A_ij X_j, Eq. 5, of each stream."""
  return [sum(weights[:, :, c, j, None] * x for j, x in enumerate(sources)) for c in range(weights.shape[2])]


def forward(params: dict, tokens: Int[Array, "B T"], config: Config) -> tuple[Float[Array, "B T V"], dict]:
  """Returns the logits (Eq. 8), and by name X_i [B,T,D], weights_i [B,T,C,N] and streams_i, a list of C [B,T,D]."""

  def pre_norm(i, x):  # Eq. 10, for the sources that Eq. 5 sums; Eqs. 6 and 7 take X_i itself
    return rms_norm(x, params["pre_norms"][i]) if config.pre_norm else x

  x = params["embedding"][tokens]
  sources, streams, out = [pre_norm(0, x)], [x, x, x, x], {"X_0": x}
  for i, (block, da) in enumerate(zip(params["blocks"], params["aggregates"]), 1):
    x = transformer_block(*streams, block, config)
    sources.append(pre_norm(i, x))
    weights = mixing_weights(x, da, config)
    streams = aggregate(sources, weights)
    if config.post_norm:  # Eq. 10; a stream without a scale is not normed
      scales = [da["post_norm"].get(c) for c in STREAMS[-len(streams) :]]
      streams = [(xc if scale is None else rms_norm(xc, scale)) + x for xc, scale in zip(streams, scales)]
    out |= {f"X_{i}": x, f"weights_{i}": weights, f"streams_{i}": streams}
  (xr,) = streams  # DA_L makes the residual stream only
  return rms_norm(xr, params["final_norm"]) @ params["unembedding"], out


def ffn_width(i: int, config: Config) -> int:
  """The FFN width F of block i: D_f'(i) of Eq. 9, for L > 1. Released: rounded to a multiple of 128, which can be 0."""
  if not config.reallocate_ffn:
    return config.ffn
  factor = (0.5 * (config.layers - i) + 1.5 * (i - 1)) / (config.layers - 1)
  return round(config.ffn * factor / 128) * 128


def init(key: PRNGKeyArray, config: Config) -> dict:
  """Initial parameters. With both norms of Eq. 10 or none, each stream is X_i, and the model is a plain Transformer.

  embedding [V,D], unembedding [D,V], query, key, value [D,H,P], out [H,P,D], gate, up [D,F], down [F,D]:
                        Xavier normal, N(0, 2/(fan_in + fan_out)); released JAX: N(0, 0.006²)
  w1 [D,K]              N(0, 1/D)
  w2 [K,C,N]            0
  a [C,N]               1 at X_i, 0 elsewhere; with both norms of Eq. 10, which adds X_i, 0 everywhere
  post_norm [D]         1e-3
  other norms [D], [P]  1
  """
  L, D, H, V = config.layers, config.width, config.heads, config.vocabulary
  P, ones, keys = D // H, jnp.ones, iter(jax.random.split(key, 2 + 8 * L))

  def xavier(*shape):  # one dimension is D, and the product of the others is the other fan
    return jax.random.normal(next(keys), shape) * math.sqrt(2 / (D + math.prod(shape) / D))

  params = {"embedding": xavier(V, D), "final_norm": ones(D), "unembedding": xavier(D, V)}
  params |= {"blocks": [], "aggregates": [], "pre_norms": [ones(D) for _ in range(L + 1)] if config.pre_norm else []}
  for i in range(1, L + 1):
    F, C, N = ffn_width(i, config), 4 if i < L else 1, i + 1
    K = (4 * N // 64 + 1) * 64  # paper: C·N. Released: 4N in DA_L, too, then rounded up, also from 64 to 128
    block = {"query": xavier(D, H, P), "key": xavier(D, H, P), "value": xavier(D, H, P), "out": xavier(H, P, D)}
    block |= {"gate": xavier(D, F), "up": xavier(D, F), "down": xavier(F, D)}
    # Released PyTorch: one attention norm in block 1, whose three inputs are equal.
    block |= {"attention_norms": [ones(D) for _ in "qkv"], "ffn_norm": ones(D)}
    block |= {"query_norm": ones(P), "key_norm": ones(P)} if config.qk_norm else {}
    newest = 0 if config.pre_norm and config.post_norm else 1
    da = {"w1": jax.random.normal(next(keys), (D, K)) / math.sqrt(D), "w2": jnp.zeros((K, C, N))}
    da |= {"a": jnp.zeros((C, N)).at[:, -1].set(newest)}
    da |= {"post_norm": {stream: jnp.full(D, 1e-3) for stream in STREAMS[-C:] if stream in config.post_norm}}
    params["blocks"].append(block)
    params["aggregates"].append(da)
  return params
