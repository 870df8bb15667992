"""A Vision Transformer with MUDD connections in float64 NumPy, written from Eqs. 5 to 8 and 10 of the paper and the
description of big_vision's model; shares no code with the package. Parameters come by their paths, see
`tests/vit_models.py`."""

import numpy as np

EPSILON = 1e-6


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def rms(x):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)


class Oracle:
  """One model; call it with images [B,H,W,C] for logits.

  Args:
    sizes: patch, heads and depth.
    connection: "plain"; "mudd", Eqs. 5 to 8; "norms", the same with Eq. 10 and a post-norm on the residual stream;
      "coefficient", without static weights, each sum times λ, plus X_i.
  """

  def __init__(self, parameters, connection, *, patch, heads, depth):
    self.parameters = {path: np.asarray(value, np.float64) for path, value in parameters.items()}
    self.connection, self.patch, self.heads, self.depth = connection, patch, heads, depth

  def __getitem__(self, path):
    return self.parameters[path]

  def linear(self, x, path):
    return x @ self[f"{path}/kernel"] + self[f"{path}/bias"]

  def layer_norm(self, x, path):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * self[f"{path}/scale"] + self[f"{path}/bias"]

  def embed(self, images):
    """Patches from the top left, row by row; each is its rows of pixels, row by row."""
    p, side = self.patch, images.shape[1] // self.patch
    cut = [images[:, p * r : p * r + p, p * c : p * c + p] for r in range(side) for c in range(side)]
    x = self.linear(np.stack([x.reshape(len(images), -1) for x in cut], 1), "embedding")
    quarter = x.shape[-1] // 4
    positions = np.zeros(x.shape[1:])
    for token in range(side * side):
      for k in range(quarter):
        frequency = 10_000 ** (-k / (quarter - 1))
        row, column = divmod(token, side)
        for number, angle in enumerate((column * frequency, row * frequency)):
          positions[token, 2 * number * quarter + k] = np.sin(angle)
          positions[token, (2 * number + 1) * quarter + k] = np.cos(angle)
    return x + positions

  def attention(self, q, k, v, path):
    def of_heads(x, name):
      x = self.linear(x, f"{path}/{name}")
      return x.reshape(*x.shape[:2], self.heads, -1)

    query, key, value = (of_heads(x, name) for x, name in ((q, "query"), (k, "key"), (v, "value")))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    mixed = np.einsum("bhqk,bkhd->bqhd", softmax(scores), value)
    return self.linear(mixed.reshape(*q.shape), f"{path}/out")

  def block(self, i, q, k, v, r):
    path = f"blocks/{i}"
    norm = f"{path}/attention_norm"
    norms = [norm] * 3 if f"{norm}/scale" in self.parameters else [f"{norm}/{x}" for x in "qkv"]
    normed = [self.layer_norm(x, of_norm) for x, of_norm in zip((q, k, v), norms)]
    a = self.attention(*normed, f"{path}/attention") + r
    hidden = gelu(self.linear(self.layer_norm(a, f"{path}/mlp_norm"), f"{path}/mlp/wi"))
    return self.linear(hidden, f"{path}/mlp/wo") + a

  def aggregate(self, path, sources, newest):
    """The streams of one DA."""
    weights = np.einsum("btk,kcn->btcn", gelu(rms(newest) @ self[f"{path}/w1"]), self[f"{path}/w2"])
    if self.connection != "coefficient":
      weights = weights + self[f"{path}/a"]
    sums = [np.einsum("btn,btdn->btd", weights[:, :, c], np.stack(sources, -1)) for c in range(weights.shape[2])]
    if self.connection == "norms":
      sums[-1] = rms(sums[-1]) * self[f"{path}/post_norm_r/scale"]
      return [x + newest for x in sums]
    if self.connection == "coefficient":
      return [self[f"{path}/coefficient"] * x + newest for x in sums]
    return sums

  def __call__(self, images):
    x = self.embed(np.asarray(images, np.float64))
    pre = self.connection == "norms"

    def source(x, i, name="output_norm"):
      return rms(x) * self[f"blocks/{i}/connection/{name}/scale"] if pre else x

    sources, streams = [source(x, 0, "embedding_norm")], [x] * 4
    for i in range(self.depth):
      x = self.block(i, *streams)
      sources.append(source(x, i))
      if self.connection == "plain":
        streams = [x] * 4
      elif i < self.depth - 1:
        streams = self.aggregate(f"blocks/{i + 1}/connection/depth_aggregate", sources, x)
      else:
        (x,) = self.aggregate(f"blocks/{i}/connection/final_depth_aggregate", sources, x)
    return self.linear(self.layer_norm(x, "norm").mean(1), "head")
