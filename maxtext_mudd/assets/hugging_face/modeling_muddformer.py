"""MUDDFormer (arXiv 2502.12170) for transformers: multiway dynamic dense connections between the blocks of a decoder.

After each block a depth-wise aggregate (DA) mixes the embedding and the outputs of blocks so far, token by token, to
the query, key, value and residual streams of the next block. All sources of a token belong to one forward pass: a
cache holds keys and values as in any decoder, and nothing else.

Shapes: B batch, T tokens, D hidden size, C streams, N sources, K hidden width of an aggregate, E experts, of which each
token has A.
"""

import dataclasses
import inspect

import torch
from torch import nn
import torch.nn.functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from .configuration_muddformer import IS_5, MuddformerConfig

try:
  from transformers.masking_utils import create_causal_mask
except ImportError:  # before 4.53
  create_causal_mask = None

# Newer versions of transformers call the cache of keys and values so.
CACHE = "cache" if "cache" in {x.name for x in dataclasses.fields(MoeCausalLMOutputWithPast)} else "past_key_values"
# Before transformers 5.6 a static cache reads the places of the tokens, cache_kwargs["cache_position"].
CACHE_TAKES_PLACES = "cache_kwargs" in inspect.signature(Cache.update).parameters
# The arguments of create_causal_mask were renamed several times.
MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters if create_causal_mask else ()


class MuddformerRMSNorm(nn.Module):
  """RMSNorm in float32, with a scale unless `has_scale` is false."""

  def __init__(self, size, eps, has_scale=True, start=1.0):
    super().__init__()
    self.eps, self.start = eps, start
    self.weight = nn.Parameter(torch.full((size,), start)) if has_scale else None

  def forward(self, x):
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
    normed = normed.to(x.dtype)
    return normed if self.weight is None else normed * self.weight


def block_norm(config):
  if config.block == "pythia":
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
  return MuddformerRMSNorm(config.hidden_size, config.norm_eps)


def rotate(x, cos, sin):
  """Rotates the first channels of each head, as many as `cos` [B,1,T,R] has, in pairs (p, p + R/2)."""
  rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
  first, second = rotated.chunk(2, dim=-1)
  rotated = rotated * cos + torch.cat([-second, first], dim=-1) * sin
  return torch.cat([rotated, rest], dim=-1)


def angles(config, position_ids, dtype):
  """cos and sin [B,1,T,R] of the rotary embedding."""
  size = int(config.head_dim * config.partial_rotary_factor)
  exponents = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32) / size
  angle = position_ids[:, None, :, None].float() / config.rope_theta**exponents
  angle = torch.cat([angle, angle], dim=-1)
  return angle.cos().to(dtype), angle.sin().to(dtype)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
  """Attention of transformers' interface: query [B,H,T,P], key and value [B,H',S,P] -> [B,T,H,P], weights [B,H,T,S]."""
  key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
  scores = query @ key.transpose(2, 3) * scaling
  if attention_mask is not None:
    scores = scores + attention_mask[..., : key.shape[-2]]
  weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
  return (weights @ value).transpose(1, 2).contiguous(), weights


class MuddformerAttention(nn.Module):
  """Causal attention whose queries, keys and values come from three inputs."""

  def __init__(self, config, layer_idx):
    super().__init__()
    self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
    self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    self.scaling, self.attention_dropout = config.attention_multiplier, config.attention_dropout
    self.is_causal = True
    width, bias = config.hidden_size, config.block == "pythia"
    self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
    self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
    self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
    self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=bias)
    if config.use_qk_norm:
      self.q_norm = MuddformerRMSNorm(config.head_dim, config.norm_eps)
      self.k_norm = MuddformerRMSNorm(config.head_dim, config.norm_eps)

  def forward(self, xq, xk, xv, position_embeddings, attention_mask=None, cache=None, cache_position=None, **kwargs):
    """xq, xk, xv [B,T,D] -> [B,T,D], and attention weights or None. cache_position: places of the tokens, [T]."""
    heads = (*xq.shape[:-1], -1, self.head_dim)
    query, key, value = (
      project(x).view(heads) for project, x in ((self.q_proj, xq), (self.k_proj, xk), (self.v_proj, xv))
    )
    if self.config.use_qk_norm:
      query, key = self.q_norm(query), self.k_norm(key)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
    if cache is not None:
      given = {}
      if not isinstance(cache, Cache):  # a paged cache changes `kwargs`, by which its attention finds keys and values
        given["kwargs"] = kwargs
      elif CACHE_TAKES_PLACES:
        given["cache_kwargs"] = {"cache_position": cache_position}
      key, value = cache.update(key, value, self.layer_idx, **given)
    attend = eager_attention
    if self.config._attn_implementation != "eager":
      attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    dropout = self.attention_dropout if self.training else 0.0
    x, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
    return self.o_proj(x.reshape(*x.shape[:2], -1)), weights


