"""Configuration keys of FFN widths and of FFNs in parts, and the settings that do not work with them."""

from collections.abc import Iterator

from maxtext_mudd import blocks
from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.connections.keys import KeyGroup, Refusal, key

_CONNECTED = {"mudd": (True,)}
_REALLOCATED = {"mudd_ffn_reallocation": (True,)}


class FeedForwardKeys(KeyGroup):
  """Keys of the FFN's width."""

  mudd_ffn_reallocation: bool = key(False, "FFN width grows with depth (Eq. 9).", needs=_CONNECTED)
  mudd_ffn_first: float = key(
    0.5, "Width of the first FFN, as a factor.", needs=_REALLOCATED, gt=0, allow_inf_nan=False
  )
  mudd_ffn_last: float = key(1.5, "Width of the last FFN, as a factor.", needs=_REALLOCATED, gt=0, allow_inf_nan=False)
  mudd_ffn_round_to: int = key(128, "FFN widths are multiples of this.", needs=_REALLOCATED, ge=1)
  mudd_ffn_groups: int = key(
    0,
    "Groups of blocks that share one FFN width, the mean of Eq. 9, so that layers can be scanned; 0: no groups.",
    needs=_REALLOCATED,
    ge=0,
  )
  mudd_ffn_parts: int = key(
    1,
    "Number of parts of its width in which an FFN is computed in training; more parts need less memory.",
    needs=_CONNECTED,
    ge=1,
  )


def check_sizes(config) -> None:
  """Raises ValueError for re-allocated widths that the model's sizes do not allow.

  Args:
    config: has `FeedForwardKeys` and MaxText's `num_decoder_layers`, `mlp_dim`, `moe_mlp_dim`, `num_experts`,
      `scan_layers` and the `base_` forms of the first three.
  """
  if not config.mudd_ffn_reallocation:
    return
  if config.num_experts > 1 and config.mlp_dim != config.moe_mlp_dim:
    raise ValueError(
      f"mudd_ffn_reallocation=True needs experts as wide as the FFN: base_moe_mlp_dim={config.base_moe_mlp_dim}, "
      f"base_mlp_dim={config.base_mlp_dim}; make them equal."
    )
  if config.num_decoder_layers == 1:
    raise ValueError(
      "mudd_ffn_reallocation=True needs at least two blocks, and base_num_decoder_layers=1; turn it off."
    )
  if config.mudd_ffn_groups > config.num_decoder_layers:
    raise ValueError(
      f"mudd_ffn_groups={config.mudd_ffn_groups} is more than the model has blocks; use at most "
      f"{config.num_decoder_layers}, or 0 for no groups."
    )
  if config.scan_layers and not config.mudd_ffn_groups:
    raise ValueError(
      "scan_layers=True does not work with mudd_ffn_reallocation=True: the FFNs have different widths; scan groups of "
      "equal width with mudd_ffn_groups=4, for example, or set scan_layers=False."
    )
  widths = ffn_widths.of_config(config)
  if 0 in widths:
    raise ValueError(
      f"mudd_ffn_reallocation=True rounds the FFN of block {widths.index(0) + 1} to width 0 "
      f"(mlp_dim={config.mlp_dim}); lower mudd_ffn_round_to={config.mudd_ffn_round_to} or raise base_mlp_dim."
    )


def refusals(config) -> Iterator[Refusal]:
  """Yields the settings that do not work with re-allocated FFNs or with FFNs in parts. `config` is a `MuddConfig` that
  passed `check_sizes`."""
  if config.mudd_ffn_parts == 1 and not config.mudd_ffn_reallocation:
    return
  block, is_plain = f"decoder_block={config.decoder_block.value!r}", blocks.spec(config).is_plain
  yield Refusal(
    config.mudd_ffn_reallocation and not is_plain,
    "mudd_ffn_reallocation=True",
    block,
    f"widths are re-allocated in {', '.join(blocks.PLAIN_BLOCKS)} only; set mudd_ffn_reallocation=False",
  )
  if config.mudd_ffn_parts == 1:
    return
  parts, remedy = f"mudd_ffn_parts={config.mudd_ffn_parts}", "set mudd_ffn_parts=1"
  axes = [axis for name, axes in config.logical_axis_rules if name == "mlp" for axis in axes]
  keys = [f"{network}_{axis}_parallelism" for axis in axes for network in ("ici", "dcn")]
  sharded = [f"{key}={getattr(config, key)}" for key in keys if getattr(config, key, 1) != 1]
  narrowest = min(ffn_widths.of_config(config))
  quantization = config.quantization.value
  yield Refusal(not is_plain, block, parts, f"only plain FFNs are computed in parts; {remedy}")
  yield Refusal(
    config.num_experts > 1,
    f"num_experts={config.num_experts}",
    parts,
    f"experts are not computed in parts; {remedy}",
  )
  yield Refusal(bool(quantization), f"quantization={quantization}", parts, f"its scales are of whole kernels; {remedy}")
  yield Refusal(bool(sharded), ", ".join(sharded), parts, f"devices share the width already; {remedy}")
  yield Refusal(
    config.mudd_ffn_parts > narrowest, f"an FFN of width {narrowest}", parts, f"it has fewer columns; {remedy}"
  )
