"""How the two sublayers of a stock layer, attention and FFN, each read an input of their own.

A stock layer computes `norm(x)`, attention of that, and `x + attention`; then the same with the FFN. With a
`SublayerInput` as x, the norm reads the array that the family made for this sublayer, and the sum is what the family
makes of the sublayer's output. The layer's `__call__` does not change.
"""

from collections.abc import Callable
import dataclasses
import operator
from typing import Any

from flax import nnx
import jax
from jaxtyping import Array, Float
from maxtext.layers.normalizations import RMSNorm
from maxtext.models.gpt3 import Gpt3LayerNorm

from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.blocks.classes import change_class


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SublayerInput:
  """What a stock layer sees before a sublayer. Stock layers shard every array in it as a [B,T,D] array.

  Attributes:
    read: the input of the sublayer's norm, [B,T,D].
    carried: other arrays [B,T,D] that `write` needs.
    write: from `carried` and the sublayer's output to what comes next: the next SublayerInput or, after the FFN, what
      the connection's `write` takes.
  """

  read: Any
  carried: tuple[Any, ...]
  write: Callable = dataclasses.field(metadata={"static": True})

  def __add__(self, output: Float[Array, "B T D"]):
    return self.write(self.carried, output)

  __radd__ = __add__


class ReadingRMSNorm(RMSNorm):
  """RMSNorm of a sublayer's input."""

  def __call__(self, x: SublayerInput, **kwargs):
    return super().__call__(x.read, **kwargs)


class ReadingGpt3LayerNorm(Gpt3LayerNorm):
  """GPT-3's LayerNorm of a sublayer's input."""

  def __call__(self, x: SublayerInput, **kwargs):
    return super().__call__(x.read, **kwargs)


_READING = {RMSNorm: ReadingRMSNorm, Gpt3LayerNorm: ReadingGpt3LayerNorm}


def read_sublayer_inputs(layer: nnx.Module, config) -> None:
  """Makes the norms of a stock layer before attention and before the FFN read a `SublayerInput`."""
  block = block_spec(config)
  for path in (block.attention_norm, block.feed_forward_norm):
    norm = operator.attrgetter(path)(layer)
    change_class(norm, _READING[type(norm)])
