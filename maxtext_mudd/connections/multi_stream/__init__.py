"""What families of n residual streams share before JAX is imported: keys, refusals, counts."""

from collections.abc import Iterable

from maxtext_mudd.blocks import num_blocks
from maxtext_mudd.connections.base import BaseFamily, Cost, Held
from maxtext_mudd.connections.family_keys import FamilyKeys, sublayer_refusals
from maxtext_mudd.connections.keys import Refusal, key


class StreamsKeys(FamilyKeys):
  """How many residual streams there are."""

  mudd_expansion_rate: int = key(4, "n: residual streams of hyper_connections (DHC×n) and mhc.", ge=1)


class StreamsFamily(BaseFamily):
  """A family of n residual streams. A subclass brings `cost` and `build`."""

  Keys = StreamsKeys
  reads = "sublayer"
  takes_explicit_axes = True

  @classmethod
  def refusals(cls, config) -> Iterable[Refusal]:
    return sublayer_refusals(config)

  @classmethod
  def held(cls, config, block: int) -> Held:
    return Held(0, (), whole=config.mudd_expansion_rate)


def streams_cost(config, parameters: int, flops: int, head_parameters: int = 0, head_flops: int = 0) -> Cost:
  """The cost of a family of n residual streams: of each sublayer, what computing W and β takes, the FLOPs of mixing and
  of writing; of each block, n - 1 more streams.

  Args:
    parameters: of one sublayer.
    flops: of computing W and β of one sublayer, per token.
    head_parameters: of what ends the streams.
    head_flops: of it, per token.
  """
  n, width, sublayers = config.mudd_expansion_rate, config.emb_dim, 2 * num_blocks(config)
  return Cost(
    parameters=sublayers * parameters + head_parameters,
    flops=sublayers * (flops + 2 * n * (n + 1) * width + 2 * n * width) + head_flops,
    activations=num_blocks(config) * (n - 1),
  )
