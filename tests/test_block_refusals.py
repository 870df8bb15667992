"""What the launcher says of settings that do not work with a decoder block."""

import pytest

from tests import runs
from tests.blocks import config_of
from tests.refusals import refused_run

GPT_OSS = ("decoder_block=gpt_oss", "mudd_init=stock", "mudd_ffn_reallocation=false")
DEEPSEEK = ("decoder_block=deepseek", "attention_type=mla", "mudd_init=stock", "mudd_ffn_reallocation=false")
DEEPSEEK4 = (
  "decoder_block=deepseek4",
  "model_name=deepseek4-tiny",
  "override_model_config=true",
  "mudd_init=stock",
  "mudd_ffn_reallocation=false",
  "base_num_decoder_layers=4",
  "first_num_hash_layers=2",
  "compress_ratios=[0,4,128,4]",
)
EXPERTS = ("num_experts=4", "num_experts_per_tok=1", "base_moe_mlp_dim=64")
OLMO3 = ("decoder_block=olmo3", "mudd_init=stock", "mudd_ffn_reallocation=false", "scan_layers=true")
GEMMA2 = ("decoder_block=gemma2", "mudd_init=stock", "mudd_ffn_reallocation=false")  # of four blocks
QWEN3_NEXT = (
  "decoder_block=qwen3_next",
  "mudd_init=stock",
  "mudd_ffn_reallocation=false",
  "inhomogeneous_layer_cycle_interval=2",
  *EXPERTS,
)
SIMPLE = ("decoder_block=simple", "mudd_init=stock", "mudd_ffn_reallocation=false")
GEMMA4_SMALL = ("decoder_block=gemma4_small", "mudd_init=stock", "mudd_ffn_reallocation=false")
MISTAKES = {
  "re-allocated FFNs": (
    [*GPT_OSS, "mudd_ffn_reallocation=true"],
    "mudd_ffn_reallocation=True does not work with decoder_block='gpt_oss': widths are re-allocated in llama2, "
    "mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma, gpt3 only; set mudd_ffn_reallocation=False.",
  ),
  "FFNs in parts": (
    [*GPT_OSS, "mudd_ffn_parts=2"],
    "decoder_block='gpt_oss' does not work with mudd_ffn_parts=2: only plain FFNs are computed in parts; set "
    "mudd_ffn_parts=1.",
  ),
  "fused and quantised": (
    ["fused_qkv=true", "quantization=int8"],
    "quantization=int8 does not work with mudd=True and fused_qkv=True: a scale is of a whole kernel, whose "
    "columns read different streams; leave quantization empty.",
  ),
  "weights in float8": (
    ["weight_dtype=float8_e4m3fn"],
    "weight_dtype=float8_e4m3fn does not work with mudd=True: MaxText keeps such weights with scales, and those of "
    "connections have none; use weight_dtype=bfloat16 or float32.",
  ),
  "prefill in chunks with a cache of latents": (
    [*DEEPSEEK, "use_chunked_prefill=true", "mla_naive_kvcache=false"],
    "use_chunked_prefill=True does not work with attention_type='mla' and mla_naive_kvcache=False: MaxText writes each "
    "chunk of the prompt over the first in a cache of latents; set it to False.",
  ),
  "lineage": (
    [*DEEPSEEK, "scan_layers=true", "rope_type=yarn", "capacity_factor=1.0", "use_lineage=true"],
    "use_lineage=True does not work with mudd=True: it does not call the layers; set it to False.",
  ),
  "MTP": (
    [*GPT_OSS, "mtp_num_layers=1"],
    "mtp_num_layers=1 does not work with decoder_block='gpt_oss': MaxText cannot build its layers for multi-token "
    "prediction; set it to 0.",
  ),
  "MTP of cycles": (
    ["decoder_block=llama4", *GPT_OSS[1:], "scan_layers=true", "mtp_num_layers=1"],
    "mtp_num_layers=1 does not work with scan_layers=True and decoder_block='llama4': each block of multi-token "
    "prediction would be a whole cycle of layers; set scan_layers=False.",
  ),
  "a cycle shorter than the pattern of its layers": (
    ["decoder_block=envy", *GPT_OSS[1:], "scan_layers=true", "interleave_moe_layer_step=2", *EXPERTS],
    "inhomogeneous_layer_cycle_interval=1 does not work with scan_layers=True and decoder_block='envy': the kinds of "
    "its layers come again after 2; use a multiple of 2.",
  ),
  "the least common multiple of two patterns": (
    [
      *("decoder_block=llama4", *GPT_OSS[1:], "scan_layers=true", "inhomogeneous_layer_cycle_interval=3"),
      *("nope_layer_interval=3", "interleave_moe_layer_step=2", *EXPERTS),
    ],
    "inhomogeneous_layer_cycle_interval=3 does not work with scan_layers=True and decoder_block='llama4': the kinds of "
    "its layers come again after 6; use a multiple of 6.",
  ),
  "other projections": (
    [*DEEPSEEK, "fused_qkv=true"],
    "fused_qkv=True does not work with decoder_block='deepseek': it has other projections; set fused_qkv=False.",
  ),
  "a name for sizes": (
    ["decoder_block=gemma3", *GPT_OSS[1:]],
    "model_name=default does not work with decoder_block='gemma3': MaxText scales queries by the name of the model; "
    "use gemma3-4b, gemma3-12b, gemma3-27b, for other sizes with override_model_config=True.",
  ),
  "not latent": (
    ["decoder_block=deepseek", *GPT_OSS[1:]],
    "attention_type='global' does not work with decoder_block='deepseek': its attention is latent; use 'mla'.",
  ),
  "more dense layers than layers": (
    [*DEEPSEEK, "first_num_dense_layers=9"],
    "first_num_dense_layers=9 does not work with base_num_decoder_layers=2: so many of the layers are dense; use a "
    "number from 0 to 2.",
  ),
  "a stream that nothing reads": (
    [
      "decoder_block=default",
      *GPT_OSS[1:],
      "share_kv_projections=true",
      "mudd_placements=[{block: 1, sources: all, streams: vr}]",
    ],
    "mudd_placements gives DA_1 the stream v, which block 2 does not read: its values are its keys; leave it out.",
  ),
  "part of a pattern": (
    [*OLMO3, "base_num_decoder_layers=4", "inhomogeneous_layer_cycle_interval=2"],
    "inhomogeneous_layer_cycle_interval=2 does not work with scan_layers=True and decoder_block='olmo3': the kinds of "
    "its layers come again after 4; use a multiple of 4.",
  ),
  "keys and values of no layer": (
    [*GEMMA4_SMALL, "base_num_decoder_layers=8", "num_kv_shared_layers=3"],
    "num_kv_shared_layers=3 does not work with base_num_decoder_layers=8: a global layer would use keys and values of "
    "an earlier one, and there is none; set it to a lower number.",
  ),
  "scanned layers that use earlier keys": (
    [*GEMMA4_SMALL, "scan_layers=true"],
    "scan_layers=True does not work with decoder_block='gemma4_small': MaxText does not scan its layers; set "
    "scan_layers=False.",
  ),
  "extra embeddings and inputs of layers": (
    [
      *GEMMA4_SMALL,
      "mudd_extra_embeddings=2",
      "hidden_size_per_layer_input=8",
      "vocab_size_per_layer_input=256",
    ],
    "mudd_extra_embeddings=2 does not work with decoder_block='gemma4_small' and hidden_size_per_layer_input=8: "
    "MaxText makes the inputs of layers from one embedding; set it to 0.",
  ),
  "a stream of keys of another layer": (
    [
      *GEMMA4_SMALL,
      "base_num_decoder_layers=4",
      "num_kv_shared_layers=1",
      "mudd_placements=[{block: 3, sources: all, streams: kr}]",
    ],
    "mudd_placements gives DA_3 the stream k, which block 4 does not read: it uses keys and values of an earlier one; "
    "leave it out.",
  ),
  "no cycle": (
    ["inhomogeneous_layer_cycle_interval=0"],
    "inhomogeneous_layer_cycle_interval=0",
  ),
  "latent attention in another block": (
    ["attention_type=mla"],
    "attention_type='mla' does not work with decoder_block='llama2': MaxText has latent attention in the block of "
    "deepseek; use 'global'.",
  ),
  "rotary table": (
    [*GPT_OSS, "mudd_rope_table=bfloat16"],
    "decoder_block='gpt_oss' does not work with mudd_rope_table=bfloat16: it does not rotate queries and keys as the "
    "released models do; set mudd_rope_table=stock.",
  ),
  "no norm before the FFN": (
    [*OLMO3, "depth_connection=mhc"],
    "decoder_block='olmo3' does not work with depth_connection=mhc: its FFN reads the sum of its input and "
    "attention without a norm, or does not read it; use a decoder_block such as llama2.",
  ),
  "cycles that leave layers out": (
    [*OLMO3, "base_num_decoder_layers=6", "inhomogeneous_layer_cycle_interval=4"],
    "base_num_decoder_layers=6 does not work with scan_layers=True and inhomogeneous_layer_cycle_interval=4: MaxText "
    "scans whole cycles of layers and would leave some out; use a multiple of 4.",
  ),
  "cycles of a block that has none": (
    ["scan_layers=true", "mudd_ffn_reallocation=false", "mudd_init=stock", "inhomogeneous_layer_cycle_interval=2"],
    "inhomogeneous_layer_cycle_interval=2 does not work with mudd=True and decoder_block='llama2': MaxText scans its "
    "layers one by one; set it to 1.",
  ),
  "cycles of another length": (
    [
      "decoder_block=gemma4",
      "mudd_init=stock",
      "mudd_ffn_reallocation=false",
      "scan_layers=true",
      "inhomogeneous_layer_cycle_interval=2",
    ],
    "inhomogeneous_layer_cycle_interval=2 does not work with mudd=True and decoder_block='gemma4': MaxText scans "
    "cycles of 6 of its layers, whatever the key says; set it to 1.",
  ),
  "cycles of pairs": (
    [*GEMMA2, "scan_layers=true", "inhomogeneous_layer_cycle_interval=2"],
    "inhomogeneous_layer_cycle_interval=2 does not work with mudd=True and decoder_block='gemma2': MaxText scans its "
    "layers one by one; set it to 1.",
  ),
  "dropout of pairs": (
    [*GEMMA2, "enable_dropout=true", "dropout_rate=0.1"],
    "dropout_rate=0.1 does not work with mudd=True and decoder_block='gemma2': MaxText runs two blocks in one layer, "
    "and each would drop out the output of the other; set it to 0.",
  ),
  "a block beyond those of pairs": (
    [*GEMMA2, "mudd_placements=[{block: 5, sources: all, streams: r}]"],
    "mudd_placements: row 1 places DA_5, and the model has L=4 blocks; use blocks from 1 to L.",
  ),
  "single layers of a block that MaxText scans only": (
    [*SIMPLE, "mudd_ways=1"],
    "scan_layers=False does not work with decoder_block='simple': its single layers return an array where MaxText's "
    "decoder takes a pair; set scan_layers=True.",
  ),
  "streams without attention": (
    [*SIMPLE, "scan_layers=true"],
    "decoder_block='simple' does not work with separate streams or norms of queries, keys and values: it has no "
    "attention; set mudd_ways=1 and mudd_first_block_norms=shared, or use the stream x alone in mudd_placements.",
  ),
  "norms without attention": (
    [*SIMPLE, "scan_layers=true", "mudd_ways=1", "mudd_first_block_norms=separate"],
    "decoder_block='simple' does not work with separate streams or norms of queries, keys and values",
  ),
  "sublayers without norms": (
    [*SIMPLE, "scan_layers=true", "depth_connection=hyper_connections"],
    "decoder_block='simple' does not work with depth_connection=hyper_connections: its FFN reads the sum of its input",
  ),
  "hyper-streams of another block": (
    ["mhc_expansion_rate=2"],
    "mhc_expansion_rate=2 does not work with decoder_block='llama2': MaxText has several residual streams in the "
    "blocks deepseek and deepseek4; set it to 1.",
  ),
  "two families of hyper-streams": (
    [*DEEPSEEK, "mhc_expansion_rate=2", "depth_connection=mhc"],
    "mhc_expansion_rate=2 does not work with depth_connection=mhc: both make the input of every sublayer; set it to 1, "
    "or depth_connection=dense.",
  ),
  "MTP of hyper-streams": (
    [*DEEPSEEK, "mhc_expansion_rate=2", "mtp_num_layers=1"],
    "mtp_num_layers=1 does not work with mhc_expansion_rate=2: MaxText gives layers of multi-token prediction one "
    "residual stream, and they read several; set it to 0.",
  ),
  "extra embeddings of hyper-streams": (
    [*DEEPSEEK, "mhc_expansion_rate=2", "mudd_extra_embeddings=1"],
    "mudd_extra_embeddings=1 does not work with mhc_expansion_rate=2: MaxText makes its residual streams of one "
    "embedding; set it to 0.",
  ),
  "Engram": (
    [*DEEPSEEK, "mhc_expansion_rate=2", "engram_layers=[1]", "engram_vocab_bases=[50,50]", "hf_access_token=x"],
    "engram_layers=[1] does not work with mudd=True: Engram adds to the input of a block, which is several streams, "
    "and MaxText leaves it out of single layers; leave it empty.",
  ),
  "a kernel of hyper-streams": (
    [*DEEPSEEK, "mhc_expansion_rate=2", "enable_mhc_lite=true", "use_mhc_pallas_kernel=true"],
    "use_mhc_pallas_kernel=True does not work with mudd=True and mhc_expansion_rate=2: it was not tried with separate "
    "streams; set it to False.",
  ),
  "caches of vLLM": (
    [*OLMO3, "base_num_decoder_layers=4", "inhomogeneous_layer_cycle_interval=4", "attention=vllm_rpa"],
    "attention=vllm_rpa does not work with mudd=True and decoder_block='olmo3': layers in cycles do not return the "
    "caches that vLLM keeps; use another attention.",
  ),
  "one residual stream": (
    [*DEEPSEEK4, "mhc_expansion_rate=1"],
    "mhc_expansion_rate=1 does not work with decoder_block='deepseek4': its layers have several residual streams; set "
    "it to 2 or more.",
  ),
  "not compressed": (
    [*DEEPSEEK4, "attention_type=global", "use_indexer=false"],
    "attention_type='global' does not work with decoder_block='deepseek4': its attention is compressed; use "
    "'compressed'.",
  ),
  "more layers than ratios": (
    [*DEEPSEEK4, "base_num_decoder_layers=6"],
    "compress_ratios=[0, 4, 128, 4] does not work with base_num_decoder_layers=6: every layer has its ratio; use as "
    "many as there are layers.",
  ),
  "more layers of hashes than layers": (
    [*DEEPSEEK4, "first_num_hash_layers=5"],
    "first_num_hash_layers=5 does not work with base_num_decoder_layers=4: so many of the layers choose experts by "
    "tokens; use a number from 0 to that of all layers.",
  ),
  "scanned with other ratios": (
    [*DEEPSEEK4, "scan_layers=true", "compress_ratios=[0,4,4,128]"],
    "compress_ratios=[0, 4, 4, 128] does not work with scan_layers=True, first_num_hash_layers=2 and "
    "base_num_decoder_layers=4: MaxText scans pairs of layers with the ratios 128 and 4; use these in turn after the "
    "first layers.",
  ),
  "scanned with a layer left over": (
    [*DEEPSEEK4, "scan_layers=true", "base_num_decoder_layers=3"],
    "compress_ratios=[0, 4, 128, 4] does not work with scan_layers=True, first_num_hash_layers=2 and "
    "base_num_decoder_layers=3: MaxText scans pairs of layers",
  ),
  "prefilled in chunks": (
    [*DEEPSEEK4, "use_chunked_prefill=true"],
    "use_chunked_prefill=True does not work with decoder_block='deepseek4': its attention reads one chunk of the "
    "prompt alone; set it to False.",
  ),
  "a name for experts": (
    [*DEEPSEEK4, "model_name=default"],
    "model_name=default does not work with decoder_block='deepseek4': MaxText chooses experts by the name of the "
    "model; use deepseek4-tiny, deepseek4-284b, for other sizes with override_model_config=True.",
  ),
  "sublayers in cycles within cycles of delta nets": (
    [*QWEN3_NEXT, "scan_layers=true", "depth_connection=mhc"],
    "scan_layers=True with decoder_block='qwen3_next' does not work with depth_connection=mhc: MaxText scans its "
    "layers within cycles; set scan_layers=False.",
  ),
  "quantised by Qwix for NVIDIA's GPUs": (
    ["quantization=fp8_gpu", "use_qwix_quantization=true"],
    "quantization=fp8_gpu with use_qwix_quantization=True does not work with mudd=True: it adds variables to layers "
    "while the model runs; quantization=fp8 with use_qwix_quantization=False computes the same.",
  ),
  "quantised by Qwix for AMD's GPUs": (
    ["quantization=fp8_nanoo", "use_qwix_quantization=true"],
    "quantization=fp8_nanoo with use_qwix_quantization=True does not work with mudd=True: it adds variables to layers "
    "while the model runs; quantization=nanoo_fp8 with use_qwix_quantization=False computes the same.",
  ),
  "quantised delta nets": (
    [*QWEN3_NEXT, "quantization=int8"],
    "quantization=int8 does not work with mudd=True and decoder_block='qwen3_next': a scale is of a whole kernel, "
    "whose columns read different streams; leave quantization empty.",
  ),
  "sublayers of layers that are scaled": (
    [
      "decoder_block=gemma4",
      "mudd_init=stock",
      "mudd_ffn_reallocation=false",
      "scan_layers=true",
      "depth_connection=mhc",
    ],
    "decoder_block='gemma4' does not work with depth_connection=mhc: its layers multiply their output by a "
    "parameter, and the family keeps several arrays in its place; use a decoder_block such as gemma3.",
  ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return runs.build_corpus(tmp_path_factory.mktemp("corpus"))


def test_one_cycle_of_all_layers_needs_no_whole_pattern():
  """Each layer has its true number then."""
  keys = {"scan_layers": True, "base_num_decoder_layers": 3, "inhomogeneous_layer_cycle_interval": 3}
  assert config_of("gpt_oss", mudd=True, **keys).inhomogeneous_layer_cycle_interval == 3


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refusal(mistake, corpus, tmp_path, monkeypatch, capsys):
  overrides, message = MISTAKES[mistake]
  assert refused_run(overrides, corpus, tmp_path, monkeypatch, capsys).startswith(message)
