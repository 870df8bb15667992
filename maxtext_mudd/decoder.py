"""The decoder with depth connections: stock layers, each with the connection that feeds it."""

import copy
import functools

from flax import nnx
import jax
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.configs.pyconfig import HyperParameters
from maxtext.layers.nnx_decoders import NNXDecoder
import numpy as np

from maxtext_mudd import connections, initializers, topology
from maxtext_mudd.blocks.pythia import PythiaDecoderLayer, layer_norm
from maxtext_mudd.connections import chain

_CONNECTION_SEED = 0x6D756464  # keeps the keys of the connections apart from those of the stock layers


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


@functools.cache
def connected(layer_class: type[nnx.Module]) -> type[nnx.Module]:
  """The stock layer class with a depth connection around its `__call__`.

  Stock parameters keep their paths, but for the attention norm of a block that reads four streams: q, k and v.
  """

  class ConnectedLayer(layer_class):
    """Reads what flows between blocks and adds its own; the last layer returns the hidden state instead."""

    def __init__(self, *, config, model_topology, block, rngs, **kwargs):
      width = model_topology.ffn_widths[block - 1]
      layer_config = config if width == config.mlp_dim else LayerConfig(config, width)
      super().__init__(config=layer_config, rngs=rngs, **kwargs)
      # Keys of its own, so that stock parameters start as they would without connections.
      key = jax.random.fold_in(rngs.params.key[...], _CONNECTION_SEED + block)
      family = connections.FAMILIES[config.depth_connection]
      self.connection = family(config, model_topology, block, self.mesh, nnx.Rngs(params=key))
      self.connection.fit(self)

    @functools.wraps(layer_class.__call__)
    def __call__(self, inputs, *args, **kwargs):
      carry = inputs if isinstance(inputs, self.connection.carry) else self.connection.start(inputs)
      if self.connection.recomputed:
        carry, kv_cache = self._recomputed(carry, args, kwargs)
      else:
        block_input, carry = self.connection.read(carry)
        output, kv_cache = super().__call__(block_input, *args, **kwargs)
        carry = self.connection.write(carry, output)
      return self.connection.finish(carry) if self.connection.is_last else carry, kv_cache

    def _recomputed(self, carry: chain.Chain, args, kwargs):
      """The same by `connection.through`, which takes a pure function of arrays."""
      graphdef, params, others = nnx.split(self, nnx.Param, ...)
      leaves, tree = jax.tree.flatten((args, kwargs))
      is_array = [isinstance(x, (jax.Array, np.ndarray)) for x in leaves]

      def block(state, sums, output, arrays):
        arrays = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(arrays) if own else x for own, x in zip(is_array, leaves)])
        layer = nnx.merge(graphdef, *state)
        output, kv_cache = layer_class.__call__(layer, layer.connection.block_input(sums, output), *args, **kwargs)
        _, _, others = nnx.split(layer, nnx.Param, ...)
        return layer.connection.source(output), output, (kv_cache, others)

      arrays = [x for own, x in zip(is_array, leaves) if own]
      carry, (kv_cache, others) = self.connection.through(block, (params, others), carry, arrays)
      nnx.update(self, others)
      return carry, kv_cache

  ConnectedLayer.__name__ = ConnectedLayer.__qualname__ = f"Connected{layer_class.__name__}"
  return ConnectedLayer


class MuddDecoder(NNXDecoder):
  """The stock decoder, its layers connected in depth when `mudd` is on.

  What flows through the stock loop over layers is then the carry of the connections, an array before the first and
  after the last layer. `mudd_decoder_layer` and `mudd_init` hold with `mudd` off, too, for fair baselines.
  """

  def __init__(self, config, mesh, quant=None, model_mode=MODEL_MODE_TRAIN, *, rngs):
    super().__init__(config, mesh, quant, model_mode, rngs=rngs)
    initializers.initialise(self, config, rngs)

  def get_remat_policy(self):
    policy = super().get_remat_policy()
    if policy is None and getattr(self.config, "mudd", False) and self.config.remat_policy == "full":
      policy = jax.checkpoint_policies.save_only_these_names(chain.LAST_OUTPUT_NAME)
    return policy

  def get_norm_layer(self, num_features, rngs):
    if _is_pythia(self.config):
      return layer_norm(self.config, rngs)
    return super().get_norm_layer(num_features, rngs)

  def _init_decoder_layers(self, decoder_block_classes, rngs, mesh):
    if _is_pythia(self.config):
      decoder_block_classes = [PythiaDecoderLayer]
    super()._init_decoder_layers(decoder_block_classes, rngs, mesh)

  def _create_and_register_layer(self, layer_cls, rngs, base_name, i, **layer_kwargs):
    if getattr(self.config, "mudd", False):
      layer_cls = connected(layer_cls)
      layer_kwargs |= {"model_topology": topology.from_config(self.config), "block": i + 1}
    super()._create_and_register_layer(layer_cls, rngs, base_name, i, **layer_kwargs)


def _is_pythia(config) -> bool:
  return getattr(config, "mudd_decoder_layer", "stock") == "pythia"
