"""Parameters under other names: the authors' as MaxText's, by path, and MaxText's as muddformer.py's.

All functions take NumPy or JAX arrays and are differentiable.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def from_pytorch(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The parameters of a PyTorch model, MUDDFormer or MUDDPythia, by MaxText's paths."""
  heads, width = 4, 16
  last = max(int(key.split(".")[1]) for key in weights if key.startswith("layers."))
  is_pythia = "norm.bias" in weights
  attention_norm, ffn_norm = "pre_self_attention_layer_norm", "post_self_attention_layer_norm"
  kernels = {"w1": "wi_0", "w3": "wi_1", "w2": "wo"}
  if is_pythia:
    attention_norm, ffn_norm, kernels = "pre_self_attention_norm", "pre_mlp_norm", {"w1": "wi", "w2": "wo"}

  def norm(name):
    found = {"scale": weights[f"{name}.weight"]}
    return found | ({"bias": weights[f"{name}.bias"]} if is_pythia else {})

  def linear(name, split=None):
    found = {"kernel": weights[f"{name}.weight"].T}
    if is_pythia:
      found["bias"] = weights[f"{name}.bias"]
    return {key: value.reshape(*value.shape[:-1], *split) if split else value for key, value in found.items()}

  found = {
    "token_embedder/embedding": weights["tok_embeddings.weight"],
    "decoder/logits_dense/kernel": weights["output.weight"].T,
  }
  found |= prefixed("decoder/decoder_norm", norm("norm"))
  for i in range(last + 1):
    to = f"decoder/layers_{i}"
    for name, path in (("wq", "query"), ("wk", "key"), ("wv", "value")):
      found |= prefixed(f"{to}/self_attention/{path}", linear(f"layers.{i}.attention.{name}", (heads, width)))
    out = linear(f"layers.{i}.attention.wo")
    out["kernel"] = out["kernel"].reshape(heads, width, -1)
    found |= prefixed(f"{to}/self_attention/out", out)
    found[f"{to}/self_attention/query_norm/scale"] = weights[f"layers.{i}.attention.q_norm.weight"]
    found[f"{to}/self_attention/key_norm/scale"] = weights[f"layers.{i}.attention.k_norm.weight"]
    for name, path in kernels.items():
      found |= prefixed(f"{to}/mlp/{path}", linear(f"layers.{i}.feed_forward.{name}"))
    found |= prefixed(f"{to}/{ffn_norm}", norm(f"layers.{i}.ffn_norm"))
    if i == 0:
      found |= prefixed(f"{to}/{attention_norm}", norm("layers.0.attention_norm"))
    else:
      for c, stream in enumerate("qkv"):
        found |= prefixed(f"{to}/{attention_norm}/{stream}", norm(f"layers.{i}.attention_norms.{c}"))
    ways, sources = weights[f"dense_bs.{i}"].shape
    w2 = weights[f"dynamic_dense.{i}.w2.weight"].T
    aggregate = {"w1": weights[f"dynamic_dense.{i}.w1.weight"].T, "w2": w2.reshape(-1, ways, sources)}
    found |= prefixed(aggregate_path(i, last), aggregate | {"a": weights[f"dense_bs.{i}"]})
  return found


