"""The decoder with depth connections: MaxText's layers, each with a connection that computes its inputs."""

from collections.abc import Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.layers.nnx_decoders import NNXDecoder

from maxtext_mudd import connections
from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.blocks.chunked_prefill import prefill_in_chunks
from maxtext_mudd.blocks.pythia import LayerNorm, PythiaDecoderLayer
from maxtext_mudd.config.changed import changed
from maxtext_mudd.connections import history, layout
from maxtext_mudd.connections.base import Connection
from maxtext_mudd.model import initializers
from maxtext_mudd.model.layer import connected, connection_rngs


class LayerGroups(nnx.Module):
  """Stacks of scanned layers, one for each FFN width, in the order of the layers: `group_0`, `group_1`, ..."""

  def __init__(self, stacks):
    self.number = len(stacks)
    for k, stack in enumerate(stacks):
      setattr(self, f"group_{k}", stack)

  def __iter__(self):
    return (getattr(self, f"group_{k}") for k in range(self.number))


class MuddDecoder(NNXDecoder):
  """MaxText's decoder. With `mudd: true`, its layers have depth connections.

  MaxText's loop over layers then passes the carry of the connections from layer to layer. The first layer takes an
  array, and the last layer returns an array. `mudd_decoder_layer` and `mudd_init` also apply with `mudd: false`, for
  fair baselines.
  """

  def __init__(self, config, mesh, quant=None, model_mode=MODEL_MODE_TRAIN, *, rngs):
    super().__init__(config, mesh, quant, model_mode, rngs=rngs)
    if self._is_connected:
      connections.family(config).share(self)
    initializers.initialise(self, config, rngs)
    if config.use_chunked_prefill:
      prefill_in_chunks(self, config.prefill_chunk_size)

  @property
  def _is_connected(self) -> bool:
    return getattr(self.config, "mudd", False)

  def get_remat_policy(self):
    policy = super().get_remat_policy()
    if policy is None and self._is_connected and self._remat_policy_name() == "full":
      policy = jax.checkpoint_policies.save_only_these_names(history.LAST_OUTPUT_NAME)
    return policy

  def _remat_policy_name(self) -> str:
    return getattr(self, "remat_policy_override", None) or self.config.remat_policy

  def get_norm_layer(self, num_features, rngs):
    if _is_pythia(self.config):
      return lambda **_: LayerNorm(self.config, rngs)  # it reads MaxText's arguments from the configuration
    return super().get_norm_layer(num_features, rngs)

  def _init_decoder_layers(self, decoder_block_classes, rngs, mesh):
    if _is_pythia(self.config):
      decoder_block_classes = [PythiaDecoderLayer]
    super()._init_decoder_layers(decoder_block_classes, rngs, mesh)

  def _create_and_register_layer(self, layer_cls, rngs, base_name, i, **layer_kwargs):
    if self._is_connected:
      layer_cls = connected(layer_cls)
      width = ffn_widths.of_config(self.config)[i]
      layer_kwargs |= {"ffn_width": width, "connect": functools.partial(self._connect, [i + 1])}
    super()._create_and_register_layer(layer_cls, rngs, base_name, i, **layer_kwargs)

  def _create_scanned_layers(self, decoder_layer_class, length, metadata_axis_name, rngs, **layer_kwargs):
    create = super()._create_scanned_layers
    if not self._is_connected:
      return create(decoder_layer_class, length, metadata_axis_name, rngs, **layer_kwargs)
    self.connection = self._connect([], self.mesh, rngs)
    widths, stacks = ffn_widths.of_config(self.config), []
    for blocks in ffn_widths.groups(self.config):
      keys = {"ffn_width": widths[blocks[0] - 1], "connect": functools.partial(self._connect, blocks)}
      stack = create(connected(decoder_layer_class), len(blocks), metadata_axis_name, rngs, **keys, **layer_kwargs)
      singles = [self._connect([block], self.mesh, rngs, scan_layers=False) for block in blocks]
      layout.initialise(stack, singles, self.config)
      stacks.append(stack)
    return stacks[0] if len(stacks) == 1 else LayerGroups(stacks)

  def _connect(
    self, blocks: Sequence[int], mesh: jax.sharding.Mesh, rngs: nnx.Rngs, scan_layers: bool | None = None
  ) -> Connection:
    """Builds the connection of a single block, or of the blocks of a stack. Without blocks, builds the connection that
    starts and finishes the stacks.

    Args:
      scan_layers: in place of the configuration's.
    """
    config = self.config if scan_layers is None else changed(self.config, scan_layers=scan_layers)
    starts = not blocks or (not config.scan_layers and blocks[0] == 1)
    finishes = not blocks or (not config.scan_layers and blocks[-1] == config.num_decoder_layers)
    rngs = connection_rngs(rngs, blocks[0] if blocks else 0)
    return connections.family(config).build(config, tuple(blocks), mesh, rngs, starts=starts, finishes=finishes)

  def _apply_layers_sequentially(self, layers, x_in, *args, **kwargs):
    apply = super()._apply_layers_sequentially
    if not self._is_connected:
      return apply(layers, x_in, *args, **kwargs)
    carry = self.connection.start(x_in, self._rematerialisation())
    per_layer = {name: kwargs.pop(name, None) for name in ("kv_caches_stacked", "forced_routed_experts_scanned")}
    for stack in layers if isinstance(layers, LayerGroups) else [layers]:
      blocks = stack.connection.blocks
      first, end = blocks[0] - 1, blocks[-1]
      of_stack = {name: None if x is None else x[first:end] for name, x in per_layer.items()}
      kwargs |= {"length": len(blocks), "skip_block_remat": stack.connection.rematerialises}
      carry, _, _ = apply(stack, carry, *args, **of_stack, **kwargs)
      if of_stack["kv_caches_stacked"] is not None:  # a list that is changed in place
        per_layer["kv_caches_stacked"][first:end] = of_stack["kv_caches_stacked"]
    hidden, sown = self.connection.finish(carry, nnx.state(layers, _is_floating_state))
    nnx.update(layers, sown)
    return hidden, layers, None

  def _rematerialisation(self):
    """The argument `rematerialise` of `Connection.start` for the policy. None recomputes everything. MaxText treats the
    policy "none", which a configuration holds as None, like "full"."""
    if self._remat_policy_name() in (None, "full", "none"):
      return None
    return functools.partial(jax.checkpoint, policy=self.get_remat_policy(), prevent_cse=False)


def _is_floating_state(path, variable) -> bool:
  """Whether a variable is floating-point state that layers sow or update. A loss may read such state."""
  if isinstance(variable, nnx.Param):
    return False
  return all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(nnx.pure(variable)))


def _is_pythia(config) -> bool:
  return getattr(config, "mudd_decoder_layer", "stock") == "pythia"
