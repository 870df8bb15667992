"""The plain residual connection: each block reads the output of the one before it."""

from maxtext_mudd.connections.base import BaseFamily, Cost


class Residual(BaseFamily):
  """`depth_connection: residual`, the baseline of every family."""

  takes_explicit_axes = True

  @classmethod
  def cost(cls, config) -> Cost:
    return Cost()

  @classmethod
  def why_not_plain(cls, config) -> None:
    return None

  @classmethod
  def build(cls, config, blocks, mesh, rngs, *, starts, finishes):
    from maxtext_mudd.connections.connection import PlainConnection

    return PlainConnection(blocks, starts=starts, finishes=finishes)
