"""Maps each tensor of the authors' PyTorch models to a parameter of MaxText, in both directions.

Every tensor is one parameter of the model with single layers, or one expert's part of it. Tensor and parameter differ
by a transposition and a reshape, so no value is rounded. There is one exception. Some of MaxText's blocks have the
factor 1/sqrt(head_dim) in the query kernel, and the authors' code does not. The conversion to PyTorch multiplies the
query kernels of these blocks by sqrt(head_dim). This rounds each value once, unless sqrt(head_dim) is a power of two.
"""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from maxtext_mudd import connections
from maxtext_mudd.blocks import BlockSpec, ffn_widths
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.connections.base import Site


@dataclasses.dataclass(frozen=True)
class Name:
  """One tensor and its parameter.

  Attributes:
    tensor: name of the tensor in PyTorch.
    path: path of the parameter in MaxText.
    tensor_shape: shape of the tensor.
    shape: shape of the parameter.
    transposed: whether the tensor is [out, in].
    factor: the tensor is the parameter times this.
    expert: the tensor is this entry of the first axis of the parameter. None: it is all of the parameter.
  """

  tensor: str
  path: str
  tensor_shape: tuple[int, ...]
  shape: tuple[int, ...]
  transposed: bool = False
  factor: float = 1.0
  expert: int | None = None

  def to_maxtext(self, tensor: np.ndarray) -> np.ndarray:
    """The parameter, or its entry of `expert`."""
    shape = self.shape if self.expert is None else self.shape[1:]
    return (tensor.T if self.transposed else tensor).reshape(shape)

  def to_hf(self, parameter: np.ndarray) -> np.ndarray:
    """The tensor, from the whole parameter."""
    parameter = parameter if self.expert is None else parameter[self.expert]
    if self.factor != 1:
      parameter = (parameter.astype(np.float64) * self.factor).astype(parameter.dtype)
    if self.transposed:
      return parameter.reshape(self.tensor_shape[::-1]).T
    return parameter.reshape(self.tensor_shape)


def names(config) -> Iterator[Name]:
  """All tensors of the model that the configuration describes, which has single layers."""
  sites, block, width = connections.plan(config).sites, block_spec(config), config.emb_dim
  vocabulary = (config.vocab_size, width)
  yield Name("tok_embeddings.weight", "token_embedder/embedding", vocabulary, vocabulary)
  for i, ffn_width in enumerate(ffn_widths.of_config(config)):
    if i > 0:
      yield from _aggregate(i - 1, f"decoder/layers_{i}/connection/depth_aggregate", sites[i], width)
    yield from _attention(config, block, i)
    yield from _feed_forward(config, block, i, ffn_width)
  path = f"decoder/layers_{i}/connection/final_depth_aggregate"
  yield from _aggregate(i, path, sites[i + 1], width)
  yield from norm("norm", "decoder/decoder_norm", width, block.has_biases)
  yield from linear("output", "decoder/logits_dense", (width,), (config.vocab_size,), bias=False)


def _attention(config, block: BlockSpec, i: int) -> Iterator[Name]:
  width, bias = config.emb_dim, block.has_biases
  path, tensor = f"decoder/layers_{i}", f"layers.{i}"
  norm_path = f"{path}/{block.attention_norm}"
  if i == 0:
    yield from norm(f"{tensor}.attention_norm", norm_path, width, bias)
  else:
    for c, stream in enumerate("qkv"):
      yield from norm(f"{tensor}.attention_norms.{c}", f"{norm_path}/{stream}", width, bias)
  query_factor = config.head_dim**0.5 if block.scales_query_kernel else 1.0
  for letter, name, num_heads, factor in (
    ("q", "query", config.num_query_heads, query_factor),
    ("k", "key", config.num_kv_heads, 1.0),
    ("v", "value", config.num_kv_heads, 1.0),
  ):
    heads = (num_heads, config.head_dim)
    kernel_path = f"{path}/self_attention/{name}"
    yield from linear(f"{tensor}.attention.w{letter}", kernel_path, (width,), heads, bias=bias, factor=factor)
  heads = (config.num_query_heads, config.head_dim)
  yield from linear(f"{tensor}.attention.wo", f"{path}/self_attention/out", heads, (width,), bias=bias)
  if config.use_qk_norm:
    for letter, name in (("q", "query"), ("k", "key")):
      norm_path = f"{path}/self_attention/{name}_norm"
      yield from norm(f"{tensor}.attention.{letter}_norm", norm_path, config.head_dim, bias=False)


def _feed_forward(config, block: BlockSpec, i: int, ffn_width: int) -> Iterator[Name]:
  width, bias = config.emb_dim, block.has_biases
  is_gated = len(config.mlp_activations) > 1
  yield from norm(f"layers.{i}.ffn_norm", f"decoder/layers_{i}/{block.feed_forward_norm}", width, bias)
  tensor, path = f"layers.{i}.feed_forward", f"decoder/layers_{i}/mlp"
  first = "wi_0" if is_gated else "wi"
  yield from linear(f"{tensor}.w1", f"{path}/{first}", (width,), (ffn_width,), bias=bias)
  if is_gated:
    yield from linear(f"{tensor}.w3", f"{path}/wi_1", (width,), (ffn_width,), bias=bias)
  yield from linear(f"{tensor}.w2", f"{path}/wo", (ffn_width,), (width,), bias=bias)


def _aggregate(number: int, path: str, site: Site, width: int) -> Iterator[Name]:
  ways, sources, hidden = site.ways, len(site.sources), site.hidden
  if hidden:
    yield Name(f"dynamic_dense.{number}.w1.weight", f"{path}/w1", (hidden, width), (width, hidden), True)
    w2 = (hidden, ways, sources)
    yield Name(f"dynamic_dense.{number}.w2.weight", f"{path}/w2", (ways * sources, hidden), w2, True)
  yield Name(f"dense_bs.{number}", f"{path}/a", (ways, sources), (ways, sources))


def norm(tensor: str, path: str, size: int, bias: bool) -> Iterator[Name]:
  yield Name(f"{tensor}.weight", f"{path}/scale", (size,), (size,))
  if bias:
    yield Name(f"{tensor}.bias", f"{path}/bias", (size,), (size,))


def linear(
  tensor: str, path: str, inputs: Sequence[int], outputs: Sequence[int], *, bias: bool, factor: float = 1.0
) -> Iterator[Name]:
  """The `Name` of a linear layer. `inputs` and `outputs` are the input and output axes of MaxText's kernel, one or two
  each."""
  shape, tensor_shape = (*inputs, *outputs), (int(np.prod(outputs)), int(np.prod(inputs)))
  yield Name(f"{tensor}.weight", f"{path}/kernel", tensor_shape, shape, True, factor)
  if bias:
    yield Name(f"{tensor}.bias", f"{path}/bias", tensor_shape[:1], tuple(outputs))
