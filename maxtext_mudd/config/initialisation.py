"""Configuration keys of initial values, and the settings that do not work with them."""

from collections.abc import Iterator
from typing import Literal

from maxtext_mudd.blocks import PLAIN_BLOCKS
from maxtext_mudd.connections.keys import KeyGroup, Refusal, key


class InitialisationKeys(KeyGroup):
  """Keys of `model.initializers`."""

  mudd_init: Literal["stock", "xavier_normal", "normal", "pythia"] = key(
    "stock", "Initial embeddings and kernels: as in MaxText, or by a rule. The key also works without connections."
  )
  mudd_init_std: float = key(
    0.006,
    "Standard deviation of mudd_init=normal.",
    needs={"mudd_init": ("normal",)},
    gt=0,
    allow_inf_nan=False,
  )


def refusals(config) -> Iterator[Refusal]:
  """Yields the settings that do not work with the rules of `mudd_init`. `config` is a `MuddConfig`."""
  if config.mudd_init == "stock":
    return
  rule, block = f"mudd_init={config.mudd_init}", config.decoder_block.value
  yield Refusal(
    block not in PLAIN_BLOCKS,
    f"decoder_block={block!r}",
    rule,
    f"its rules are for {', '.join(PLAIN_BLOCKS)}; use one of these, or mudd_init=stock",
  )
  interval = config.inhomogeneous_layer_cycle_interval
  yield Refusal(
    interval > 1,
    f"inhomogeneous_layer_cycle_interval={interval}",
    rule,
    "its rules are for layers that are alike; set it to 1, or mudd_init=stock",
  )
  yield Refusal(
    config.mtp_num_layers > 0,
    f"mtp_num_layers={config.mtp_num_layers}",
    rule,
    "MaxText initialises the layers of MTP by its own rule; set it to 0, or mudd_init=stock",
  )
