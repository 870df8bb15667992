"""A Transformer with MUDD connections in float64 NumPy, written from the paper's equations; shares no code with the
package. Parameters come by MaxText's paths, see tests/models.py."""

import dataclasses

import numpy as np
import scipy.special


@dataclasses.dataclass(frozen=True)
class Arch:
  """What differs between the stock decoder blocks, and the connections.

  `ways`, `streams`, `dilation`, `period`, `window`, `pre_norm`, `post_norm` as the paper has them; no `ways`: none.
  `table`: sources and streams by DA, instead of `ways`, `streams`, `dilation`, `period`, `window` and `depth_start`.
  `sharing`: groups of DAs that have one weight MLP, whose parameters have the path of any of them.
  `extra`: number of extra embeddings, the sources -1, -2, ...; `groups` of them, each for as many DAs in a row.
  `hyper`: n of Hyper-Connections, instead of all these.
  """

  layers: int
  heads: int = 2
  kv_heads: int = 2
  head_dim: int = 16
  epsilon: float = 1e-6
  attention_norm: str = "pre_self_attention_layer_norm"
  ffn_norm: str = "post_self_attention_layer_norm"
  ffn: str = "swiglu"
  layer_norm: bool = False
  scale_offset: float = 0.0
  rope: bool = True
  rotated: float = 1.0
  parallel: bool = False
  qk_norm: bool = False
  score_scale: float = 1.0
  experts_per_token: int = 0
  moe_name: str = ""
  ways: int = 0
  streams: str = "qkvr"
  activation: str = "gelu"
  dilation: int = 1
  period: int = 1
  window: int = 0
  pre_norm: bool = False
  post_norm: str = ""
  cap: float = 0.0  # of dynamic weights
  static: bool = True
  depth_start: float = 0.0
  extra: int = 0
  groups: int = 1
  hyper: int = 0
  table: dict[int, tuple[tuple[int, ...], str]] | None = None
  sharing: tuple[tuple[int, ...], ...] = ()


def gelu(x):
  return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))