class MuddformerMLP(nn.Module):
  """The FFN of a block: gated, or of `block="pythia"` with biases and without a gate."""

  def __init__(self, config, size):
    super().__init__()
    bias = config.block == "pythia"
    self.gate_proj = None if bias else nn.Linear(config.hidden_size, size, bias=False)
    self.up_proj = nn.Linear(config.hidden_size, size, bias=bias)
    self.down_proj = nn.Linear(size, config.hidden_size, bias=bias)
    self.activation = ACT2FN[config.hidden_act]

  def forward(self, x):
    if self.gate_proj is None:
      return self.down_proj(self.activation(self.up_proj(x)))
    return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class MuddformerRouter(nn.Module):
  """Chooses A experts for each token, those of the largest scores, and weights them by the softmax of these scores."""

  def __init__(self, config):
    super().__init__()
    self.num_chosen = config.num_experts_per_tok
    self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

  def forward(self, x):
    """x [...,D] -> scores [...,E], weights [...,A] that add up to one, and numbers of experts [...,A]; in float32."""
    scores = F.linear(x.float(), self.weight.float())
    weights, chosen = scores.softmax(-1).topk(self.num_chosen, dim=-1)
    return scores, weights / weights.sum(-1, keepdim=True), chosen


class MuddformerExperts(nn.ModuleList):
  """The experts of a block, computed one after another. No token is dropped. torch.compile breaks its graph here."""

  def __init__(self, config, size):
    super().__init__(MuddformerMLP(config, size) for _ in range(config.num_experts))

  def forward(self, x, chosen, weights):
    """x [N,D], chosen and weights [N,A] -> [N,D], summed in float32 and rounded once, as in JAX."""
    choices = chosen.flatten()
    counts = choices.bincount(minlength=len(self)).tolist()
    output = torch.zeros_like(x, dtype=torch.float32)
    for expert, places in zip(self, torch.split(choices.argsort(stable=True), counts)):
      # In training, experts without tokens get gradients of zero: optimizers and devices treat all parameters alike.
      if self.training or len(places) > 0:
        token = places // chosen.shape[-1]
        output.index_add_(0, token, expert(x[token]) * weights.flatten()[places, None])
    return output.to(x.dtype)


class MuddformerSparseMLP(nn.Module):
  """A mixture of experts, with the names of Qwen3-MoE's weights."""

  def __init__(self, config, size):
    super().__init__()
    self.gate = MuddformerRouter(config)
    self.experts = MuddformerExperts(config, size)

  def forward(self, x):
    rows = x.reshape(-1, x.shape[-1])
    _, weights, chosen = self.gate(rows)
    return self.experts(rows, chosen, weights).reshape(x.shape)


class MuddformerDecoderLayer(nn.Module):
  """A block: X_i from the query, key, value and residual streams (Eq. 7)."""

  def __init__(self, config, layer_idx):
    super().__init__()
    self.is_parallel = config.block == "pythia"
    self.self_attn = MuddformerAttention(config, layer_idx)
    mlp = MuddformerSparseMLP if config.num_experts else MuddformerMLP
    self.mlp = mlp(config, config.intermediate_sizes[layer_idx])
    if config.separate_norms[layer_idx]:
      self.query_layernorm, self.key_layernorm, self.value_layernorm = (block_norm(config) for _ in range(3))
      self.input_layernorm = None
    else:
      self.input_layernorm = block_norm(config)
    self.post_attention_layernorm = block_norm(config)

  def forward(self, xq, xk, xv, xr, output_router_logits=False, **kwargs):
    """xq, xk, xv, xr [B,T,D] -> X_i [B,T,D]; attention weights, or None; scores of experts [B,T,E], if asked for."""
    if self.input_layernorm is None:
      norms = (self.query_layernorm, self.key_layernorm, self.value_layernorm)
    else:
      norms = (self.input_layernorm,) * 3
    attended, weights = self.self_attn(*(norm(x) for norm, x in zip(norms, (xq, xk, xv))), **kwargs)
    if self.is_parallel:
      return xr + attended + self.mlp(self.post_attention_layernorm(xr)), weights, None
    x = xr + attended
    normed = self.post_attention_layernorm(x)
    scores = self.mlp.gate(normed)[0] if output_router_logits else None
    return x + self.mlp(normed), weights, scores


