"""Configuration of MUDDFormer for transformers: a decoder whose blocks read weighted sums of earlier block outputs."""

import transformers
from transformers.configuration_utils import PretrainedConfig

IS_5 = int(transformers.__version__.split(".")[0]) >= 5
STREAMS = "qkvr"


class MuddformerConfig(PretrainedConfig):
  """The sizes of a model, its block, and its depth-wise aggregates (MUDDFormer, arXiv 2502.12170).

  Blocks count from 1. The depth-wise aggregate DA_i follows block i and mixes outputs of blocks; source 0 is the
  embedding, source j the output of block j.

  Args:
    intermediate_sizes: the FFN width of each block, or of each of its experts; default: `intermediate_size` for all
      (Eq. 9 re-allocates them).
    num_experts: number of experts in place of the FFN of each block; 0: there is one FFN, without a router.
    num_experts_per_tok: the number of experts that each token is sent to. Their weights add up to one.
    output_router_logits: whether to return the scores of experts and their balance loss, and to add that to the loss.
    router_aux_loss_coef: factor of the balance loss.
    block: "transformer" (RMSNorm, attention, then a gated FFN) or "pythia" (LayerNorm and biases; attention and an FFN
      beside each other).
    use_qk_norm: RMSNorm of the query and key of each head, before the rotary embedding.
    attention_multiplier: factor of attention scores; default: 1/sqrt(head_dim). MaxText's block llama2 has 1, and the
      other factor in its query kernel.
    partial_rotary_factor: share of each head that is rotated.
    aggregates: a dictionary for each DA, with `block`: i; `sources`: numbers of the sources, oldest first; `streams`:
      some of "qkvr", or "x" for one stream that serves as all; `hidden`: the width of the MLP that makes its weights, 0
      where they are static. Where a block has none, the next one reads its output. Default: a DA after each block,
      sources all, streams "qkvr", and "r" after the last block, of the widths of the released models.
    separate_norms: for each block, whether it has separate norms for queries, keys and values; default: where it reads
      several streams.
    static_weights: whether the static part of weights is a parameter; else it stays as it starts.
    static_start: how static weights start: "newest", one at the newest source, or "zero".
    source_norm: RMSNorm with a scale of each source before it is mixed (`pre-norm`, Eq. 10).
    stream_norms: streams, letters of "qkvrx", whose sum gets an RMSNorm (`post-norm`, Eq. 10).
    add_newest: whether the output of block i is added to each stream of DA_i (Eq. 10).
    weight_norm_scale: whether the norm before the MLP has a scale.
    weight_cap: c of c·tanh(W/c), which bounds dynamic weights; 0: none.
    weight_scale: whether dynamic weights are s·tanh(W) with a parameter s.
    aggregate_act: activation of the MLP, a name of transformers' ACT2FN.
  """

  model_type = "muddformer_native"
  keys_to_ignore_at_inference = ["cache", "past_key_values"]
  # Aggregates are small and are left whole on each device; q, k and v have different inputs and are split as always.
  base_model_tp_plan = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
  }

  def __init__(
    self,
    vocab_size=50432,
    hidden_size=1024,
    intermediate_size=2816,
    intermediate_sizes=None,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=None,
    head_dim=None,
    max_position_embeddings=2048,
    num_experts=0,
    num_experts_per_tok=2,
    output_router_logits=False,
    router_aux_loss_coef=0.0,
    block="transformer",
    hidden_act="silu",
    norm_eps=1e-6,
    use_qk_norm=False,
    attention_multiplier=None,
    rope_theta=10000.0,
    rope_parameters=None,
    partial_rotary_factor=1.0,
    attention_dropout=0.0,
    initializer_range=0.006,
    use_cache=True,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    aggregates=None,
    separate_norms=None,
    static_weights=True,
    static_start="newest",
    source_norm=False,
    stream_norms="",
    add_newest=False,
    weight_norm_scale=False,
    weight_cap=0.0,
    weight_scale=False,
    aggregate_act="gelu",
    **kwargs,
  ):
    if block not in ("transformer", "pythia"):
      raise ValueError(f"block={block} is not known; use transformer or pythia.")
    if num_experts and block == "pythia":
      raise ValueError(f"num_experts={num_experts} does not work with block=pythia; use transformer.")
    rope_parameters = dict(rope_parameters or {"rope_type": "default", "rope_theta": rope_theta})
    rope_parameters |= kwargs.pop("rope_scaling", None) or {}
    if rope_parameters.get("rope_type", "default") != "default":
      raise ValueError(f"rope_parameters={rope_parameters} scales positions, and MUDDFormer does not; use default.")
    sizes = intermediate_sizes or [intermediate_size] * num_hidden_layers
    if len(sizes) != num_hidden_layers:
      raise ValueError(f"intermediate_sizes has {len(sizes)} sizes for num_hidden_layers={num_hidden_layers}.")
    self.vocab_size = vocab_size
    self.hidden_size = hidden_size
    self.intermediate_size = intermediate_size
    self.intermediate_sizes = list(sizes)
    self.num_hidden_layers = num_hidden_layers
    self.num_attention_heads = num_attention_heads
    self.num_key_value_heads = num_key_value_heads or num_attention_heads
    self.head_dim = head_dim or hidden_size // num_attention_heads
    self.max_position_embeddings = max_position_embeddings
    self.num_experts = num_experts
    self.num_experts_per_tok = num_experts_per_tok
    self.output_router_logits = output_router_logits
    self.router_aux_loss_coef = router_aux_loss_coef
    self.block = block
    self.hidden_act = hidden_act
    self.norm_eps = norm_eps
    self.use_qk_norm = use_qk_norm
    if num_experts:
      styles = self.base_model_tp_plan.items()
      self.base_model_tp_plan = {name.replace(".mlp.", ".mlp.experts.*."): style for name, style in styles}
    if use_qk_norm and IS_5:  # a device applies these norms to its own heads: their gradients are summed over devices
      norms = ("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm")
      self.base_model_tp_plan = self.base_model_tp_plan | dict.fromkeys(norms, "replicated_with_grad_allreduce")
    self.attention_multiplier = self.head_dim**-0.5 if attention_multiplier is None else attention_multiplier
    self.rope_theta = rope_parameters.get("rope_theta", rope_theta)
    self.rope_parameters = rope_parameters
    self.partial_rotary_factor = partial_rotary_factor
    self.attention_dropout = attention_dropout
    self.initializer_range = initializer_range
    self.use_cache = use_cache
    self.aggregates = aggregates if aggregates is not None else all_sources(num_hidden_layers)
    streams = {da["block"]: da["streams"] for da in self.aggregates}
    self.separate_norms = separate_norms or [len(streams.get(i, "x")) > 1 for i in range(num_hidden_layers)]
    self.static_weights = static_weights
    self.static_start = static_start
    self.source_norm = source_norm
    self.stream_norms = stream_norms
    self.add_newest = add_newest
    self.weight_norm_scale = weight_norm_scale
    self.weight_cap = weight_cap
    self.weight_scale = weight_scale
    self.aggregate_act = aggregate_act
    special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    super().__init__(tie_word_embeddings=tie_word_embeddings, **special, **kwargs)
    for name, token in special.items():  # transformers 5 leaves them to each model
      setattr(self, name, token)


def all_sources(blocks):
  """A DA after each block, which mixes all sources, with the hidden widths of the released models."""
  aggregates = []
  for i in range(1, blocks + 1):
    hidden = (4 * (i + 1) // 64 + 1) * 64
    streams = STREAMS if i < blocks else "r"
    aggregates.append({"block": i, "sources": list(range(i + 1)), "streams": streams, "hidden": hidden})
  return aggregates


MuddformerConfig.register_for_auto_class()

__all__ = ["MuddformerConfig"]
