"""This project's PyTorch model for transformers: its `config.json` and the names of its tensors.

`to-hf` writes this format. The code of the model is in `assets/hugging_face` and goes beside the weights, so that
transformers loads them by `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

from collections.abc import Iterator, Mapping
import pathlib
import shutil
import types
from typing import Any

from maxtext_mudd import assets, blocks, connections
from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.checkpoints import model_config, model_keys
from maxtext_mudd.checkpoints.hugging_face.names import Name, linear, norm
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.connections.base import Site
from maxtext_mudd.connections.mudd import sites

CODE = assets.HUGGING_FACE
MODEL_TYPE = "muddformer_native"
MAXTEXT_KEYS = "maxtext_keys"  # the field of config.json with MaxText's keys of the model
_BLOCKS = {"pythia": "pythia", "stock": "transformer"}  # by mudd_decoder_layer
_EXPERTS = {"mixtral": "MoeBlock_0", "qwen3_moe": "moe_block"}  # modules of experts, by decoder_block
_ACTIVATIONS = {"pythia": ["gelu"], "stock": ["silu", "linear"]}
# Keys that change the function of a model in a way that the PyTorch model does not have, with the only value for it.
# What else keys of this project change is in the plan of aggregates or in a field.
_FIXED = {
  "mudd": True,
  "depth_connection": connections.DEFAULT,
  "mudd_extra_embeddings": 0,
  "mudd_rope_table": "stock",
  "mtp_num_layers": 0,
  "attention_type": "global",
  "attention_bias": False,
  "attention_sink": False,
  "fused_qkv": False,
  "share_kv_projections": False,
  "fused_mlp": False,
  "moba": False,
  "qk_norm_with_scale": True,
  "use_mrope": False,
  "use_multimodal": False,
  "use_untrainable_positional_embedding": False,
  "temperature_tuning": False,
  "use_post_attn_norm": False,
  "use_post_ffw_norm": False,
  "mlp_bias": False,
  "mlp_activations_limit": -1.0,
  "nope_layer_interval": -1,
  "rope_type": "default",
  "rope_linear_scaling_factor": 1.0,
  "rope_min_timescale": 1,
  "logits_via_embedding": False,
  "quantization": "",
}
_FIXED_OF_EXPERTS = {
  "routed_bias": False,
  "routed_score_func": "",
  "prefuse_moe_weights": False,
  "padded_base_moe_mlp_dim": None,
}
# Keys of a model folder that are those of the model, whatever the folder and the layout of its layers.
_KEPT = (model_keys.KEYS | {"enable_dropout"}) - {"tokenizer_path", "tokenizer_type", "scan_layers", "base_config"}
TOKENIZER_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class")
_OF_TRAINING = {"output_router_logits", "router_aux_loss_coef"}
_FREE_FIELDS = {"architectures", "auto_map", "torch_dtype", MAXTEXT_KEYS, *TOKENIZER_FIELDS, *_OF_TRAINING}
_NONE_OR_ZERO = ("attn_logits_soft_cap", "final_logits_soft_cap", "attention_output_dim", "trainable_position_size")
_NONE_OR_ZERO_OF_EXPERTS = ("capacity_factor", "moe_expert_input_dim")


def fields(
  config, keys: Mapping[str, Any], of_tokenizer: Mapping[str, Any] = types.MappingProxyType({})
) -> dict[str, Any]:
  """The fields of `config.json` of a model.

  Args:
    config: MaxText's configuration of the model.
    keys: the keys that make it.
    of_tokenizer: fields with the ids of BOS, EOS and padding and the class of the tokenizer, as far as they are known.

  Raises:
    ConfigError: the PyTorch model cannot compute it.
  """
  _check(config)
  plan, is_pythia = connections.plan(config), config.mudd_decoder_layer == "pythia"
  aggregates = [
    {"block": i, "sources": [*site.sources], "streams": site.streams, "hidden": site.hidden}
    for i, site in sorted(plan.sites.items())
  ]
  normed = [c for c in "qkvrx" if config.mudd_post_norm and sites.is_post_normed(config, c)]
  return {
    "architectures": ["MuddformerForCausalLM"],
    "auto_map": {
      "AutoConfig": "configuration_muddformer.MuddformerConfig",
      "AutoModel": "modeling_muddformer.MuddformerModel",
      "AutoModelForCausalLM": "modeling_muddformer.MuddformerForCausalLM",
    },
    "model_type": MODEL_TYPE,
    "torch_dtype": str(config.weight_dtype),
    "vocab_size": config.vocab_size,
    "hidden_size": config.emb_dim,
    "intermediate_size": config.mlp_dim,
    "intermediate_sizes": [*ffn_widths.of_config(config)],
    "num_hidden_layers": config.num_decoder_layers,
    "num_attention_heads": config.num_query_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_target_length,
    "num_experts": config.num_experts if _has_experts(config) else 0,
    "num_experts_per_tok": config.num_experts_per_tok,
    "router_aux_loss_coef": config.load_balance_loss_weight,
    "block": _BLOCKS[config.mudd_decoder_layer],
    "hidden_act": "gelu" if is_pythia else "silu",
    "norm_eps": config.normalization_layer_epsilon,
    "use_qk_norm": _has_qk_norm(config),
    "attention_multiplier": 1.0 if blocks.spec(config).scales_query_kernel else config.head_dim**-0.5,
    "rope_theta": float(config.rope_max_timescale),
    "partial_rotary_factor": config.mudd_rotary_fraction if is_pythia else 1.0,
    "tie_word_embeddings": False,
    "aggregates": aggregates,
    "separate_norms": [_has_separate_norms(plan, i) for i in range(config.num_decoder_layers)],
    "static_weights": config.mudd_static,
    "static_start": "zero" if sites.starts_at_zero(config) else "newest",
    "source_norm": config.mudd_pre_norm,
    "stream_norms": "".join(normed),
    "add_newest": config.mudd_post_norm,
    "weight_norm_scale": config.mudd_dynamic and config.mudd_weight_norm_scale,
    "weight_cap": config.mudd_weight_cap,
    "weight_scale": config.mudd_dynamic and config.mudd_weight_scale,
    "aggregate_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.mudd_activation],
    **{name: of_tokenizer[name] for name in TOKENIZER_FIELDS if of_tokenizer.get(name) is not None},
    MAXTEXT_KEYS: {key: value for key, value in keys.items() if key in _KEPT},
  }


def read(fields_of_file: Mapping[str, Any], file: str) -> tuple[dict[str, Any], tuple[int, ...]]:
  """MaxText's keys of the model with single layers, and the FFN width of each block.

  Raises:
    ConfigError: `config.json` does not have the keys, or its other fields are of another model.
  """
  stored = fields_of_file.get(MAXTEXT_KEYS)
  if not isinstance(stored, dict):
    raise ConfigError(f"{file} has no {MAXTEXT_KEYS}, which to-hf writes; convert the model again.")
  if unknown := stored.keys() - _KEPT:
    raise ConfigError(f"{file}: {MAXTEXT_KEYS} has {min(unknown)}, which is no key of a model; remove it.")
  keys = {**stored, "scan_layers": False}
  expected = fields(model_config.build(keys | model_config.local_keys()), keys)
  for name in expected.keys() - _FREE_FIELDS:
    # transformers leaves out fields that have the default of its class.
    if name in fields_of_file and fields_of_file[name] != expected[name]:
      raise ConfigError(
        f"{file}: {name}={fields_of_file[name]}, and its {MAXTEXT_KEYS} are of a model with {expected[name]}; change "
        "both or none."
      )
  return keys, tuple(expected["intermediate_sizes"])


def copy_code(target: pathlib.Path) -> None:
  """Copies the code of the PyTorch model to a folder. Raises OSError."""
  for file in sorted(CODE.glob("*.py")):
    shutil.copyfile(file, target / file.name)


def _check(config) -> None:
  row = blocks.spec(config)
  is_pythia = config.mudd_decoder_layer == "pythia"
  if not (row.is_released or is_pythia or _has_experts(config)):
    raise ConfigError(
      f"decoder_block={config.decoder_block.value} has no PyTorch model here; those of llama2, mistral, mixtral, "
      "qwen3, qwen3_moe and mudd_decoder_layer=pythia have."
    )
  expected = _FIXED | {"mlp_activations": _ACTIVATIONS[config.mudd_decoder_layer]}
  expected |= _FIXED_OF_EXPERTS if _has_experts(config) else {"num_experts": 1}
  for key, value in expected.items():
    configured = getattr(config, key)
    configured = list(configured) if isinstance(configured, (list, tuple)) else getattr(configured, "value", configured)
    if configured != value:
      only = "''" if value == "" else value
      raise ConfigError(f"{key}={configured} is not in the PyTorch model, which has {key}={only}.")
  for key in (*_NONE_OR_ZERO, *(_NONE_OR_ZERO_OF_EXPERTS if _has_experts(config) else ())):
    if (value := getattr(config, key)) and value > 0:
      raise ConfigError(f"{key}={value} is not in the PyTorch model, which has {key}=0.")
  if shared := [site for site in connections.plan(config).sites.values() if site.mlp]:
    raise ConfigError(
      f"mudd_placements: DA_{shared[0].block} shares its MLP, {shared[0].mlp}, and DAs of the PyTorch model do not."
    )


def _has_experts(config) -> bool:
  return config.decoder_block.value in _EXPERTS and config.mudd_decoder_layer != "pythia"


def _has_qk_norm(config) -> bool:
  return blocks.spec(config).takes_qk_norm and config.use_qk_norm


def _has_separate_norms(plan, i: int) -> bool:
  """Whether block i + 1 has separate norms for queries, keys and values."""
  return i + 1 in plan.separate_norms or (i in plan.sites and plan.sites[i].ways > 1)


def names(config) -> Iterator[Name]:
  """All tensors of the model of single layers that the configuration describes."""
  plan, row, width = connections.plan(config), blocks.spec(config), config.emb_dim
  vocabulary, last = (config.vocab_size, width), config.num_decoder_layers
  yield Name("model.embed_tokens.weight", "token_embedder/embedding", vocabulary, vocabulary)
  if config.mudd_pre_norm:
    yield from norm("model.source_norms.0", "decoder/layers_0/connection/embedding_norm", width, bias=False)
  for i, size in enumerate(ffn_widths.of_config(config)):
    path, tensor = f"decoder/layers_{i}", f"model.layers.{i}"
    yield from _attention(config, row, plan, i)
    yield from norm(f"{tensor}.post_attention_layernorm", f"{path}/{row.feed_forward_norm}", width, row.has_biases)
    if _has_experts(config):
      yield from _experts(config, i, size)
    else:
      gate = (("gate_proj", "wi_0"), ("up_proj", "wi_1")) if len(config.mlp_activations) > 1 else (("up_proj", "wi"),)
      for projection, kernel in gate:
        yield from linear(f"{tensor}.mlp.{projection}", f"{path}/mlp/{kernel}", (width,), (size,), bias=row.has_biases)
      yield from linear(f"{tensor}.mlp.down_proj", f"{path}/mlp/wo", (size,), (width,), bias=row.has_biases)
    if config.mudd_pre_norm:
      yield from norm(f"model.source_norms.{i + 1}", f"{path}/connection/output_norm", width, bias=False)
    if i in plan.sites:
      yield from _aggregate(config, f"{path}/connection/depth_aggregate", plan.sites[i])
  if last in plan.sites:
    path = f"decoder/layers_{last - 1}/connection/final_depth_aggregate"
    yield from _aggregate(config, path, plan.sites[last])
  yield from norm("model.norm", "decoder/decoder_norm", width, row.has_biases)
  yield from linear("lm_head", "decoder/logits_dense", (width,), (config.vocab_size,), bias=False)


def _attention(config, row: blocks.BlockSpec, plan, i: int) -> Iterator[Name]:
  width, bias = config.emb_dim, row.has_biases
  path, tensor = f"decoder/layers_{i}", f"model.layers.{i}"
  if _has_separate_norms(plan, i):
    for stream, name in (("q", "query"), ("k", "key"), ("v", "value")):
      yield from norm(f"{tensor}.{name}_layernorm", f"{path}/{row.attention_norm}/{stream}", width, bias)
  else:
    yield from norm(f"{tensor}.input_layernorm", f"{path}/{row.attention_norm}", width, bias)
  path, tensor = f"{path}/self_attention", f"{tensor}.self_attn"
  for name, heads in (("query", config.num_query_heads), ("key", config.num_kv_heads), ("value", config.num_kv_heads)):
    yield from linear(f"{tensor}.{name[0]}_proj", f"{path}/{name}", (width,), (heads, config.head_dim), bias=bias)
  heads = (config.num_query_heads, config.head_dim)
  yield from linear(f"{tensor}.o_proj", f"{path}/out", heads, (width,), bias=bias)
  if _has_qk_norm(config):
    for name in ("query", "key"):
      yield from norm(f"{tensor}.{name[0]}_norm", f"{path}/{name}_norm", config.head_dim, bias=False)


def _experts(config, i: int, size: int) -> Iterator[Name]:
  path, tensor = f"decoder/layers_{i}/{_EXPERTS[config.decoder_block.value]}", f"model.layers.{i}.mlp"
  width, count = config.emb_dim, config.num_experts
  yield from linear(f"{tensor}.gate", f"{path}/gate", (width,), (count,), bias=False)
  for projection, kernel, shape in (
    ("gate_proj", "wi_0", (width, size)),
    ("up_proj", "wi_1", (width, size)),
    ("down_proj", "wo", (size, width)),
  ):
    for expert in range(count):
      name = f"{tensor}.experts.{expert}.{projection}.weight"
      yield Name(name, f"{path}/{kernel}", shape[::-1], (count, *shape), True, expert=expert)


def _aggregate(config, path: str, site: Site) -> Iterator[Name]:
  tensor, shape, width = f"model.aggregates.{site.block}", (site.ways, len(site.sources)), config.emb_dim
  if site.hidden:
    yield Name(f"{tensor}.w1.weight", f"{path}/w1", (site.hidden, width), (width, site.hidden), True)
    outputs = (shape[0] * shape[1], site.hidden)
    yield Name(f"{tensor}.w2.weight", f"{path}/w2", outputs, (site.hidden, *shape), True)
    if config.mudd_weight_norm_scale:
      yield Name(f"{tensor}.norm.weight", f"{path}/weight_norm_scale", (width,), (width,))
    if config.mudd_weight_scale:
      yield Name(f"{tensor}.scale", f"{path}/weight_scale", shape, shape)
  if config.mudd_static:
    yield Name(f"{tensor}.static", f"{path}/a", shape, shape)
  if config.mudd_post_norm:
    for stream in site.streams:
      if sites.is_post_normed(config, stream):
        yield from norm(f"{tensor}.stream_norms.{stream}", f"{path}/post_norm_{stream}", width, bias=False)
