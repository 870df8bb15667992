"""The keys that turn depth connections on and choose a family, and the settings that work with no family."""

from collections.abc import Iterator

from pydantic import field_validator

from maxtext_mudd import blocks, connections
from maxtext_mudd.keys import KeyGroup, Refusal, key


class DepthConnectionKeys(KeyGroup):
  """The keys that choose a family."""

  mudd: bool = key(False, "Whether the model has depth connections; without them it is stock MaxText.")
  depth_connection: str = key(
    connections.DEFAULT, "Family of depth connections; residual: the plain model.", needs={"mudd": (True,)}
  )

  @field_validator("depth_connection")
  @classmethod
  def _check_family(cls, name: str) -> str:
    if name not in connections.FAMILIES:
      raise ValueError(
        f"there is no such family of depth connections; use {', '.join(connections.FAMILIES)} (MUDD, DenseFormer and "
        f"DDFormer are {connections.DEFAULT})"
      )
    return name


def check_sizes(config) -> None:
  """Raises ValueError for a model without blocks. `config` has `base_num_decoder_layers` and `num_decoder_layers`."""
  if config.num_decoder_layers < 1:
    raise ValueError(f"base_num_decoder_layers={config.base_num_decoder_layers} makes no blocks; use at least 1.")


def refusals(config) -> Iterator[Refusal]:
  """Yields the settings that do not work with any family. `config` is a `MuddConfig` with `mudd=True`."""
  block, mudd = config.decoder_block.value, "mudd=True"
  yield Refusal(
    block not in blocks.DECODER_BLOCKS,
    f"decoder_block={block!r}",
    mudd,
    f"supported are {', '.join(blocks.DECODER_BLOCKS)}; use one of these",
  )
  yield Refusal(
    blocks.spec(config).is_parallel and connections.family(config).reads == "sublayer",
    f"mudd_decoder_layer={config.mudd_decoder_layer}",
    f"depth_connection={config.depth_connection}",
    "its attention and FFN read one input in parallel; use a sequential decoder_block",
  )
  interval = config.inhomogeneous_layer_cycle_interval
  yield Refusal(
    interval > 1,
    f"inhomogeneous_layer_cycle_interval={interval}",
    mudd,
    "connections are made for single blocks; set it to 1",
  )
  yield Refusal(config.fused_qkv, "fused_qkv=True", mudd, "q, k and v may have separate inputs; set fused_qkv=False")
  yield Refusal(
    config.share_kv_projections,
    "share_kv_projections=True",
    mudd,
    "k and v may have separate inputs; set it to False",
  )
  yield Refusal(
    config.attention_type == "mla",
    "attention_type='mla'",
    mudd,
    "its latent is made of one input, not of several; use 'global'",
  )
  yield Refusal(
    config.using_pipeline_parallelism,
    "ici_pipeline_parallelism or dcn_pipeline_parallelism above 1",
    mudd,
    "block outputs are not passed between stages; use fsdp or tensor parallelism",
  )
  yield Refusal(
    config.mhc_expansion_rate > 1,
    f"mhc_expansion_rate={config.mhc_expansion_rate}",
    mudd,
    "it is a depth connection of MaxText's; set it to 1",
  )
  yield Refusal(bool(config.engram_layers), "engram_layers", mudd, "only deepseek has them; leave it empty")
  yield Refusal(
    config.shard_mode.value == "explicit",
    "shard_mode=explicit",
    mudd,
    "the aggregates leave sharding to the compiler; use shard_mode=auto",
  )
  yield Refusal(
    config.use_multimodal, "use_multimodal=True", mudd, "visual features are added between layers; set it to False"
  )
  if config.scan_layers:
    yield from _scanned(config)


def _scanned(config) -> Iterator[Refusal]:
  scanned = "mudd=True and scan_layers=True"
  yield Refusal(
    config.param_scan_axis not in (0, 1),
    f"param_scan_axis={config.param_scan_axis}",
    scanned,
    "norms have two dimensions where they are stacked; use 0 or 1",
  )
  yield Refusal(
    config.parameter_memory_host_offload,
    "parameter_memory_host_offload=True",
    scanned,
    "all layers would be kept on the device for the backward pass; set scan_layers=False",
  )
