"""How the two sublayers of a stock layer, attention and FFN, each read an input of their own.

A stock layer computes `norm(x)`, attention of that, and `x + attention`; then the same with the FFN. With a
`SublayerInput` as x, the norm reads the array that the family made for this sublayer, and the sum is what the family
makes of the sublayer's output. The layer's `__call__` does not change.
"""

from collections.abc import Callable, Sequence
import dataclasses
import operator
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxtext_mudd.blocks import normed_streams
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.blocks.classes import change_class
from maxtext_mudd.blocks.streams import decouple, reading
from maxtext_mudd.connections.connection import PlainConnection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SublayerInput:
  """What a stock layer sees before a sublayer. Stock layers shard every array in it as a [B,T,D] array.

  Attributes:
    read: the input of the sublayer's norm, [B,T,D].
    carried: other arrays [B,T,D] that `write` needs.
    write: from `carried` and the sublayer's output to what comes next: the next SublayerInput or, after the FFN, a
      LayerOutput.
  """

  read: Any
  carried: tuple[Any, ...]
  write: Callable = dataclasses.field(metadata={"static": True})

  def __add__(self, output: Float[Array, "B T D"]):
    return self.write(self.carried, output)

  __radd__ = __add__


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LayerOutput:
  """What a stock layer returns. Stock layers shard every array in it as a [B,T,D] array, and measure all of them as one
  array where `record_internal_nn_metrics` is on.

  Attributes:
    arrays: what the family keeps of the layer, in arrays [B,T,D].
    carry: from `arrays` to the carry, which has what a layer cannot shard.
  """

  arrays: Any
  carry: Callable = dataclasses.field(metadata={"static": True})

  def __jax_array__(self) -> Float[Array, "K B T D"]:
    return jnp.stack(jax.tree.leaves(self.arrays))

  def __eq__(self, other):  # MaxText counts zeros by `layer_output == 0`
    return jnp.asarray(self) == other

  __hash__ = None


class SublayerConnection(PlainConnection):
  """The connection of a family that makes an input for each sublayer. `read` returns a `SublayerInput`, or `Streams`
  whose residual stream is one. It becomes a `LayerOutput` when the outputs of attention and of the FFN are added.

  Attributes:
    decouples: whether attention reads `Streams` in place of a `SublayerInput`.
  """

  decouples = False

  def __init__(self, config, blocks: Sequence[int], *, starts: bool, finishes: bool):
    super().__init__(blocks, starts=starts, finishes=finishes)
    self.config = config

  def adapt(self, layer: nnx.Module) -> None:
    """Makes the norm before the FFN read a `SublayerInput`. The norm before attention reads one, too; with `decouples`
    it becomes three, each of which reads a stream."""
    block = block_spec(self.config)
    if self.decouples:
      decouple(layer, block, normed_streams(self.config, self.blocks[0]))
    else:
      read_sublayer_input(layer, block.attention_norm)
    read_sublayer_input(layer, block.feed_forward_norm)

  def write(self, output: LayerOutput) -> Any:
    return output.carry(output.arrays)


def read_sublayer_input(layer: nnx.Module, path: str) -> None:
  """Makes the norm at a path of a stock layer read a `SublayerInput`."""
  norm = operator.attrgetter(path)(layer)
  change_class(norm, reading(type(norm), "read"))