class MuddformerAggregate(nn.Module):
  """DA_i: weighted sums of sources, one for each stream, with weights that an MLP makes of X_i (Eqs. 5, 6, 10)."""

  def __init__(self, config, sources, streams, hidden):
    super().__init__()
    self.config, self.sources, self.streams = config, sources, streams
    shape, width = (len(streams), len(sources)), config.hidden_size
    if hidden:
      self.norm = MuddformerRMSNorm(width, config.norm_eps, has_scale=config.weight_norm_scale)
      self.w1 = nn.Linear(width, hidden, bias=False)
      self.w2 = nn.Linear(hidden, len(streams) * len(sources), bias=False)
      self.w1.start, self.w2.start = width**-0.5, 0.0
      self.activation = ACT2FN[config.aggregate_act]
      if config.weight_scale:
        self.scale = nn.Parameter(torch.ones(shape))
    self.is_dynamic = hidden > 0
    self.static = nn.Parameter(torch.zeros(shape)) if config.static_weights else None
    normed = [c for c in streams if c in config.stream_norms]
    self.stream_norms = nn.ModuleDict({c: MuddformerRMSNorm(width, config.norm_eps, start=1e-3) for c in normed})

  def initial_static(self):
    static = torch.zeros(len(self.streams), len(self.sources))
    if self.config.static_start == "newest":
      static[:, -1] = 1.0
    return static

  def weights(self, x):
    """X_i [B,T,D] -> [B,T,C,N] in float32."""
    static = (self.initial_static().to(x.device) if self.static is None else self.static).float()
    if not self.is_dynamic:
      return static.expand(*x.shape[:2], *static.shape)
    dynamic = self.w2(self.activation(self.w1(self.norm(x)))).unflatten(-1, static.shape).float()
    if self.config.weight_scale:
      dynamic = self.scale.float() * dynamic.tanh()
    elif self.config.weight_cap:
      dynamic = self.config.weight_cap * (dynamic / self.config.weight_cap).tanh()
    return dynamic + static

  def forward(self, history, x):
    """history: [B,T,D] of each source so far, by number, normed if the model norms them; x: X_i itself -> streams."""
    weights = self.weights(x)
    streams = {}
    for c, stream in enumerate(self.streams):
      # In float32, and rounded once, as in JAX.
      mixed = sum(weights[:, :, c, j, None] * history[source] for j, source in enumerate(self.sources)).to(x.dtype)
      if stream in self.stream_norms:
        mixed = self.stream_norms[stream](mixed)
      streams[stream] = mixed + x if self.config.add_newest else mixed
    return streams


class MuddformerPreTrainedModel(PreTrainedModel):
  config_class = MuddformerConfig
  base_model_prefix = "model"
  supports_gradient_checkpointing = True
  _no_split_modules = ["MuddformerDecoderLayer", "MuddformerAggregate"]
  _skip_keys_device_placement = ["cache", "past_key_values"]
  _supports_sdpa = True
  _supports_flash_attn = _supports_flash_attn_2 = True
  _supports_cache_class = _supports_static_cache = True
  _supports_attention_backend = True
  _can_compile_fullgraph = IS_5  # without experts

  def _init_weights(self, module):
    """The plain model at the start: W2 is zero, and static weights are one at the newest source."""
    if isinstance(module, MuddformerAggregate):
      if module.is_dynamic and self.config.weight_scale:
        nn.init.ones_(module.scale)
      if module.static is not None and not getattr(module.static, "_is_hf_initialized", False):
        with torch.no_grad():
          module.static.copy_(module.initial_static())
    elif isinstance(module, (nn.Linear, nn.Embedding, MuddformerRouter)):
      nn.init.normal_(module.weight, std=getattr(module, "start", self.config.initializer_range))
      if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
      nn.init.ones_(module.weight)
      nn.init.zeros_(module.bias)
    elif isinstance(module, MuddformerRMSNorm) and module.weight is not None:
      nn.init.constant_(module.weight, module.start)


