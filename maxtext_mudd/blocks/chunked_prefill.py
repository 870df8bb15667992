"""Prompts prefilled in chunks, for all layers: some of MaxText 0.2.5 keep from their attention what came before."""

import contextvars
import functools

from flax import nnx
from maxtext.inference.kvcache import KVCache
from maxtext.layers.attentions import Attention

_previous_chunk = contextvars.ContextVar("previous_chunk", default=None)


def expect(decoder: nnx.Module, size: int) -> None:
  """Readies a decoder for chunks of `size` tokens: caches that take as many at once, which MaxText leaves at one, and
  layers whose attention is told of the chunks before."""
  for _, module in nnx.iter_graph(decoder):
    if isinstance(module, KVCache):
      module.key_seq_len = module.value_seq_len = size
    elif isinstance(module, Attention):
      module.__class__ = _told(type(module))
    elif isinstance(module, nnx.Module) and any(isinstance(x, Attention) for x in vars(module).values()):
      module.__class__ = _telling(type(module))


@functools.cache
def _telling(layer_class: type[nnx.Module]) -> type[nnx.Module]:
  class ChunkedLayer(layer_class):
    """Adds no state."""

    @functools.wraps(layer_class.__call__)
    def __call__(self, *args, **kwargs):
      token = _previous_chunk.set(kwargs.get("previous_chunk"))
      try:
        return super().__call__(*args, **kwargs)
      finally:
        _previous_chunk.reset(token)

  return ChunkedLayer


@functools.cache
def _told(attention_class: type[Attention]) -> type[Attention]:
  class ChunkedAttention(attention_class):
    """Adds no state."""

    @functools.wraps(attention_class.__call__)
    def __call__(self, *args, **kwargs):
      return super().__call__(*args, **{"previous_chunk": _previous_chunk.get(), **kwargs})

  return ChunkedAttention
