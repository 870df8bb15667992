"""The plain residual connection: each block reads the output of the one before it."""

from maxtext_mudd.connections.base import NO_DEPTH_AXES, Cost, NoKeys, Plan


class Residual:
  """`depth_connection: residual`, the baseline of every family."""

  Keys = NoKeys
  reads = "block"
  depth_axes = NO_DEPTH_AXES

  @classmethod
  def check_sizes(cls, config) -> None:
    """Any sizes will do."""

  @classmethod
  def refusals(cls, config):
    return ()

  @classmethod
  def plan(cls, config) -> Plan:
    return Plan(config.num_decoder_layers)

  @classmethod
  def cost(cls, config) -> Cost:
    return Cost()

  @classmethod
  def build(cls, config, blocks, mesh, rngs, *, starts, finishes):
    from maxtext_mudd.connections.connection import PlainConnection

    return PlainConnection(blocks, starts=starts, finishes=finishes)