def prefixed(path: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {f"{path}/{key}": value for key, value in values.items()}


def from_jax(weights: dict[str, np.ndarray], *, query_scale: float) -> dict[str, np.ndarray]:
  """The parameters of the authors' JAX model by MaxText's paths.

  Attention divides by sqrt(head_dim) there, and in MaxText's llama2 the query kernel carries that factor: parameters
  need `query_scale` head_dim**-0.5, gradients its inverse.
  """
  found = {}
  last = max(int(key.split("/")[1].split("_")[1]) for key in weights if "/layers_" in key)
  moved = {"dynamic_dense_conn1/kernel": "w1", "dynamic_dense_conn2/kernel": "w2", "dense_proj2.bias": "a"}
  moved |= {"pre_dense_proj1_norm/scale": "weight_norm_scale"}
  for key, value in weights.items():
    path = key.split("/")
    if path[0] == "decoder" and path[1].startswith("layers_"):
      i, rest = int(path[1].split("_")[1]), "/".join(path[2:])
      if rest in moved:
        key = f"{aggregate_path(i, last)}/{moved[rest]}"
      else:
        for stream in "qkv":
          key = key.replace(f"pre_self_attention_layer_norm_{stream}", f"pre_self_attention_layer_norm/{stream}")
    elif key == "decoder/mudd_prenorm/scale":
      key = "decoder/layers_0/connection/embedding_norm/scale"
    elif path[1].startswith("mudd_prenorm_"):
      key = f"decoder/layers_{path[1].split('_')[-1]}/connection/output_norm/scale"
    elif path[1].startswith("mudd_postnorm_"):
      key = f"{aggregate_path(int(path[1].split('_')[-1]), last)}/post_norm_r/scale"
    found[key] = value * query_scale if key.endswith("query/kernel") else value
  return found


def aggregate_path(i: int, last: int) -> str:
  """Where DA parameters after block i (from 0) live."""
  if i == last:
    return f"decoder/layers_{i}/connection/final_depth_aggregate"
  return f"decoder/layers_{i + 1}/connection/depth_aggregate"


def to_muddformer(values: dict[str, jax.Array]) -> dict:
  """The parameters of muddformer.py, from MaxText's of a llama2 or qwen3 block."""
  values = {path: jnp.asarray(value) for path, value in values.items()}
  last = max(int(path.split("_")[1].split("/")[0]) for path in values if path.startswith("decoder/layers_"))
  pre_norms = ["decoder/layers_0/connection/embedding_norm/scale"]
  pre_norms += [f"decoder/layers_{i}/connection/output_norm/scale" for i in range(last + 1)]
  return {
    "embedding": values["token_embedder/embedding"],
    "blocks": [to_block(values, f"decoder/layers_{i}") for i in range(last + 1)],
    "aggregates": [to_aggregate(values, aggregate_path(i, last)) for i in range(last + 1)],
    "pre_norms": [values[path] for path in pre_norms if path in values],
    "final_norm": values["decoder/decoder_norm/scale"],
    "unembedding": values["decoder/logits_dense/kernel"],
  }


def to_block(values: dict[str, jax.Array], layer: str) -> dict:
  """The parameters of one block of muddformer.py.

  If MaxText's block 1 has one attention norm, its scale is used three times. A query kernel of llama2 includes
  1/sqrt(head_dim), by which muddformer.py scales the scores.
  """
  attention, norm = f"{layer}/self_attention", f"{layer}/pre_self_attention_layer_norm"
  block = {
    "query": values[f"{attention}/query/kernel"],
    "key": values[f"{attention}/key/kernel"],
    "value": values[f"{attention}/value/kernel"],
    "out": values[f"{attention}/out/kernel"],
    "gate": values[f"{layer}/mlp/wi_0/kernel"],
    "up": values[f"{layer}/mlp/wi_1/kernel"],
    "down": values[f"{layer}/mlp/wo/kernel"],
    "attention_norms": [values.get(f"{norm}/{c}/scale", values.get(f"{norm}/scale")) for c in "qkv"],
    "ffn_norm": values[f"{layer}/post_self_attention_layer_norm/scale"],
  }
  if f"{attention}/query_norm/scale" in values:
    block["query_norm"] = values[f"{attention}/query_norm/scale"]
    block["key_norm"] = values[f"{attention}/key_norm/scale"]
  else:
    block["query"] *= math.sqrt(block["query"].shape[-1])
  return block


def to_aggregate(values: dict[str, jax.Array], path: str) -> dict:
  """The parameters of one aggregate of muddformer.py. The scale of the norm before W1 is multiplied into W1."""
  post_norms = {c: values.get(f"{path}/post_norm_{c}/scale") for c in "qkvrxm"}
  return {
    "w1": values.get(f"{path}/weight_norm_scale", jnp.ones(1))[:, None] * values[f"{path}/w1"],
    "w2": values[f"{path}/w2"],
    "a": values[f"{path}/a"],
    "post_norm": {c: scale for c, scale in post_norms.items() if scale is not None},
  }
