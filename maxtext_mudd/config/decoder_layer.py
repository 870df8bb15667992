"""Configuration keys of the decoder layer and its rotary table, and the settings that do not work with them."""

from collections.abc import Iterator
from typing import Literal

from maxtext_mudd import blocks
from maxtext_mudd.connections.keys import KeyGroup, Refusal, key


class DecoderLayerKeys(KeyGroup):
  """Keys of the layer between two depth connections."""

  mudd_decoder_layer: Literal["stock", "pythia"] = key(
    "stock", "The decoder layer: that of `decoder_block`, or Pythia's. The key also works without connections."
  )
  mudd_rotary_fraction: float = key(
    0.25, "Share of each head that pythia rotates.", needs={"mudd_decoder_layer": ("pythia",)}, gt=0, le=1
  )
  mudd_rope_table: Literal["stock", "bfloat16", "float16"] = key(
    "stock",
    "Precision of the rotary table: that of activations, or half as in the released PyTorch models.",
    needs={"mudd": (True,)},
  )


def refusals(config) -> Iterator[Refusal]:
  """Yields the settings that do not work with the keys of the layer. `config` is a `MuddConfig`."""
  block, is_pythia = config.decoder_block.value, config.mudd_decoder_layer == "pythia"
  known = blocks.BLOCKS.get("pythia" if is_pythia else block)
  yield Refusal(
    config.use_chunked_prefill and known is not None and not known.takes_chunked_prefill,
    "use_chunked_prefill=True",
    f"decoder_block={block!r}",
    "its attention reads one chunk of the prompt alone; set it to False",
  )
  yield Refusal(
    config.use_chunked_prefill and config.attention_type == "mla" and not config.mla_naive_kvcache,
    "use_chunked_prefill=True",
    "attention_type='mla' and mla_naive_kvcache=False",
    "MaxText writes each chunk of the prompt over the first in a cache of latents; set it to False",
  )
  if is_pythia:
    yield from _pythia(config)
  if config.mudd_rope_table == "stock":
    return
  table = f"mudd_rope_table={config.mudd_rope_table}"
  yield Refusal(
    config.rope_type.value != "default",
    f"rope_type={config.rope_type.value}",
    table,
    "the released code has the default table; set mudd_rope_table=stock",
  )
  spec = blocks.spec(config)
  yield Refusal(
    not (spec.is_rotary and spec.is_plain),
    f"decoder_block={block!r}",
    table,
    "it does not rotate queries and keys as the released models do; set mudd_rope_table=stock",
  )


def _pythia(config) -> Iterator[Refusal]:
  from maxtext_mudd.kernels import ACTIVATIONS  # imports JAX

  layer, block, activations = "mudd_decoder_layer=pythia", config.decoder_block.value, config.mlp_activations
  rotated = config.head_dim * config.mudd_rotary_fraction
  yield Refusal(
    block != "gpt3",
    f"decoder_block={block!r}",
    layer,
    "its LayerNorms and counts are those of gpt3; set decoder_block=gpt3",
  )
  yield Refusal(
    len(activations) != 1 or activations[0] not in ACTIVATIONS,
    f"mlp_activations={activations}",
    layer,
    f"its MLP has one activation, {' or '.join(ACTIVATIONS)}; set mlp_activations=[gelu]",
  )
  yield Refusal(
    rotated % 2 != 0,
    f"mudd_rotary_fraction={config.mudd_rotary_fraction}",
    layer,
    f"{rotated:g} of head_dim={config.head_dim} would be rotated; an even number is needed",
  )
  yield Refusal(config.num_experts > 1, f"num_experts={config.num_experts}", layer, "it has one dense MLP; set it to 1")
  yield Refusal(
    config.trainable_position_size > 0,
    f"trainable_position_size={config.trainable_position_size}",
    layer,
    "its positions are rotary; leave it at -1",
  )
  yield Refusal(
    config.mtp_num_layers > 0,
    f"mtp_num_layers={config.mtp_num_layers}",
    layer,
    "MaxText's MTP has no such layer; set it to 0",
  )
