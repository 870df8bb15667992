"""The configuration of a command: MaxText's keys and those of this package."""

from maxtext.configs.types import MaxTextConfig
from pydantic import model_validator

from maxtext_mudd.config import keys
from maxtext_mudd.config.stock_checks import StockChecks
from maxtext_mudd.connections.keys import raise_first


class MuddConfig(StockChecks, keys.MuddKeys, MaxTextConfig):
  """MaxText's configuration with depth connections. Refuses every combination of keys that cannot work."""

  @model_validator(mode="after")
  def _check_model(self):
    keys.check_sizes(self)
    raise_first(keys.refusals(self))
    axis = "layers_per_stage"  # of the layers that `scan_layers_per_stage` stacks; MaxText has no rule for it
    if self.scan_layers_per_stage and axis not in {rule[0] for rule in self.logical_axis_rules}:
      self.logical_axis_rules.append([axis, []])
    return self
