"""The keys of Hyper-Connections, and what they do not work with. Imports neither JAX nor MaxText."""

from collections.abc import Iterator

from maxtext_mudd.connections.family_keys import WeightKeys
from maxtext_mudd.keys import Refusal, key


class HyperConnectionKeys(WeightKeys):
  """The keys of `depth_connection=hyper_connections`."""

  mudd_expansion_rate: int = key(4, "n: residual streams of hyper_connections (DHC×n).", ge=1)


def refusals(config) -> Iterator[Refusal]:
  """What Hyper-Connections do not work with. `config` is a `MuddConfig`."""
  family = f"depth_connection={config.depth_connection}"
  yield Refusal(
    config.enable_dropout and config.dropout_rate > 0,
    f"dropout_rate={config.dropout_rate}",
    family,
    "MaxText drops parts of the one residual stream, and there are several; set it to 0",
  )
  yield Refusal(
    bool(config.record_internal_nn_metrics),
    f"record_internal_nn_metrics={config.record_internal_nn_metrics}",
    family,
    "MaxText measures the one residual stream, and there are several; set it to 0",
  )
