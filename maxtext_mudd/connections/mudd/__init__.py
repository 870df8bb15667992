"""MUDD connections, and their simpler relatives DenseFormer (one way, static) and DDFormer (one way, dynamic)."""

from typing import ClassVar

from maxtext_mudd.connections.base import STREAMS, Cost, HistoryFamily, Plan
from maxtext_mudd.connections.mudd import cost, keys, sites


class Dense(HistoryFamily):
  """`depth_connection: dense`: weights of all earlier block outputs, static or made from the newest one."""

  Keys = keys.DenseKeys
  depth_axes: ClassVar = {
    "w1": (None, "hidden"),
    "w2": ("hidden", "streams", "sources"),
    "a": ("streams", "sources"),
    "weight_scale": ("streams", "sources"),
  }
  matrices: ClassVar = {"w1": ((0,), (-1,)), "w2": ((0,), (-2, -1))}
  static_weights = ("a",)
  stream_modules: ClassVar = {f"post_norm_{stream}": stream for stream in f"{STREAMS}x"}

  @classmethod
  def check_sizes(cls, config) -> None:
    keys.check_sizes(config)
    super().check_sizes(config)

  @classmethod
  def plan(cls, config) -> Plan:
    return sites.plan(config)

  @classmethod
  def cost(cls, config) -> Cost:
    return cost.cost(config)

  @classmethod
  def why_not_plain(cls, config) -> str | None:
    if sites.starts_at_zero(config) or not (config.mudd_pre_norm or config.mudd_post_norm):
      return None
    return (
      f"mudd_pre_norm={config.mudd_pre_norm} with mudd_post_norm={config.mudd_post_norm}: with one of the two norms "
      "alone, a model does not start as the plain model, and neither does the released code; turn both on or both off, "
      "or set mudd_static_start=zero with mudd_post_norm alone"
    )

  @classmethod
  def stabilising(cls, config) -> list[str]:
    return keys.missing_norms(config)

  @classmethod
  def aggregate(cls, config, site, mesh, rngs):
    from maxtext_mudd.connections.mudd.aggregate import DepthAggregate

    return DepthAggregate(config, site, mesh, rngs)

  @classmethod
  def share(cls, decoder):
    from maxtext_mudd.connections.mudd.aggregate import share_mlps

    share_mlps(decoder)

  @classmethod
  def norms_sources(cls, config):
    return config.mudd_pre_norm

  @classmethod
  def source_norm(cls, config, rngs):
    from maxtext_mudd.connections.norms import rms_norm

    return rms_norm(config, rngs) if config.mudd_pre_norm else None