class MuddformerModel(MuddformerPreTrainedModel):
  """From tokens to the normed last hidden state."""

  def __init__(self, config):
    super().__init__(config)
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
    self.layers = nn.ModuleList(MuddformerDecoderLayer(config, i) for i in range(config.num_hidden_layers))
    self.aggregates = nn.ModuleDict(
      {
        str(da["block"]): MuddformerAggregate(config, da["sources"], da["streams"], da["hidden"])
        for da in config.aggregates
      }
    )
    norms = config.num_hidden_layers + 1 if config.source_norm else 0
    self.source_norms = nn.ModuleList(MuddformerRMSNorm(config.hidden_size, config.norm_eps) for _ in range(norms))
    self.norm = block_norm(config)
    self.gradient_checkpointing = False
    self.post_init()

  def get_input_embeddings(self):
    return self.embed_tokens

  def set_input_embeddings(self, value):
    self.embed_tokens = value

  def forward(
    self,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    inputs_embeds=None,
    use_cache=None,
    output_attentions=None,
    output_hidden_states=None,
    output_router_logits=None,
    return_dict=None,
    cache=None,
    cache_position=None,
    **kwargs,
  ):
    """Hidden states are the embedding, the outputs of all blocks but the last, and the normed last hidden state."""
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    config = self.config
    cache = past_key_values if cache is None else cache
    use_cache = config.use_cache if use_cache is None else use_cache
    show_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    show_maps = config.output_attentions if output_attentions is None else output_attentions
    show_scores = config.output_router_logits if output_router_logits is None else output_router_logits
    is_checkpointing = self.gradient_checkpointing and self.training
    if is_checkpointing and cache is not None:
      raise ValueError("A cache does not work with gradient checkpointing; leave it out.")
    if use_cache and cache is None and not is_checkpointing:
      cache = DynamicCache()
    x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    if not (cache is None or isinstance(cache, Cache) or position_ids is not None):
      raise ValueError(f"A cache of {type(cache).__name__} needs position_ids; give them, or a transformers.Cache.")
    seen = cache.get_seq_length() if isinstance(cache, Cache) else 0
    places = torch.arange(x.shape[1], device=x.device) + seen
    position_ids = places[None] if position_ids is None else position_ids
    given = dict(kwargs, position_embeddings=angles(config, position_ids, x.dtype), cache=cache)
    given |= {"cache_position": places, "position_ids": position_ids}
    given["output_router_logits"] = show_scores = show_scores and config.num_experts > 0
    given["attention_mask"] = causal_mask(config, x, attention_mask, cache, places, position_ids)
    history, streams = [self._source(0, x)], {}
    states, maps, scores = [x], [], []
    for i, layer in enumerate(self.layers, 1):
      inputs = [streams.get(c, streams.get("x", x)) for c in "qkvr"]
      if is_checkpointing:
        x, weights, block_scores = self._gradient_checkpointing_func(_positional(layer, given), *inputs)
      else:
        x, weights, block_scores = layer(*inputs, **given)
      history.append(self._source(i, x))
      streams = self.aggregates[str(i)](history, x) if str(i) in self.aggregates else {}
      states.append(x)
      maps += [weights] if show_maps else []
      scores += [block_scores] if show_scores else []
    (x,) = streams.values() if streams else (x,)
    states[-1] = x = self.norm(x)
    output = MoeModelOutputWithPast(
      last_hidden_state=x,
      hidden_states=tuple(states) if show_states else None,
      attentions=tuple(maps) if show_maps else None,
      router_logits=tuple(scores) if show_scores else None,
      **{CACHE: cache if use_cache else None},
    )
    return output.to_tuple() if return_dict is False else output

  def _source(self, i, x):
    return self.source_norms[i](x) if self.config.source_norm else x


def _positional(layer, given):
  return lambda *inputs: layer(*inputs, **given)


def causal_mask(config, x, attention_mask, cache, places, position_ids):
  """The mask that the attention implementation takes: of transformers where it makes one, else [B,1,T,S] to add."""
  if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
    return attention_mask
  if create_causal_mask is None:
    return _added_mask(config, x, attention_mask, cache, places)
  given = {"config": config, "attention_mask": attention_mask, "position_ids": position_ids}
  given |= {"inputs_embeds": x, "input_embeds": x, "cache": cache, "past_key_values": cache, "cache_position": places}
  return create_causal_mask(**{name: value for name, value in given.items() if name in MASK_ARGUMENTS})


