"""Prompts prefilled in chunks, for all blocks: in MaxText 0.2.5 some layers do not pass `previous_chunk` to attention.

`previous_chunk` is MaxText's argument for the tokens of a prompt that are in the KV cache already.
"""

import contextvars
import functools

from flax import nnx
from maxtext.inference.kvcache import KVCache
from maxtext.layers.attentions import Attention

from maxtext_mudd.blocks.classes import change_class

_previous_chunk = contextvars.ContextVar("previous_chunk", default=None)


def prefill_in_chunks(decoder: nnx.Module, size: int) -> None:
  """Lets a decoder prefill prompts in chunks of `size` tokens.

  KV caches take `size` tokens at once, where MaxText builds them for one, and attention receives `previous_chunk` from
  its layer.
  """
  for _, module in nnx.iter_graph(decoder):
    if isinstance(module, KVCache):
      module.key_seq_len = module.value_seq_len = size
    elif isinstance(module, Attention):
      change_class(module, _receiving(type(module)))
    elif isinstance(module, nnx.Module) and any(isinstance(x, Attention) for x in vars(module).values()):
      change_class(module, _sending(type(module)))


@functools.cache
def _sending(layer_class: type[nnx.Module]) -> type[nnx.Module]:
  class ChunkedLayer(layer_class):
    """Sets `previous_chunk` for the attention that its stock `__call__` calls."""

    @functools.wraps(layer_class.__call__)
    def __call__(self, *args, **kwargs):
      token = _previous_chunk.set(kwargs.get("previous_chunk"))
      try:
        return super().__call__(*args, **kwargs)
      finally:
        _previous_chunk.reset(token)

  return ChunkedLayer


@functools.cache
def _receiving(attention_class: type[Attention]) -> type[Attention]:
  class ChunkedAttention(attention_class):
    """Reads `previous_chunk` where its layer does not pass it."""

    @functools.wraps(attention_class.__call__)
    def __call__(self, *args, **kwargs):
      return super().__call__(*args, **{"previous_chunk": _previous_chunk.get(), **kwargs})

  return ChunkedAttention
