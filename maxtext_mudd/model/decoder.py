"""The decoder with depth connections: MaxText's layers, each with a connection that computes its inputs."""

from collections.abc import Sequence
import contextvars
import functools
import operator

from flax import nnx
import jax
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.layers import nnx_scan
from maxtext.layers.nnx_decoders import NNXDecoder

from maxtext_mudd import blocks as decoder_blocks
from maxtext_mudd import connections
from maxtext_mudd.blocks import ffn_widths, stacks
from maxtext_mudd.blocks.chunked_prefill import prefill_in_chunks
from maxtext_mudd.blocks.classes import change_class
from maxtext_mudd.blocks.halves import split
from maxtext_mudd.blocks.pythia import LayerNorm, PythiaDecoderLayer
from maxtext_mudd.config.changed import changed
from maxtext_mudd.connections import history, layout
from maxtext_mudd.connections.base import Connection
from maxtext_mudd.connections.connection import Embeddings
from maxtext_mudd.model import initializers
from maxtext_mudd.model.extra_embeddings import ExtraEmbeddings
from maxtext_mudd.model.layer import connect, connection_rngs, cycle, from_positions, to_positions, with_ffn_width
from maxtext_mudd.model.pipeline import connect_stages, is_floating_state, rematerialisation

# Whether the decoder embeds the tokens of its own call, with which the connections start. Blocks of multi-token
# prediction call `_apply_embedding`, too, for the embeddings of later tokens.
_starts_connections = contextvars.ContextVar("starts_connections", default=False)


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
    initializers.initialise(self, config, rngs)
    number = connections.plan(config).extra_embeddings if self._is_connected else 0
    self.extra_embeddings = ExtraEmbeddings(number, config, mesh, rngs) if number else None
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
    if not self._is_connected:
      return
    self._split_layers()
    if stacks.are_stacked(self.config):
      self._connect_stacks(rngs)
    else:
      for path, block in stacks.single_layers(self.config).items():
        layer = operator.attrgetter(path.replace("/", "."))(self)
        connect(layer, self._connection([block], rngs, scan_layers=False), self.config)
    connections.family(self.config).share(self)

  @functools.wraps(NNXDecoder.__call__)
  def __call__(self, *args, **kwargs):
    token = _starts_connections.set(True)
    try:
      return super().__call__(*args, **kwargs)
    finally:
      _starts_connections.reset(token)

  def _apply_embedding(
    self, shared_embedding, decoder_input_tokens, decoder_positions, deterministic, model_mode, **kwargs
  ):
    arguments = (decoder_input_tokens, decoder_positions, deterministic, model_mode)
    embedding = super()._apply_embedding(shared_embedding, *arguments, **kwargs)
    if self.extra_embeddings is None or not _starts_connections.get():
      return embedding
    extra = self.extra_embeddings(decoder_input_tokens.astype("int32"), model_mode)
    return Embeddings(embedding, tuple(self.dropout(x, deterministic=deterministic) for x in extra))

  def _create_and_register_layer(self, layer_cls, rngs, base_name, i, **layer_kwargs):
    if self._is_connected:
      layer_cls = self._with_ffn_width(layer_cls, i + 1)
    super()._create_and_register_layer(layer_cls, rngs, base_name, i, **layer_kwargs)

  def _create_scanned_layers(self, decoder_layer_class, length, metadata_axis_name, rngs, **layer_kwargs):
    create = super()._create_scanned_layers
    if not (self._is_connected and self.config.mudd_ffn_reallocation):
      return create(decoder_layer_class, length, metadata_axis_name, rngs, **layer_kwargs)
    groups = []
    for blocks in ffn_widths.groups(self.config):
      layer_class = self._with_ffn_width(decoder_layer_class, blocks[0])
      groups.append(create(layer_class, len(blocks), metadata_axis_name, rngs, **layer_kwargs))
    return groups[0] if len(groups) == 1 else LayerGroups(groups)

  def _with_ffn_width(self, layer_class: type[nnx.Module], block: int) -> type[nnx.Module]:
    width = ffn_widths.of_config(self.config)[block - 1]
    return layer_class if width == self.config.mlp_dim else with_ffn_width(layer_class, width)

  def _split_layers(self) -> None:
    """Splits layers of MaxText that are several blocks. Each becomes a cycle, of layers that are connected later."""
    row = decoder_blocks.spec(self.config)
    for layer in self.get_layers() if row.sides else []:
      halves = split(layer, row.cycle)
      change_class(layer, cycle(type(layer), tuple((half, None) for half in halves)))

  def _connect_stacks(self, rngs: nnx.Rngs) -> None:
    """Connects the stacks of scanned layers. A connection of the decoder itself starts and finishes them."""
    self.connection = self._connection([], rngs, scan_layers=True)
    if stacks.num_stages(self.config) > 1:
      connect_stages(self.pipeline_module, self.connection)
    members = {}
    for stack in stacks.of_config(self.config):
      layers = operator.attrgetter(".".join(stack.path))(self)
      connect(layers, self._stacked_connection(stack, rngs), self.config)
      singles = [self._connection([block], rngs, scan_layers=False) for block in stack.blocks]
      layout.initialise(layers, singles, stack, self.config)
      if len(stack.path) > 1 and not stack.of_stages:
        members.setdefault(stack.path[0], []).append((stack.path[-1], stack.inner_length))
    row = decoder_blocks.spec(self.config)
    if row.cycle and not row.sides:  # `_split_layers` changed the classes of layers with several blocks
      for name, of_cycle in members.items():
        cycles = getattr(self, name)
        change_class(cycles, cycle(type(cycles), tuple(of_cycle)))

  def _stacked_connection(self, stack: stacks.Stack, rngs: nnx.Rngs) -> Connection:
    # Names of the axes of stock parameters in MaxText's metadata, and where they are.
    names, axes = ["layers"] * len(stack.sizes), [self.config.param_scan_axis] * len(stack.sizes)
    if stack.inner_length:
      names[-1] = "local_layers"
    if stack.of_stages:
      names[1:], axes[0] = ["layers_per_stage"] * (len(names) - 1), 0

    def create(rngs, depth=0):
      if depth == len(names):
        return self._connection(stack.blocks, rngs, scan_layers=True)
      return nnx_scan.create_scanned_layers(
        functools.partial(create, depth=depth + 1),
        length=stack.sizes[depth],
        param_scan_axis=axes[depth],
        metadata_axis_name=names[depth],
        rngs=rngs,
      )

    return create(connection_rngs(rngs, stack.blocks[0]))

  def _connection(self, blocks: Sequence[int], rngs: nnx.Rngs, *, scan_layers: bool) -> Connection:
    """The connection of a single block, or of the blocks of a stack. Without blocks, the connection that starts and
    finishes the stacks.

    Args:
      scan_layers: in place of the configuration's. Connections of the stages of a pipeline are those of scanned layers.
    """
    config = self.config
    if config.scan_layers != scan_layers:
      config = changed(config, scan_layers=scan_layers)
    starts = not blocks or (not config.scan_layers and blocks[0] == 1)
    finishes = not blocks or (not config.scan_layers and blocks[-1] == decoder_blocks.num_blocks(config))
    rngs = connection_rngs(rngs, blocks[0] if blocks else 0)
    return connections.family(config).build(config, tuple(blocks), self.mesh, rngs, starts=starts, finishes=finishes)

  def _apply_layers_sequentially(self, layers, x_in, *args, **kwargs):
    apply = super()._apply_layers_sequentially
    if not self._is_connected or layers is None:
      return apply(layers, x_in, *args, **kwargs)
    carry = self._start(x_in)
    per_layer = {name: kwargs.pop(name, None) for name in ("kv_caches_stacked", "forced_routed_experts_scanned")}
    end = 0
    for stack in layers if isinstance(layers, LayerGroups) else [layers]:
      first, end = end, end + len(stack.connection.blocks)
      of_stack = {name: None if x is None else x[first:end] for name, x in per_layer.items()}
      kwargs |= {"length": end - first, "skip_block_remat": stack.connection.rematerialises}
      carry, _, _ = apply(stack, carry, *args, **of_stack, **kwargs)
      if of_stack["kv_caches_stacked"] is not None:  # a list that is changed in place
        per_layer["kv_caches_stacked"][first:end] = of_stack["kv_caches_stacked"]
    is_last = layers is self.get_layers()[-1]
    return self._finish(carry) if is_last else carry, layers, None

  def _apply_gemma3_scanned_blocks(self, y, *args, **kwargs):
    return self._apply_stacks(super()._apply_gemma3_scanned_blocks, y, *args, **kwargs)

  def _apply_deepseek4_scanned_blocks(self, y, *args, **kwargs):
    return self._apply_stacks(super()._apply_deepseek4_scanned_blocks, y, *args, **kwargs)

  def _apply_stacks(self, apply, y, *args, **kwargs):
    """MaxText's function for all layers of a block, which calls some of them outside the functions overridden here."""
    if not self._is_connected:
      return apply(y, *args, **kwargs)
    carry = apply(self._start(y), *args, **kwargs)
    return carry if isinstance(carry, jax.Array) else self._finish(carry)

  def _apply_remainder_block(self, block, y, layer_args, layer_kwargs, **kwargs):
    apply = super()._apply_remainder_block
    if not self._is_connected:
      return apply(block, y, layer_args, layer_kwargs, **kwargs)
    carry = self._start(y)
    if block.connection.rematerialises:  # MaxText would recompute it twice, and drop the losses of its routers
      carry, _ = block(carry, *layer_args, **layer_kwargs)
    else:
      carry = apply(block, carry, layer_args, layer_kwargs, **kwargs)
    return self._finish(carry)

  def _start(self, x):
    """The carry of the connections, from the embedding or from the stack before."""
    if not isinstance(x, jax.Array | Embeddings):
      return x
    return self.connection.start(to_positions(x, self.config.mhc_expansion_rate), self._rematerialisation())

  def _finish(self, carry):
    """The hidden state after the last stack."""
    all_layers = self.get_layers()
    hidden, _, sown = self.connection.finish(carry, [nnx.state(layers, is_floating_state) for layers in all_layers])
    for layers, of_layers in zip(all_layers, sown):
      nnx.update(layers, of_layers)
    return from_positions(hidden, self.config.mhc_expansion_rate)

  def _rematerialisation(self):
    return rematerialisation(self._remat_policy_name(), self.get_remat_policy())


def _is_pythia(config) -> bool:
  return getattr(config, "mudd_decoder_layer", "stock") == "pythia"
