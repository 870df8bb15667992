"""A configuration with changes."""

import copy

from maxtext.configs.pyconfig import HyperParameters


class LayerConfig(HyperParameters):
  """A configuration with the feed-forward width of one layer.

  Two views of one configuration with one width compare equal, since modules hold them as static data.
  """

  def __init__(self, base: HyperParameters, ffn_width: int):
    object.__setattr__(self, "_base", base)
    object.__setattr__(self, "_ffn_width", ffn_width)
    object.__setattr__(self, "_pydantic_config", base._pydantic_config)
    widths = {"mlp_dim": ffn_width, "moe_mlp_dim": ffn_width}
    object.__setattr__(self, "_flat_config", {**base.get_keys(), **widths})

  def __deepcopy__(self, memo):
    return LayerConfig(copy.deepcopy(self._base, memo), self._ffn_width)

  def __reduce__(self):
    return LayerConfig, (self._base, self._ffn_width)

  def __eq__(self, other):
    return isinstance(other, LayerConfig) and self._base is other._base and self._ffn_width == other._ffn_width

  def __hash__(self):
    return hash((id(self._base), self._ffn_width))
