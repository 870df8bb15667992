"""One decoder layer of MaxText with a depth connection around it."""

from collections.abc import Callable
import functools

from flax import nnx
import jax
from maxtext.configs.pyconfig import HyperParameters
import numpy as np

from maxtext_mudd.blocks.feed_forward import split_feed_forward
from maxtext_mudd.blocks.rotary import round_rotary_table
from maxtext_mudd.config.changed import changed

_CONNECTION_SEED = 0x6D756464  # separates the keys of the connections from those of the stock layers


def connection_rngs(rngs: nnx.Rngs, block: int) -> nnx.Rngs:
  """Separate random keys for one connection, so that stock parameters have the same initial values as without."""
  return nnx.Rngs(params=jax.random.fold_in(rngs.params.key[...], _CONNECTION_SEED + block))


@functools.cache
def connected(layer_class: type[nnx.Module]) -> type[nnx.Module]:
  """The stock layer class with a depth connection around its `__call__`.

  Stock parameters keep their paths. The exception is the attention norm of a block that reads four streams: it becomes
  three norms, `q`, `k` and `v`.
  """

  class ConnectedLayer(layer_class):
    """The layer whose `__call__` takes and returns the carry of the connection. If layers are not scanned, the first
    one takes the embedding, and the last one returns the hidden state.

    Args:
      ffn_width: width of the feed-forward network of this layer.
      connect: builds the connection from (mesh, rngs).
    """

    def __init__(self, *, config: HyperParameters, ffn_width: int, connect: Callable, rngs: nnx.Rngs, **kwargs):
      layer_config = config
      if ffn_width != config.mlp_dim:
        layer_config = changed(config, mlp_dim=ffn_width, moe_mlp_dim=ffn_width)
      super().__init__(config=layer_config, rngs=rngs, **kwargs)
      self.connection = connect(mesh=self.mesh, rngs=rngs)
      self.connection.adapt(self)
      if config.mudd_ffn_parts > 1:
        split_feed_forward(self)
      if config.mudd_rope_table != "stock":
        round_rotary_table(self, config.mudd_rope_table)

    @functools.wraps(layer_class.__call__)
    def __call__(self, inputs, *args, **kwargs):
      carry = self.connection.start(inputs) if self.connection.starts else inputs
      graphdef, params, others = nnx.split(self, nnx.Param, ...)
      leaves, tree = jax.tree.flatten((args, kwargs))
      is_array = [isinstance(x, (jax.Array, np.ndarray)) for x in leaves]

      def block(state, *inputs):
        """The stock layer as a pure function of arrays, which a connection can differentiate by itself."""
        *inputs, arrays = inputs
        arrays = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(arrays) if given else x for given, x in zip(is_array, leaves)])
        layer = nnx.merge(graphdef, *state)
        output, kv_cache = layer_class.__call__(layer, layer.connection.read(*inputs), *args, **kwargs)
        _, _, others = nnx.split(layer, nnx.Param, ...)
        return layer.connection.write(output), output, (kv_cache, others)

      arrays = [x for given, x in zip(is_array, leaves) if given]
      carry, (kv_cache, others) = self.connection.through(block, (params, others), carry, arrays)
      nnx.update(self, others)
      return self.connection.finish(carry)[0] if self.connection.finishes else carry, kv_cache

  ConnectedLayer.__name__ = ConnectedLayer.__qualname__ = f"Connected{layer_class.__name__}"
  return ConnectedLayer
