"""One decoder layer of MaxText with a depth connection around it."""

import functools
import inspect

from flax import nnx
import jax
from maxtext.configs.pyconfig import HyperParameters
from maxtext.layers import nnx_scan
import numpy as np

from maxtext_mudd.blocks.classes import change_class
from maxtext_mudd.blocks.feed_forward import split_feed_forward
from maxtext_mudd.blocks.rotary import round_rotary_table
from maxtext_mudd.config.changed import changed
from maxtext_mudd.connections.base import Connection

_CONNECTION_SEED = 0x6D756464  # separates the keys of the connections from those of the stock layers


def connection_rngs(rngs: nnx.Rngs, number: int) -> nnx.Rngs:
  """Separate random keys for one connection, so that stock parameters have the same initial values as without.

  Args:
    number: of the block that the connection belongs to; -k for the k-th table of extra embeddings.
  """
  return nnx.Rngs(params=jax.random.fold_in(rngs.params.key[...], _CONNECTION_SEED + number))


def to_positions(hidden, rate: int):
  """Hyper-streams of MaxText's mHC as further positions: [B,T,n,D] as [B,T·n,D].

  Connections mix each hyper-stream with the same one of other blocks, as they mix each position.

  Args:
    rate: n. With 1 the hidden state has no axis of hyper-streams, and is left as it is.
  """
  return hidden if rate == 1 else hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])


def from_positions(hidden, rate: int):
  """`to_positions` backwards, for all arrays of a pytree."""
  if rate == 1:
    return hidden
  return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, rate, x.shape[-1]), hidden)


@functools.cache
def with_ffn_width(layer_class: type[nnx.Module], width: int) -> type[nnx.Module]:
  """The stock layer class with another width of its feed-forward network."""

  class LayerOfWidth(layer_class):
    def __init__(self, *, config: HyperParameters, **kwargs):
      super().__init__(config=changed(config, mlp_dim=width, moe_mlp_dim=width), **kwargs)

  LayerOfWidth.__name__ = LayerOfWidth.__qualname__ = f"{layer_class.__name__}OfWidth{width}"
  return LayerOfWidth


def connect(layer: nnx.Module, connection: Connection, config: HyperParameters) -> None:
  """Puts a depth connection around the `__call__` of a stock layer, or of the layers of a scanned stack.

  Stock parameters keep their paths. The exception is the attention norm of a block that reads separate streams: it
  becomes a norm for each stream that it serves, such as `q`, `k` and `v`.
  """
  layer.connection = connection
  connection.adapt(layer)
  if config.mudd_ffn_parts > 1:
    split_feed_forward(layer)
  if config.mudd_rope_table != "stock":
    round_rotary_table(layer, config.mudd_rope_table)
  change_class(layer, _connected(type(layer), config.mhc_expansion_rate, config.lora.enable_lora))


@functools.cache
def _connected(layer_class: type[nnx.Module], rate: int, takes_adapters: bool) -> type[nnx.Module]:
  class ConnectedLayer(layer_class):
    """The layer whose `__call__` takes and returns the carry of its connection. If layers are not scanned, the first
    one takes the embedding, and the last one returns the hidden state."""

    @functools.wraps(layer_class.__call__)
    def __call__(self, inputs, *args, **kwargs):
      carry = self.connection.start(to_positions(inputs, rate)) if self.connection.starts else inputs
      if takes_adapters and getattr(self, "disable_quant_stats_update", False):
        # Qwix runs a model once to add LoRA's parameters to its modules. `block` runs a copy, which would get them.
        layer_class.__call__(self, from_positions(self.connection.inputs(carry), rate), *args, **kwargs)
      graphdef, params, others = nnx.split(self, nnx.Param, ...)
      leaves, tree = jax.tree.flatten((args, kwargs))
      is_array = [isinstance(x, (jax.Array, np.ndarray)) for x in leaves]

      def block(state, *inputs):
        """The stock layer as a pure function of arrays, which a connection can differentiate by itself."""
        *inputs, arrays = inputs
        arrays = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(arrays) if given else x for given, x in zip(is_array, leaves)])
        layer = nnx.merge(graphdef, *state)
        hidden = from_positions(layer.connection.read(*inputs), rate)
        output, kv_cache = layer_class.__call__(layer, hidden, *args, **kwargs)
        output = to_positions(output, rate)
        _, _, others = nnx.split(layer, nnx.Param, ...)
        return layer.connection.write(output), output, (kv_cache, others)

      arrays = [x for given, x in zip(is_array, leaves) if given]
      carry, (kv_cache, others) = self.connection.through(block, (params, others), carry, arrays)
      nnx.update(self, others)
      if self.connection.finishes:
        carry = from_positions(self.connection.finish(carry)[0], rate)
      return carry, kv_cache

    if hasattr(layer_class, "compute_shared_kv"):

      @functools.wraps(layer_class.compute_shared_kv)
      def compute_shared_kv(self, inputs, decoder_positions):
        carry = self.connection.start(inputs) if self.connection.starts else inputs
        layer = nnx.merge(*nnx.split(self))  # a copy: only the run in `__call__` may record metrics
        return layer_class.compute_shared_kv(layer, layer.connection.inputs(carry), decoder_positions)

  ConnectedLayer.__name__ = ConnectedLayer.__qualname__ = f"Connected{layer_class.__name__}"
  return ConnectedLayer


@functools.cache
def cycle(cycle_class: type[nnx.Module], members: tuple[tuple[str, int | None], ...]) -> type[nnx.Module]:
  """The class of a cycle of layers that MaxText scans, whose layers are connected.

  Args:
    members: names of the layers, in their order, each with the number of layers where it is a stack, or None.
  """

  class Cycle(cycle_class):
    """Runs its layers in a row. MaxText's `__call__` does this too, but shards what it passes on as one array."""

    @property
    def connection(self) -> Connection:
      return getattr(self, members[0][0]).connection

    @functools.wraps(cycle_class.__call__)
    def __call__(self, carry, *args, **kwargs):
      if kwargs.get("forced_routed_experts") is not None:
        raise NotImplementedError("forced_routed_experts: cycles of connected layers do not give each layer its part")
      for name, length in members:
        layer = getattr(self, name)
        taken = inspect.signature(type(layer).__call__).parameters
        of_layer = {key: value for key, value in kwargs.items() if key in taken}
        if length is None:
          carry, _ = layer(carry, *args, **of_layer)
        else:
          carry = nnx_scan.apply_scanned_layers(
            layer,
            carry,
            length=length,
            param_scan_axis=self.config.param_scan_axis,
            apply_fn=lambda layer, carry, given=of_layer: layer(carry, *args, **given)[0],
          )
      return carry, None

  Cycle.__name__ = Cycle.__qualname__ = f"ConnectedCycleOf{cycle_class.__name__}"
  return Cycle
