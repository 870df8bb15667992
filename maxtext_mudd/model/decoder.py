"""The decoder with depth connections: stock layers, each with the connection that feeds it."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.layers.nnx_decoders import NNXDecoder
import numpy as np

from maxtext_mudd.blocks.chunked_prefill import prefill_in_chunks
from maxtext_mudd.blocks.feed_forward import split_feed_forward
from maxtext_mudd.blocks.pythia import LayerNorm, PythiaDecoderLayer
from maxtext_mudd.blocks.rotary import round_rotary_table
from maxtext_mudd.config.changed import changed
from maxtext_mudd.connections import history, registry
from maxtext_mudd.connections import scan as scanned
from maxtext_mudd.connections.mudd import topology
from maxtext_mudd.model import initializers

_CONNECTION_SEED = 0x6D756464  # keeps the keys of the connections apart from those of the stock layers


@functools.cache
def connected(layer_class: type[nnx.Module]) -> type[nnx.Module]:
  """The stock layer class with a depth connection around its `__call__`.

  Stock parameters keep their paths, but for the attention norm of a block that reads four streams: q, k and v.
  """

  class ConnectedLayer(layer_class):
    """Reads what flows between blocks and adds its own; the last layer returns the hidden state instead."""

    def __init__(self, *, config, ffn_width, connect, seed, rngs, **kwargs):
      layer_config = config
      if ffn_width != config.mlp_dim:
        layer_config = changed(config, mlp_dim=ffn_width, moe_mlp_dim=ffn_width)
      super().__init__(config=layer_config, rngs=rngs, **kwargs)
      # Keys of its own, so that stock parameters start as they would without connections.
      key = jax.random.fold_in(rngs.params.key[...], _CONNECTION_SEED + seed)
      self.connection = connect(mesh=self.mesh, rngs=nnx.Rngs(params=key))
      self.connection.fit(self)
      if config.mudd_ffn_parts > 1:
        split_feed_forward(self)
      if config.mudd_rope_table != "stock":
        round_rotary_table(self, config.mudd_rope_table)

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

    def _recomputed(self, carry, args, kwargs):
      """The same by `connection.through`, which takes a pure function of arrays."""
      graphdef, params, others = nnx.split(self, nnx.Param, ...)
      leaves, tree = jax.tree.flatten((args, kwargs))
      is_array = [isinstance(x, (jax.Array, np.ndarray)) for x in leaves]

      def block(state, *inputs):
        *inputs, arrays = inputs
        arrays = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(arrays) if own else x for own, x in zip(is_array, leaves)])
        layer = nnx.merge(graphdef, *state)
        output, kv_cache = layer_class.__call__(layer, layer.connection.block_input(*inputs), *args, **kwargs)
        _, _, others = nnx.split(layer, nnx.Param, ...)
        return layer.connection.source(output), output, (kv_cache, others)

      arrays = [x for own, x in zip(is_array, leaves) if own]
      carry, (kv_cache, others) = self.connection.through(block, (params, others), carry, arrays)
      nnx.update(self, others)
      return carry, kv_cache

  ConnectedLayer.__name__ = ConnectedLayer.__qualname__ = f"Connected{layer_class.__name__}"
  return ConnectedLayer


class LayerGroups(nnx.Module):
  """Stacks of scanned layers, one for each FFN width, in their order: `group_0`, `group_1`, ..."""

  def __init__(self, stacks):
    self.number = len(stacks)
    for k, stack in enumerate(stacks):
      setattr(self, f"group_{k}", stack)

  def __iter__(self):
    return (getattr(self, f"group_{k}") for k in range(self.number))


class MuddDecoder(NNXDecoder):
  """The stock decoder, its layers connected in depth when `mudd` is on.

  What flows through the stock loop over layers is then the carry of the connections, an array before the first and
  after the last layer. `mudd_decoder_layer` and `mudd_init` hold with `mudd` off, too, for fair baselines.
  """

  def __init__(self, config, mesh, quant=None, model_mode=MODEL_MODE_TRAIN, *, rngs):
    super().__init__(config, mesh, quant, model_mode, rngs=rngs)
    initializers.initialise(self, config, rngs)
    if config.use_chunked_prefill:
      prefill_in_chunks(self, config.prefill_chunk_size)

  def get_remat_policy(self):
    policy = super().get_remat_policy()
    if policy is None and getattr(self.config, "mudd", False) and self._remat_policy_name() == "full":
      policy = jax.checkpoint_policies.save_only_these_names(history.LAST_OUTPUT_NAME)
    return policy

  def _remat_policy_name(self) -> str:
    return getattr(self, "remat_policy_override", None) or self.config.remat_policy

  def get_norm_layer(self, num_features, rngs):
    if _is_pythia(self.config):
      return lambda **_: LayerNorm(self.config, rngs)  # what MaxText gives it, it has from the configuration
    return super().get_norm_layer(num_features, rngs)

  def _init_decoder_layers(self, decoder_block_classes, rngs, mesh):
    if _is_pythia(self.config):
      decoder_block_classes = [PythiaDecoderLayer]
    super()._init_decoder_layers(decoder_block_classes, rngs, mesh)

  def _create_and_register_layer(self, layer_cls, rngs, base_name, i, **layer_kwargs):
    if getattr(self.config, "mudd", False):
      layer_cls = connected(layer_cls)
      own, block = topology.from_config(self.config), i + 1
      family = registry.FAMILIES[self.config.depth_connection]
      connect = functools.partial(family, self.config, own, block)
      layer_kwargs |= {"ffn_width": own.ffn_widths[i], "connect": connect, "seed": block}
    super()._create_and_register_layer(layer_cls, rngs, base_name, i, **layer_kwargs)

  def _create_scanned_layers(self, decoder_layer_class, length, metadata_axis_name, rngs, **layer_kwargs):
    create = super()._create_scanned_layers
    if not getattr(self.config, "mudd", False):
      return create(decoder_layer_class, length, metadata_axis_name, rngs, **layer_kwargs)
    own = topology.from_config(self.config)
    key = jax.random.fold_in(rngs.params.key[...], _CONNECTION_SEED)
    self.connection = scanned.Ends(self.config, own, self.mesh, nnx.Rngs(params=key))
    stacks = []
    for blocks in own.groups:
      keys = {
        "ffn_width": own.ffn_widths[blocks[0] - 1],
        "connect": functools.partial(scanned.ScannedConnection, self.config, own, blocks),
        "seed": 0,
      }
      stack = create(connected(decoder_layer_class), len(blocks), metadata_axis_name, rngs, **keys, **layer_kwargs)
      scanned.pad(stack, stack.connection, self.config.param_scan_axis)
      stacks.append(stack)
    return stacks[0] if len(stacks) == 1 else LayerGroups(stacks)

  def _apply_layers_sequentially(self, layers, x_in, *args, **kwargs):
    apply = super()._apply_layers_sequentially
    if not getattr(self.config, "mudd", False):
      return apply(layers, x_in, *args, **kwargs)
    del kwargs["length"]
    carry, per_layer = self.connection.start(x_in, self._rematerialisation()), {}
    for name in ("kv_caches_stacked", "forced_routed_experts_scanned"):
      per_layer[name] = kwargs.pop(name, None)
    for stack in layers if isinstance(layers, LayerGroups) else [layers]:
      blocks = stack.connection.table.blocks
      own = {name: None if x is None else x[blocks[0] - 1 : blocks[-1]] for name, x in per_layer.items()}
      carry, _, _ = apply(stack, carry, *args, length=len(blocks), skip_block_remat=True, **own, **kwargs)
      if own["kv_caches_stacked"] is not None:  # a list that is changed in place
        per_layer["kv_caches_stacked"][blocks[0] - 1 : blocks[-1]] = own["kv_caches_stacked"]
    hidden, sown = self.connection.finish(carry, nnx.state(layers, _is_floating_state))
    nnx.update(layers, sown)
    return hidden, layers, None

  def _rematerialisation(self):
    """`Buffer.rematerialise` for the policy. MaxText's "none" names nothing to be kept, as "full" does; configurations
    have it as None."""
    if self._remat_policy_name() in (None, "full", "none"):
      return None
    return functools.partial(jax.checkpoint, policy=self.get_remat_policy(), prevent_cse=False)


def _is_floating_state(path, variable) -> bool:
  """What layers sow or update, and a loss may read."""
  if isinstance(variable, nnx.Param):
    return False
  return all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(nnx.pure(variable)))


def _is_pythia(config) -> bool:
  return getattr(config, "mudd_decoder_layer", "stock") == "pythia"
