"""Which tensor of the authors' PyTorch models is which parameter of MaxText, and in what form.

Every tensor is one parameter of the single-layer layout; forms differ by a transposition and a reshape, so that nothing
is rounded on the way, in either direction. Blocks that the authors' code has otherwise have a factor, too, on their way
there: it rounds once, unless it is a power of two.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np

from maxtext_mudd import blocks, connections
from maxtext_mudd.blocks import ffn_widths


@dataclasses.dataclass(frozen=True)
class Name:
  """One tensor.

  Attributes:
    tensor: its name in PyTorch, path: the parameter's in MaxText.
    tensor_shape, shape: there, and here.
    transposed: whether PyTorch has it as [out, in].
    factor: how much larger it is there.
  """

  tensor: str
  path: str
  tensor_shape: tuple[int, ...]
  shape: tuple[int, ...]
  transposed: bool = False
  factor: float = 1.0

  def to_maxtext(self, tensor: np.ndarray) -> np.ndarray:
    return (tensor.T if self.transposed else tensor).reshape(self.shape)

  def to_hf(self, parameter: np.ndarray) -> np.ndarray:
    if self.factor != 1:
      parameter = (parameter.astype(np.float64) * self.factor).astype(parameter.dtype)
    if self.transposed:
      return parameter.reshape(self.tensor_shape[::-1]).T
    return parameter.reshape(self.tensor_shape)


def names(config) -> Iterator[Name]:
  """All tensors of the model that the configuration describes."""
  plan, width = connections.plan(config), config.emb_dim
  block = blocks.spec(config)
  is_gated = len(config.mlp_activations) > 1

  def norm(tensor, path, size=width, bias=block.has_biases):
    yield Name(f"{tensor}.weight", f"{path}/scale", (size,), (size,))
    if bias:
      yield Name(f"{tensor}.bias", f"{path}/bias", (size,), (size,))

  def linear(tensor, path, inputs, outputs, bias=block.has_biases, factor=1.0):
    """`inputs` and `outputs` as MaxText has them, one axis or two."""
    here, there = (*inputs, *outputs), (int(np.prod(outputs)), int(np.prod(inputs)))
    yield Name(f"{tensor}.weight", f"{path}/kernel", there, here, True, factor)
    if bias:
      yield Name(f"{tensor}.bias", f"{path}/bias", there[:1], outputs)

  def aggregate(number, path):
    da = plan.sites[number + 1]
    ways, sources = da.ways, len(da.sources)
    if da.hidden:
      yield Name(f"dynamic_dense.{number}.w1.weight", f"{path}/w1", (da.hidden, width), (width, da.hidden), True)
      w2 = (da.hidden, ways, sources)
      yield Name(f"dynamic_dense.{number}.w2.weight", f"{path}/w2", (ways * sources, da.hidden), w2, True)
    yield Name(f"dense_bs.{number}", f"{path}/a", (ways, sources), (ways, sources))

  query_factor = config.head_dim**0.5 if block.scales_query_kernel else 1.0
  vocabulary = (config.vocab_size, width)
  yield Name("tok_embeddings.weight", "token_embedder/embedding", vocabulary, vocabulary)
  for i, ffn in enumerate(ffn_widths.of_config(config)):
    here, there = f"decoder/layers_{i}", f"layers.{i}"
    attention_norm = f"{here}/{block.attention_norm}"
    if i == 0:
      yield from norm(f"{there}.attention_norm", attention_norm)
    else:
      for c, stream in enumerate("qkv"):
        yield from norm(f"{there}.attention_norms.{c}", f"{attention_norm}/{stream}")
      yield from aggregate(i - 1, f"{here}/connection/depth_aggregate")
    for tensor, path, heads, factor in (
      ("wq", "query", config.num_query_heads, query_factor),
      ("wk", "key", config.num_kv_heads, 1.0),
      ("wv", "value", config.num_kv_heads, 1.0),
    ):
      heads = (heads, config.head_dim)
      yield from linear(f"{there}.attention.{tensor}", f"{here}/self_attention/{path}", (width,), heads, factor=factor)
    heads = (config.num_query_heads, config.head_dim)
    yield from linear(f"{there}.attention.wo", f"{here}/self_attention/out", heads, (width,))
    if config.use_qk_norm:
      for c, path in (("q", "query"), ("k", "key")):
        yield from norm(f"{there}.attention.{c}_norm", f"{here}/self_attention/{path}_norm", config.head_dim, False)
    yield from norm(f"{there}.ffn_norm", f"{here}/{block.feed_forward_norm}")
    mlp, feed_forward = f"{here}/mlp", f"{there}.feed_forward"
    yield from linear(f"{feed_forward}.w1", f"{mlp}/{'wi_0' if is_gated else 'wi'}", (width,), (ffn,))
    if is_gated:
      yield from linear(f"{feed_forward}.w3", f"{mlp}/wi_1", (width,), (ffn,))
    yield from linear(f"{feed_forward}.w2", f"{mlp}/wo", (ffn,), (width,))
  yield from aggregate(i, f"{here}/connection/final_depth_aggregate")
  yield from norm("norm", "decoder/decoder_norm")
  yield from linear("output", "decoder/logits_dense", (width,), (config.vocab_size,), bias=False)
