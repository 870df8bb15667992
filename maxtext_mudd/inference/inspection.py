"""Shows what a model computes inside: block outputs, depth weights, streams and attention maps, by name.

    arrays = maxtext_mudd.inspect(model, tokens)
    arrays["weights/v/da_003"]  # [batch, length, sources]: how the value stream of block 4 mixes X_0..X_3

docs/inside.md has a table of the names.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import types
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from maxtext.common.common_types import ShardMode
from maxtext.layers.attention_op import AttentionOp
import numpy as np

from maxtext_mudd import blocks
from maxtext_mudd.blocks import stacks
from maxtext_mudd.blocks.classes import change_class
from maxtext_mudd.checkpoints import layout, parameters
from maxtext_mudd.config.changed import changed
from maxtext_mudd.config.keys import refusals
from maxtext_mudd.connections import kept
from maxtext_mudd.connections.keys import raise_first
from maxtext_mudd.inference import forward, pretrained
from maxtext_mudd.model import mtp

KINDS = ("history", "weights", "gates", "written", "norms", "streams", "attention")
_PLAIN = types.MappingProxyType({"mudd": True, "depth_connection": "residual"})  # connections that change nothing


def inspect(
  model: nnx.Module,
  tokens: Int[Array, "B T"],
  *,
  keep: Sequence[str] = KINDS[:-1],
  positions: Int[Array, "B T"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> dict[str, Array]:
  """Runs a model and returns its logits and what it computed inside, by name.

  Args:
    model: what `from_pretrained` or `from_run` returns first, with connections or without. A model of scanned layers is
      copied to single layers in each call; call `inspectable` once to do without.
    tokens, positions, segment_ids: as for `logits`.
    keep: the kinds of arrays: some of `KINDS`. Attention maps, [B,H,T,T] for each block, are left out by default.

  Raises:
    ValueError: the tokens are not as for `logits`, there is no such kind, or the model has no single layers.
  """
  unknown = [kind for kind in keep if kind not in KINDS]
  if unknown:
    raise ValueError(f"keep has {unknown[0]!r}; the kinds of arrays are {', '.join(KINDS)}.")
  model = inspectable(model, "attention" in keep)
  logits, arrays = _inspect(tuple(keep))(model, *pretrained.checked_tokens(model, tokens, positions, segment_ids))
  return {"logits": logits, **arrays}


@functools.cache
def _inspect(keep: tuple[str, ...]) -> Callable:
  functions = dict.fromkeys(keep, lambda x: x)
  return forward.pure(lambda model, *batch: observe(model, batch, functions))


def observe(
  model: nnx.Module,
  batch: Sequence[Int[Array, "B T"]],
  functions: Mapping[str, Callable[[Array], Any]],
  edit: kept.Edit | None = None,
) -> tuple[Float[Array, "B T V"], dict[str, Any]]:
  """The logits of an inspectable model in float32, and what it keeps by name. Call it in a function that is compiled by
  `forward.pure`: it changes the model.

  Args:
    batch: tokens, positions and segments.
    functions: by kind, what is kept of an array.
    edit: a change of the weights of aggregates.

  Raises:
    ValueError: the model has not the form that `inspectable` makes.
  """
  if not model.config.mudd or model.config.scan_layers:
    raise ValueError("the model has scanned layers or no connections; call inspectable(model) first.")
  if "attention" in functions:
    for _, module in nnx.iter_modules(model):
      if isinstance(module, AttentionOp):
        change_class(module, _keeping_weights(type(module)))
  with kept.observing(functions, edit):
    logits = model(*batch, enable_dropout=False)
  return logits.astype(jnp.float32), _by_name(model.config, nnx.pop(model, kept.Kept))


def inspectable(model: nnx.Module, with_maps: bool = True) -> nnx.Module:
  """The model in the form in which it keeps arrays: with connections, single layers and automatic axes.

  Args:
    with_maps: whether attention computes its weights as an array, too.

  Returns:
    The model itself if it has this form, else a new one. Parameters of single layers are shared, others are copied.

  Raises:
    ValueError: MaxText has no single layers of this decoder block, a plain model has a setting that does not work with
      connections, or the model has trained state besides its parameters.
  """
  config = model.config
  new = inspectable_config(config, with_maps)
  if new is config:
    return model
  parameters.check_state(new)
  values = {"/".join(map(str, path)): x for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
  values = {path: x.get_value() for path, x in values.items()}
  if not config.mudd:
    values = {stacks.path_from_plain(config, path): x for path, x in values.items()}
  if config.scan_layers:
    values = layout.unstack({path: np.asarray(x) for path, x in values.items()}, changed(new, scan_layers=True))
  return pretrained.build_with(new, lambda place: {path: place(path, x) for path, x in values.items()})


def inspectable_config(config, with_maps: bool = True):
  """The configuration of the model that `inspectable` returns; the same one if it returns the model itself.

  Raises:
    ValueError: as `inspectable`, but for trained state.
  """
  if blocks.spec(config).attention is None:
    raise ValueError(f"decoder_block={config.decoder_block.value} has no attention, and MaxText runs it scanned only.")
  keys = {"scan_layers": False, "num_vocab_tiling": 1, "shard_mode": ShardMode.AUTO}
  keys |= {} if config.mudd else {**_PLAIN}
  keys |= {"attention": "dot_product"} if with_maps else {}
  different = {key: value for key, value in keys.items() if getattr(config, key) != value}
  if not different:
    return config
  new = changed(config, **different, remat_policy=None)
  if not config.mudd:
    raise_first(refusals(new))
  return new


@functools.cache
def _keeping_weights(stock: type[AttentionOp]) -> type[AttentionOp]:
  class KeepingAttentionOp(stock):
    def compute_local_attention(self, attn_weights, value, q_seq_len, model_mode, wv_product_einsum, sinks=None):
      """Keeps the weights [B,H,T,T]. `attn_weights` are masked logits, whatever MaxText calls them."""
      logits = attn_weights.astype(jnp.float32)
      logits = logits.reshape(logits.shape[0], -1, *logits.shape[3:])
      if sinks is not None:  # a logit for each head that takes part in the softmax
        of_sinks = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, of_sinks], axis=-1)
      kept.keep(self, "attention", {"x": jax.nn.softmax(logits)[..., : attn_weights.shape[-1]]})
      return super().compute_local_attention(attn_weights, value, q_seq_len, model_mode, wv_product_einsum, sinks)

  KeepingAttentionOp.__name__ = KeepingAttentionOp.__qualname__ = f"Keeping{stock.__name__}"
  return KeepingAttentionOp


def _by_name(config, state: nnx.State) -> dict[str, Any]:
  """What was kept, in order of name, by kind, stream and the number of blocks before, or of the block."""
  named, last = {}, blocks.num_blocks(config)
  for path, variable in nnx.to_flat_state(state):
    path = tuple(map(str, path))
    is_last, kind, stream = kept.NAME.fullmatch(path[-1]).groups()
    of_mtp = mtp.number_in(path)
    after = last + (of_mtp or 0) if is_last or of_mtp else stacks.block_of_single(config, path) - 1
    if kind == "attention":
      name = f"attention/block_{after + 1 - bool(of_mtp):03d}"
    elif kind == "history":
      name = f"history/{after:03d}" if stream == "x" else f"history/extra_{stream}"
    else:
      name = f"{kind}/{stream}/da_{after:03d}"
    named[name] = variable.get_value()
  return dict(sorted(named.items()))
