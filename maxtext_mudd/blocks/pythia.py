"""The GPT-NeoX block of Pythia, which MaxText lacks: attention and FFN read the residual stream in parallel."""

import functools

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float
from maxtext.common.common_types import MODEL_MODE_PREFILL
from maxtext.layers import quantizations
from maxtext.layers.attentions import Attention
from maxtext.layers.linears import Dropout, MlpBlock
from maxtext.utils import max_utils
from maxtext.utils.sharding import create_sharding, maybe_shard_with_logical

from maxtext_mudd.blocks.streams import Streams
from maxtext_mudd.kernels import ACTIVATIONS


class LayerNorm(nnx.LayerNorm):
  """LayerNorm with scale and bias, its statistics in float32. The scale is stored as it is, as in the released models;
  MaxText's of gpt3 stores it less one, which rounds."""

  def __init__(self, config, rngs: nnx.Rngs):
    super().__init__(
      config.emb_dim,
      epsilon=config.normalization_layer_epsilon,
      dtype=config.dtype,
      param_dtype=config.weight_dtype,
      use_fast_variance=False,
      scale_metadata={"sharding": ("norm",)},
      bias_metadata={"sharding": ("norm",)},
      rngs=rngs,
    )

  def __call__(self, x: Float[Array, "B T D"], out_sharding: NamedSharding | None = None) -> Float[Array, "B T D"]:
    """`out_sharding`, which MaxText's norms take, is that of `x` already."""
    return super().__call__(x)


class PythiaDecoderLayer(nnx.Module):
  """X_i = MHA(LN_q(xq), LN_k(xk), LN_v(xv)) + FFN(LN(xr)) + xr; without connections all four are one x.

  LayerNorm with bias, biased projections, rotary embedding on the first `mudd_rotary_fraction` of each head,
  a plain MLP with the activation of `mlp_activations` (`gelu` is the exact one here), and RMSNorm on queries and keys
  where `use_qk_norm` asks for it (the released MUDDPythia). Built and called as MaxText's own layers are.
  """

  def __init__(self, config, model_mode, mesh, rngs: nnx.Rngs, quant=None):
    self.config = config
    self.mesh = mesh
    self.quant = quant
    batch_size, length = max_utils.get_batch_seq_len_for_mode(config, model_mode)
    inputs_shape = (batch_size, length, config.emb_dim)
    prefill = "prefill_" if model_mode == MODEL_MODE_PREFILL else ""
    self.activation_axis_names = ("activation_batch", f"{prefill}activation_norm_length", "activation_embed")

    self.pre_self_attention_norm = LayerNorm(config, rngs)
    self.self_attention = Attention(
      config=config,
      num_query_heads=config.num_query_heads,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      max_target_length=config.max_target_length,
      max_prefill_predict_length=config.max_prefill_predict_length,
      attention_kernel=config.attention,
      inputs_q_shape=inputs_shape,
      inputs_kv_shape=inputs_shape,
      mesh=mesh,
      dtype=config.dtype,
      weight_dtype=config.weight_dtype,
      dropout_rate=config.dropout_rate,
      float32_qk_product=config.float32_qk_product,
      float32_logits=config.float32_logits,
      quant=quant,
      kv_quant=quantizations.configure_kv_quant(config),
      prefill_cache_axis_order=tuple(map(int, config.prefill_cache_axis_order.split(","))),
      ar_cache_axis_order=tuple(map(int, config.ar_cache_axis_order.split(","))),
      compute_axis_order=tuple(map(int, config.compute_axis_order.split(","))),
      reshape_q=config.reshape_q,
      use_ragged_attention=config.use_ragged_attention,
      ragged_block_size=config.ragged_block_size,
      use_qk_norm=config.use_qk_norm,
      query_pre_attn_scalar=config.head_dim**-0.5,
      use_bias_in_projections=True,
      partial_rotary_factor=config.mudd_rotary_fraction,
      model_mode=model_mode,
      rngs=rngs,
    )
    self.pre_mlp_norm = LayerNorm(config, rngs)
    self.mlp = MlpBlock(
      config=config,
      mesh=mesh,
      in_features=config.emb_dim,
      intermediate_dim=config.mlp_dim,
      activations=[ACTIVATIONS[name] for name in config.mlp_activations],
      intermediate_dropout_rate=0.0,
      dtype=config.dtype,
      weight_dtype=config.weight_dtype,
      use_bias=True,
      quant=quant,
      model_mode=model_mode,
      rngs=rngs,
    )
    self.dropout = Dropout(rate=config.dropout_rate, broadcast_dims=(-2,), rngs=rngs)
    self._shard = functools.partial(
      maybe_shard_with_logical,
      mesh=mesh,
      shard_mode=config.shard_mode,
      debug_sharding=config.debug_sharding,
    )

  def __call__(
    self,
    inputs,
    decoder_segment_ids,
    decoder_positions,
    deterministic,
    model_mode,
    previous_chunk=None,
    slot=None,
    kv_cache=None,
    attention_metadata=None,
  ):
    if isinstance(inputs, tuple):  # what another layer returned
      inputs = inputs[0]
    inputs = checkpoint_name(self._shard(inputs, self.activation_axis_names), "decoder_layer_input")
    sharding = create_sharding(self.mesh, self.activation_axis_names)
    normed = self._shard(self.pre_self_attention_norm(inputs, out_sharding=sharding), self.activation_axis_names)
    attention, kv_cache = self.self_attention(
      normed,
      normed,
      decoder_positions,
      decoder_segment_ids=decoder_segment_ids,
      deterministic=deterministic,
      model_mode=model_mode,
      slot=slot,
      previous_chunk=previous_chunk,
      out_sharding=sharding,
      kv_cache=kv_cache,
      attention_metadata=attention_metadata,
    )
    residual = inputs.r if isinstance(inputs, Streams) else inputs
    hidden = self._shard(self.pre_mlp_norm(residual, out_sharding=sharding), self.activation_axis_names)
    feed_forward = self.mlp(
      hidden,
      deterministic=deterministic,
      intermediate_sharding=create_sharding(self.mesh, ("activation_batch", "activation_length", "activation_mlp")),
      out_sharding=sharding,
    )
    update = self.dropout(attention, deterministic=deterministic)
    update = update + self.dropout(feed_forward, deterministic=deterministic)
    output = self._shard(residual + update, self.activation_axis_names)
    if self.config.record_internal_nn_metrics:
      self.sow(nnx.Intermediate, "activation_mean", jnp.mean(output))
      self.sow(nnx.Intermediate, "activation_stdev", jnp.std(output))
      self.sow(nnx.Intermediate, "activation_fraction_zero", jnp.mean(output == 0))
    return output, None if self.config.scan_layers else kv_cache