def gelu_tanh(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


class Oracle:
  """One model; call it with tokens [B,T], positions and segments for logits [B,T,V]."""

  def __init__(self, arch: Arch, parameters):
    self.arch = arch
    self.parameters = {path: np.asarray(value, np.float64) for path, value in parameters.items()}
    # Mistakes to make, for the tests of the tests: (block, stream, stream) to swap in what the block reads, and
    # (DA, n) whose n-th source is to be the one before it.
    self.swapped = None
    self.shifted = None
    self.seen = {}  # what the last call computed on the way, under the names of `maxtext_mudd.inspect`

  def __getitem__(self, path):
    return self.parameters[path]

  def rms(self, x, scale=1.0):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.arch.epsilon) * scale

  def norm(self, x, path):
    if not self.arch.layer_norm:
      return self.rms(x, self[f"{path}/scale"])
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.arch.epsilon)
    return x * (self.arch.scale_offset + self[f"{path}/scale"]) + self[f"{path}/bias"]

  def project(self, x, path, equation):
    return np.einsum(equation, x, self[f"{path}/kernel"]) + self.parameters.get(f"{path}/bias", 0.0)

  def rotate(self, x, positions):
    half = int(self.arch.head_dim * self.arch.rotated) // 2
    angles = positions[:, :, None, None] / 10000 ** (np.arange(half) / half)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)

  def attention(self, q_in, k_in, v_in, path, positions, segments):
    arch = self.arch
    q = self.project(q_in, f"{path}/query", "btd,dhk->bthk")
    k = self.project(k_in, f"{path}/key", "btd,dhk->bthk")
    v = self.project(v_in, f"{path}/value", "btd,dhk->bthk")
    if arch.qk_norm:
      q, k = self.rms(q, self[f"{path}/query_norm/scale"]), self.rms(k, self[f"{path}/key_norm/scale"])
    if arch.rope:
      q, k = self.rotate(q, positions), self.rotate(k, positions)
    k, v = (np.repeat(x, arch.heads // arch.kv_heads, axis=2) for x in (k, v))
    scores = np.einsum("bthk,bshk->bhts", q, k) * arch.score_scale
    length = q.shape[1]
    visible = np.tril(np.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None, :])
    weights = softmax(np.where(visible[:, None], scores, -np.inf))
    self.seen[f"attention/block_{int(path.split('/')[1].removeprefix('layers_')) + 1:03d}"] = weights
    return self.project(np.einsum("bhts,bshk->bthk", weights, v), f"{path}/out", "bthk,hkd->btd")

  def feed_forward(self, x, layer):
    arch = self.arch
    if arch.experts_per_token:
      return self.mixture(x, f"{layer}/{arch.moe_name}")
    if arch.ffn in ("gpt3", "pythia"):
      hidden = self.project(x, f"{layer}/mlp/wi", "btd,df->btf")
      hidden = gelu(hidden) if arch.ffn == "pythia" else gelu_tanh(hidden)
    else:
      gate = self.project(x, f"{layer}/mlp/wi_0", "btd,df->btf")
      gate = gelu_tanh(gate) if arch.ffn == "geglu" else gate / (1 + np.exp(-gate))
      hidden = gate * self.project(x, f"{layer}/mlp/wi_1", "btd,df->btf")
    return self.project(hidden, f"{layer}/mlp/wo", "btf,fd->btd")

  def mixture(self, x, path):
    scores = self.project(x, f"{path}/gate", "btd,de->bte")
    chosen = scores >= np.sort(scores, -1)[..., -self.arch.experts_per_token, None]
    weights = softmax(np.where(chosen, scores, -np.inf))
    gate = np.einsum("btd,edf->btef", x, self[f"{path}/wi_0"])
    hidden = gate / (1 + np.exp(-gate)) * np.einsum("btd,edf->btef", x, self[f"{path}/wi_1"])
    return np.einsum("bte,btef,efd->btd", weights, hidden, self[f"{path}/wo"])

  def block(self, i, xq, xk, xv, xr, positions, segments):
    """X_i from the four streams (paper, Eq. 7); i counts from 1."""
    arch, layer = self.arch, f"decoder/layers_{i - 1}"
    paths = [f"{layer}/{arch.attention_norm}"] * 3
    if f"{paths[0]}/q/scale" in self.parameters:
      paths = [f"{paths[0]}/{stream}" for stream in "qkv"]
    normed = [self.norm(x, path) for x, path in zip((xq, xk, xv), paths)]
    a = self.attention(*normed, f"{layer}/self_attention", positions, segments) + xr
    if arch.parallel:
      return self.feed_forward(self.norm(xr, f"{layer}/{arch.ffn_norm}"), layer) + a
    return self.feed_forward(self.norm(a, f"{layer}/{arch.ffn_norm}"), layer) + a

  def has_aggregate(self, i):
    """Whether a DA follows block i."""
    arch = self.arch
    if arch.table:
      return i in arch.table
    makes = i < arch.layers or arch.ways == 1 or "r" in arch.streams
    return arch.ways and i % arch.period == 0 and i / arch.layers > arch.depth_start and makes

  def sources(self, i):
    """Which of the extra embeddings and X_0..X_i the DA after block i sees, oldest first."""
    arch = self.arch
    if arch.table:
      return arch.table[i][0]
    seen = sorted(range(i, -1, -arch.dilation))
    seen = [j for j in seen if not arch.window or j == 0 or i - j < arch.window]
    all_aggregates = [block for block in range(1, arch.layers + 1) if self.has_aggregate(block)]
    share = all_aggregates.index(i) / len(all_aggregates)
    group = max(k for k in range(arch.groups) if k / arch.groups <= share)
    tables = np.split(np.arange(1, arch.extra + 1), arch.groups)[group]
    return [*(-int(table) for table in tables[::-1]), *seen]

  def path_of_aggregate(self, i):
    if i == self.arch.layers:
      return f"decoder/layers_{i - 1}/connection/final_depth_aggregate"
    return f"decoder/layers_{i}/connection/depth_aggregate"

  def depth_aggregate(self, i, normed, newest):
    """Streams by name (paper, Eqs. 5, 6, 10), from the sources by number."""
    arch = self.arch
    last, path = i == arch.layers, self.path_of_aggregate(i)
    if arch.table:
      names = arch.table[i][1]
    else:
      names = [c for c in "qkvr" if c in arch.streams and (not last or c == "r")] if arch.ways == 4 else ["x"]
    sources = self.sources(i)
    weights = np.zeros((1, 1, len(names), len(sources)))
    if arch.static:
      weights = weights + self[f"{path}/a"]
    elif not (arch.pre_norm and arch.post_norm):  # with both, X_i is added after the sum
      weights[..., -1] = 1
    group = next((group for group in arch.sharing if i in group), (i,))
    mlp = next((x for x in map(self.path_of_aggregate, group) if f"{x}/w1" in self.parameters), None)
    if mlp:
      act = gelu if arch.activation == "gelu" else gelu_tanh
      scale = self.parameters.get(f"{mlp}/weight_norm_scale", 1.0)
      hidden = act(self.rms(newest, scale) @ self[f"{mlp}/w1"])
      dynamic = np.einsum("btk,kcn->btcn", hidden, self[f"{mlp}/w2"])
      if arch.cap:
        dynamic = arch.cap * np.tanh(dynamic / arch.cap)
      if f"{mlp}/weight_scale" in self.parameters:
        dynamic = self[f"{mlp}/weight_scale"] * np.tanh(dynamic)
      weights = weights + dynamic
    streams = {}
    weights = np.broadcast_to(weights, (*newest.shape[:2], *weights.shape[2:]))
    for c, name in enumerate(names):
      self.seen[f"weights/{name}/da_{i:03d}"] = weights[:, :, c]
      self.seen[f"norms/{name}/da_{i:03d}"] = np.stack([np.linalg.norm(normed[j], axis=-1) for j in sources], -1)
      mixed = 0
      for n, j in enumerate(sources):
        mixed = mixed + weights[:, :, c, n, None] * normed[j - (self.shifted == (i, n))]
      if f"{path}/post_norm_{name}/scale" in self.parameters:
        mixed = self.rms(mixed, self[f"{path}/post_norm_{name}/scale"])
      streams[name] = mixed + newest if arch.post_norm else mixed
    return streams

  def __call__(self, tokens, positions, segments):
    arch = self.arch
    x = self["token_embedder/embedding"][tokens]
    if "decoder/position_embedder/embedding" in self.parameters:
      x = x + self["decoder/position_embedder/embedding"][positions]
    if arch.hyper:
      return self.unembed(self.hyper_connected(x, positions, segments))
    start = "decoder/layers_0/connection"
    normed = {0: self.rms(x, self[f"{start}/embedding_norm/scale"]) if arch.pre_norm else x}
    for k in range(1, arch.extra + 1):
      looked_up = self[f"decoder/extra_embeddings/table_{k}/embedding"][tokens]
      self.seen[f"history/extra_{k}"] = looked_up
      norm = f"{start}/extra_norms/norm_{k}/scale"
      normed[-k] = self.rms(looked_up, self[norm]) if arch.pre_norm else looked_up
    self.seen["history/000"] = xq = xk = xv = xr = x
    for i in range(1, arch.layers + 1):
      self.seen |= {f"streams/{c}/da_{i - 1:03d}": y for c, y in zip("qkvr", (xq, xk, xv, xr))}
      self.seen[f"history/{i:03d}"] = x = self.block(i, xq, xk, xv, xr, positions, segments)
      scale = self.parameters.get(f"decoder/layers_{i - 1}/connection/output_norm/scale")
      normed[i] = self.rms(x, scale) if arch.pre_norm else x
      streams = self.depth_aggregate(i, normed, x) if self.has_aggregate(i) else {}
      order = "qkvr"
      if self.swapped and self.swapped[0] == i + 1:
        first, second = self.swapped[1:]
        order = order.translate(str.maketrans({first: second, second: first}))
      xq, xk, xv, xr = (streams.get(c, streams.get("x", x)) for c in order)
    self.seen[f"streams/r/da_{arch.layers:03d}"] = xr
    return self.unembed(xr)

  def unembed(self, x):
    return self.norm(x, "decoder/decoder_norm") @ self["decoder/logits_dense/kernel"]

  def hyper_connected(self, x, positions, segments):
    """Zhu et al., arXiv 2409.19606, Eqs. 2-5 and 10-13, for the streams h [B,T,n,D]."""
    arch = self.arch
    h = np.repeat(x[:, :, None], arch.hyper, axis=2)
    for sublayer in range(2 * arch.layers):
      layer, name = f"decoder/layers_{sublayer // 2}", ("attention", "feed_forward")[sublayer % 2]
      path = f"{layer}/connection/{name}"
      alpha = np.c_[np.eye(arch.hyper)[:, sublayer % arch.hyper], np.eye(arch.hyper)]
      alpha, beta = self.parameters.get(f"{path}/static_alpha", alpha), self.parameters.get(f"{path}/static_beta", 1.0)
      if f"{path}/w_alpha" in self.parameters:
        normed = self.rms(h, self[f"{path}/norm/scale"])
        alpha = alpha + self[f"{path}/alpha_scale"] * np.tanh(normed @ self[f"{path}/w_alpha"])
        beta = beta + self[f"{path}/beta_scale"] * np.tanh(normed @ self[f"{path}/w_beta"])[..., 0]
      else:
        alpha, beta = np.broadcast_to(alpha, h.shape[:2] + alpha.shape), np.broadcast_to(beta, h.shape[:3])
      mixed = np.einsum("btnm,btnd->btmd", alpha, h)
      read = mixed[:, :, 0]
      if name == "attention":
        read = self.norm(read, f"{layer}/{arch.attention_norm}")
        output = self.attention(read, read, read, f"{layer}/self_attention", positions, segments)
      else:
        output = self.feed_forward(self.norm(read, f"{layer}/{arch.ffn_norm}"), layer)
      h = mixed[:, :, 1:] + beta[..., None] * output[:, :, None]
    return h.sum(2)
