"""All keys that this package adds to MaxText's, and the checks of a whole model.

Imports neither JAX nor MaxText, so that a command line is checked before these are imported.
"""

from collections.abc import Iterator
from typing import Literal

from maxtext_mudd import connections
from maxtext_mudd.config import decoder_layer, depth_connection, feed_forward, initialisation, optimizer
from maxtext_mudd.connections.keys import KeyGroup, Refusal, key


class LauncherKeys(KeyGroup):
  """Keys of the commands."""

  log_console: Literal["brief", "full"] = key(
    "brief",
    "brief: the console shows progress, results, warnings and errors, and log.txt in the run's folder gets "
    "everything; full: MaxText's console and no log.txt, as always with several processes, or where "
    "base_output_directory is remote (gs://...).",
  )


class MuddKeys(
  depth_connection.DepthConnectionKeys,
  *connections.key_groups(),
  feed_forward.FeedForwardKeys,
  decoder_layer.DecoderLayerKeys,
  initialisation.InitialisationKeys,
  optimizer.OptimizerKeys,
  LauncherKeys,
):
  """Every key of this package. The checks of a group read the keys of this group only."""


def check_sizes(config) -> None:
  """Raises ValueError for depth connections that the model's sizes do not allow.

  Args:
    config: `MuddKeys` with MaxText's sizes: a `MuddConfig`, or `complexity.sizes.Sizes`.
  """
  if not config.mudd:
    return
  depth_connection.check_sizes(config)
  feed_forward.check_sizes(config)
  connections.family(config).check_sizes(config)


def refusals(config) -> Iterator[Refusal]:
  """Yields the settings that do not work with this package. `config` is a `MuddConfig` that passed `check_sizes`."""
  yield from decoder_layer.refusals(config)
  yield from initialisation.refusals(config)
  if not config.mudd:
    return
  yield from feed_forward.refusals(config)
  yield from depth_connection.refusals(config)
  yield from optimizer.refusals(config)
  yield from connections.family(config).refusals(config)