def _added_mask(config, x, attention_mask, cache, places):
  if config._attn_implementation == "flash_attention_2":
    return attention_mask
  if config._attn_implementation not in ("eager", "sdpa"):
    return None  # another backend, such as vLLM's, knows what is visible
  length = cache.get_max_cache_shape() if cache is not None else None  # of a static cache
  length = length or int(places[-1]) + 1
  visible = (torch.arange(length, device=x.device) <= places[:, None])[None, None]
  if attention_mask is not None:
    padded = F.pad(attention_mask, (0, length - attention_mask.shape[1]))
    visible = visible & padded[:, None, None].bool()
  # A row that sees nothing, of a token that is padding, would make sdpa compute NaN: it sees all.
  visible = visible | ~visible.any(-1, keepdim=True)
  mask = torch.zeros(visible.shape, dtype=x.dtype, device=x.device)
  return mask.masked_fill(~visible, torch.finfo(x.dtype).min)


def balance_loss(scores, num_chosen, attention_mask=None):
  """Load-balancing loss of experts, as MaxText computes it: 1 where all are chosen alike, more where they are not.

  It is E · Σ_e share_e · probability_e of each sequence and block, and the mean of these: an expert's share of the
  choices, and the mean over tokens of its probability. transformers' own models take shares and probabilities over all
  sequences and blocks together, and their loss is A times as large.

  Args:
    scores: [B,T,E] of each block.
    attention_mask: [B,T], zero for padding, which does not count.
  """
  real = torch.ones(scores[0].shape[:2]) if attention_mask is None else attention_mask
  real = real.to(scores[0])[..., None]
  tokens = real.sum(1).clamp(min=1)
  losses = []
  for block_scores in scores:
    probability = block_scores.softmax(-1)
    chosen = torch.zeros_like(probability).scatter(-1, block_scores.topk(num_chosen, dim=-1).indices, 1 / num_chosen)
    share, probability = ((real * x).sum(1) / tokens for x in (chosen, probability))
    losses.append((share * probability).sum(-1).mean() * block_scores.shape[-1])
  return torch.stack(losses).mean()


class MuddformerForCausalLM(MuddformerPreTrainedModel, GenerationMixin):
  """With the output head (Eq. 8)."""

  _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"} if IS_5 else ["lm_head.weight"]
  _tp_plan = {"lm_head": "colwise_gather_output" if IS_5 else "colwise_rep"}

  def __init__(self, config):
    super().__init__(config)
    self.model = MuddformerModel(config)
    self.vocab_size = config.vocab_size
    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  def get_input_embeddings(self):
    return self.model.embed_tokens

  def set_input_embeddings(self, value):
    self.model.embed_tokens = value

  def get_output_embeddings(self):
    return self.lm_head

  def set_output_embeddings(self, value):
    self.lm_head = value

  def forward(
    self,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    inputs_embeds=None,
    labels=None,
    use_cache=None,
    output_attentions=None,
    output_hidden_states=None,
    output_router_logits=None,
    return_dict=None,
    cache=None,
    cache_position=None,
    logits_to_keep=0,
    **kwargs,
  ):
    output = self.model(
      input_ids=input_ids,
      attention_mask=attention_mask,
      position_ids=position_ids,
      past_key_values=past_key_values,
      inputs_embeds=inputs_embeds,
      use_cache=use_cache,
      output_attentions=output_attentions,
      output_hidden_states=output_hidden_states,
      output_router_logits=output_router_logits,
      cache=cache,
      **kwargs,
    )
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = self.lm_head(output.last_hidden_state[:, kept])
    loss = balance = None
    if output.router_logits is not None:
      balance = balance_loss(output.router_logits, self.config.num_experts_per_tok, attention_mask)
    if labels is not None:
      loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
      loss = loss if balance is None else loss + self.config.router_aux_loss_coef * balance
    result = MoeCausalLMOutputWithPast(
      loss=loss,
      aux_loss=balance,
      logits=logits,
      hidden_states=output.hidden_states,
      attentions=output.attentions,
      router_logits=output.router_logits,
      **{CACHE: output.get(CACHE)},
    )
    return result.to_tuple() if return_dict is False else result


# `save_pretrained` of older versions copies this file for registered classes only.
MuddformerModel.register_for_auto_class("AutoModel")
MuddformerForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MuddformerForCausalLM", "MuddformerModel", "MuddformerPreTrainedModel"]
