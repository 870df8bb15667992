"""Bad input: one sentence that names the key or file, the value and what would work; status 2; nothing written."""

import pytest

from tests import runs
from tests.refusals import refused_run

MISTAKES = {
  "mistyped key": (["mudd_way=4"], "mudd_way is not a configuration key; the nearest is mudd_ways."),
  "chunks of nothing": (
    ["use_chunked_prefill=true", "prefill_chunk_size=0"],
    "prefill_chunk_size=0 is not a number of tokens; set it to 1 or more, or use_chunked_prefill=False.",
  ),
  "chunks of gpt3": (
    ["use_chunked_prefill=true", "decoder_block=gpt3"],
    "use_chunked_prefill=True does not work with decoder_block='gpt3': its attention reads one chunk of the "
    "prompt alone; set it to False.",
  ),
  "no tokens": (["max_target_length=0"], "max_target_length=0 is less than one token; set it to 1 or more."),
  "no value": (["mudd"], "mudd is not key=value, nor a configuration file, which ends in .yml."),
  "topology": (
    ["compile_topology=v5p-17", "compile_topology_num_slices=1"],
    "compile_topology=v5p-17: there is no such topology; the nearest is v5p-16.",
  ),
  "chips": (
    ["compile_topology=v5q-16", "compile_topology_num_slices=1"],
    "compile_topology=v5q-16: there is no such topology; the nearest is v5p-16.",
  ),
  "topology by XPK's name": (
    ["compile_topology=v5litepod-16", "compile_topology_num_slices=1"],
    "compile_topology=v5litepod-16: there is no such topology; the nearest is v5e-16.",
  ),
  "slices that are no number": (
    ["compile_topology=v5p-16", "compile_topology_num_slices=abc"],
    "compile_topology_num_slices=abc is not a number of slices; set it to 1 or more.",
  ),
  "mistyped policy": (
    ["remat_policy=minimul"],
    "remat_policy=minimul: there is no such policy; the nearest is minimal.",
  ),
  "mistyped policy of the plain model": (
    ["mudd=false", "mudd_ffn_reallocation=false", "remat_policy=Full"],
    "remat_policy=Full: there is no such policy; the nearest is full.",
  ),
  "no batch": (
    ["per_device_batch_size=0"],
    "per_device_batch_size=0 is not a batch size; use 1 or more, or a fraction such as 0.5.",
  ),
  "batch below zero": (
    ["mudd=false", "mudd_ffn_reallocation=false", "per_device_batch_size=-2"],
    "per_device_batch_size=-2 is not a batch size",
  ),
  "tokens that are not whole": (
    ["per_device_batch_size=0.3"],
    "per_device_batch_size=0.3 with max_target_length=64 makes 19.2 tokens per device, which is not a "
    "multiple of num_vocab_tiling=1; use per_device_batch_size=1, or change the others.",
  ),
  "less than one sequence": (
    ["per_device_batch_size=0.5"],
    "per_device_batch_size=0.5 makes less than one sequence for 1 device(s); use 1, or a larger share.",
  ),
  "topology without slices": (
    ["compile_topology=v5p-16"],
    "compile_topology_num_slices=-1 is not a number of slices; set it to 1 or more.",
  ),
  "mistyped stock key": (["learning_rte=1"], "learning_rte is not a configuration key; the nearest is learning_rate."),
  "ways": (["mudd_ways=3"], "mudd_ways=3 is not valid: input should be 1 or 4."),
  "expansion": (
    ["mudd_hidden_expansion=-1"],
    "mudd_hidden_expansion=-1 is not valid: input should be greater than 0.",
  ),
  "period": (["mudd_block_period=0"], "mudd_block_period=0 is not valid: input should be greater than or equal to 1."),
  "type": (["mudd_window=many"], "mudd_window='many' is not valid: input should be a valid integer"),
  "activation": (
    ["mudd_activation=relu"],
    "mudd_activation='relu' is not valid: input should be 'gelu' or 'gelu_tanh'.",
  ),
  "no parts": (["mudd_ffn_parts=0"], "mudd_ffn_parts=0 is not valid: input should be greater than or equal to 1."),
  "parts of experts": (
    [
      "mudd_ffn_parts=2",
      "decoder_block=mixtral",
      "num_experts=4",
      "base_moe_mlp_dim=256",
      "num_experts_per_tok=2",
      "mudd_ffn_reallocation=false",
    ],
    "num_experts=4 does not work with mudd_ffn_parts=2: experts are not computed in parts; set mudd_ffn_parts=1.",
  ),
  "parts of what is divided": (
    ["mudd_ffn_parts=2", "ici_tensor_parallelism=2"],
    "ici_tensor_parallelism=2 does not work with mudd_ffn_parts=2: devices share the width already; set "
    "mudd_ffn_parts=1.",
  ),
  "more parts than columns": (
    ["mudd_ffn_parts=500"],
    "an FFN of width 128 does not work with mudd_ffn_parts=500: it has fewer columns; set mudd_ffn_parts=1.",
  ),
  "quantized parts": (
    ["mudd_ffn_parts=2", "quantization=int8"],
    "quantization=int8 does not work with mudd_ffn_parts=2: its scales are of whole kernels; set mudd_ffn_parts=1.",
  ),
  "rounding of a table that is not there": (
    ["mudd_rope_table=float16", "rope_type=yarn"],
    "rope_type=yarn does not work with mudd_rope_table=float16: the released code has the default table; set "
    "mudd_rope_table=stock.",
  ),
  "kernel": (
    ["mudd_kernel=triton"],
    "mudd_kernel='triton' is not valid: input should be 'auto', 'xla', 'pallas' or 'pallas_interpret'.",
  ),
  "family": (
    ["depth_connection=hyper_conection"],
    "depth_connection='hyper_conection' is not valid: there is no such family of depth connections; use attnres, "
    "dca, dense, hyper_connections, mhc",
  ),
  "streams": (
    ["mudd_dense_streams=qx"],
    "mudd_dense_streams='qx' must be some of the letters q, k, v and r, each at most once.",
  ),
  "weights that are bounded twice": (
    ["mudd_weight_cap=10", "mudd_weight_scale=true"],
    "mudd_weight_cap=10.0 with mudd_weight_scale=True bounds the weights twice; use one of them.",
  ),
  "cap of static weights": (
    ["mudd_weight_cap=10", "mudd_dynamic=false"],
    "mudd_weight_cap=10.0 does nothing with mudd_dynamic=False; leave it at 0.0, or set mudd_dynamic=True.",
  ),
  "negative cap": (
    ["mudd_weight_cap=-1"],
    "mudd_weight_cap=-1 is not valid: input should be greater than or equal to 0.",
  ),
  "key of another family": (
    ["depth_connection=hyper_connections", "mudd_window=2"],
    "mudd_window=2 does nothing with depth_connection=hyper_connections; leave it at 0, or set depth_connection=dense.",
  ),
  "key of connections that are off": (
    ["mudd=false", "mudd_ffn_reallocation=true"],
    "mudd_ffn_reallocation=True does nothing with mudd=False; leave it at False, or set mudd=True.",
  ),
  "key of the weight MLP without one": (
    ["mudd_dynamic=false", "mudd_activation=gelu_tanh"],
    "mudd_activation=gelu_tanh does nothing with mudd_dynamic=False; leave it at gelu, or set mudd_dynamic=True.",
  ),
  "streams of a post-norm that is off": (
    ["mudd_post_norm_streams=qkvr"],
    "mudd_post_norm_streams=qkvr does nothing with mudd_post_norm=False; leave it at r, or set mudd_post_norm=True.",
  ),
  "deviation of another rule": (
    ["mudd_init=xavier_normal", "mudd_init_std=0.02"],
    "mudd_init_std=0.02 does nothing with mudd_init=xavier_normal; leave it at 0.006, or set mudd_init=normal.",
  ),
  "two models": (
    [str(runs.ROOT / "yaml" / "mudd_405m.yml")],
    f"{runs.ROOT}/yaml/mudd_405m.yml builds on transformer_pp_405m.yml, so it is a model, and cannot override "
    f"{runs.RUN_YML}; name one model, before all else.",
  ),
  "base_config as an override": (
    ["base_config=tiny.yml"],
    "base_config=tiny.yml: base_config is a key of files alone; name the file itself, before all else.",
  ),
  "positions beyond the table": (
    ["trainable_position_size=8"],
    "trainable_position_size=8 is less than max_target_length=64; make it at least as large.",
  ),
  "expansion rate of the dense family": (
    ["mudd_expansion_rate=2"],
    "mudd_expansion_rate=2 does nothing with depth_connection=dense; leave it at 4, or set "
    "depth_connection=hyper_connections or mhc.",
  ),
  "hyper-connections with dropout": (
    ["depth_connection=hyper_connections", "enable_dropout=true", "dropout_rate=0.1"],
    "dropout_rate=0.1 does not work with depth_connection=hyper_connections: MaxText drops parts of one residual "
    "stream, which this family does not have; set dropout_rate=0.",
  ),
  "hyper-connections in Pythia": (
    ["depth_connection=hyper_connections", "mudd_decoder_layer=pythia", "decoder_block=gpt3", "mlp_activations=[gelu]"],
    "mudd_decoder_layer=pythia does not work with depth_connection=hyper_connections: its attention and FFN read one "
    "input in parallel; use a sequential decoder_block.",
  ),
  "Pythia's block": (
    ["mudd_decoder_layer=pythia"],
    "decoder_block='llama2' does not work with mudd_decoder_layer=pythia: its LayerNorms and counts are those of gpt3; "
    "set decoder_block=gpt3.",
  ),
  "Pythia's MLP": (
    ["mudd_decoder_layer=pythia", "decoder_block=gpt3"],
    "mlp_activations=['silu', 'linear'] does not work with mudd_decoder_layer=pythia: its MLP has one activation, gelu "
    "or gelu_tanh; set mlp_activations=[gelu].",
  ),
  "Pythia with learned positions": (
    [
      "mudd_decoder_layer=pythia",
      "decoder_block=gpt3",
      "mlp_activations=[gelu]",
      "trainable_position_size=64",
    ],
    "trainable_position_size=64 does not work with mudd_decoder_layer=pythia: its positions are rotary; leave it at "
    "-1.",
  ),
  "initialisation of MTP": (
    ["mtp_num_layers=1"],
    "mtp_num_layers=1 does not work with mudd_init=xavier_normal: MaxText initialises the layers of MTP by its own "
    "rule; set it to 0, or mudd_init=stock.",
  ),
  "MTP of another family": (
    ["depth_connection=mhc", "mudd_mtp=connected"],
    "mudd_mtp=connected does nothing with depth_connection=mhc; leave it at head, or set depth_connection=dense.",
  ),
  "connected MTP without its blocks": (
    ["mudd_mtp=connected"],
    "mudd_mtp=connected connects blocks of multi-token prediction, and mtp_num_layers=0 makes none; set "
    "mtp_num_layers=1 or more, or mudd_mtp=head.",
  ),
  "connected MTP without the last DA": (
    ["mudd_mtp=connected", "mtp_num_layers=1", "mudd_dense_streams=qkv"],
    "mudd_mtp=connected needs DA_2, which makes the stream for MTP, and no DA follows block 2; add r to "
    "mudd_dense_streams, use a mudd_block_period that divides 2, or place that DA in mudd_placements.",
  ),
  "initialisation of another block": (
    ["mudd=false", "mudd_ffn_reallocation=false", "decoder_block=gpt_oss"],
    "decoder_block='gpt_oss' does not work with mudd_init=xavier_normal: its rules are for llama2, mistral, mixtral,",
  ),
  "Pythia's rotation": (
    ["mudd_decoder_layer=pythia", "decoder_block=gpt3", "mlp_activations=[gelu]", "mudd_rotary_fraction=0.2"],
    "mudd_rotary_fraction=0.2 does not work with mudd_decoder_layer=pythia: 3.2 of head_dim=16 would be rotated; an "
    "even number is needed.",
  ),
  "depth start": (
    ["mudd_depth_start=0.9", "mudd_block_period=2", "base_num_decoder_layers=3"],
    "mudd_depth_start=0.9 leaves no DA in a model of 3 blocks (mudd_block_period=2); lower it.",
  ),
  "streams of one way": (
    ["mudd_ways=1", "mudd_dense_streams=kv"],
    "mudd_dense_streams='kv' needs mudd_ways=4; with one way all streams are the same.",
  ),
  "post-norms of one way": (
    ["mudd_ways=1", "mudd_post_norm=true", "mudd_post_norm_streams=qkvr"],
    "mudd_post_norm_streams='qkvr' does nothing where DAs make one input for all streams, which always has a "
    "post-norm; leave it at 'r'.",
  ),
  "post-norms of streams that are not made": (
    ["mudd_dense_streams=vr", "mudd_post_norm=true", "mudd_post_norm_streams=q"],
    "mudd_post_norm_streams='q' norms nothing, so that mudd_post_norm=True would only add X_i: DAs make the streams "
    "vr; name some of these, or set mudd_post_norm=False.",
  ),
  "start of static weights without post-norm": (
    ["mudd_static_start=zero"],
    "mudd_static_start=zero does nothing with mudd_post_norm=False;",
  ),
  "start of static weights with both norms": (
    ["mudd_static_start=zero", "mudd_pre_norm=true", "mudd_post_norm=true"],
    "mudd_static_start=zero does nothing with mudd_pre_norm=True;",
  ),
  "a width of the last DA where there is none": (
    ["mudd_dense_streams=qkv", "mudd_last_hidden_expansion=2"],
    "mudd_last_hidden_expansion=2.0 does nothing: no DA has a hidden width by this rule; leave it at 4.0.",
  ),
  "a width of other DAs where there is the last one only": (
    ["mudd_block_period=2", "mudd_hidden_expansion=2"],
    "mudd_hidden_expansion=2.0 does nothing: no DA has a hidden width by this rule; leave it at 1.0.",
  ),
  "decay of static weights that are not learned": (
    ["mudd_static=false", "mudd_decay=not_static"],
    "mudd_decay=not_static does not work with depth_connection=dense: its connections have no static weights that are "
    "learned; use all.",
  ),
  "decay of matrices that do not exist": (
    ["mudd_dynamic=false", "mudd_decay=matrices"],
    "mudd_decay=matrices does not work with depth_connection=dense: its connections have no matrices; use nothing.",
  ),
  "nothing to learn": (
    ["mudd_static=false", "mudd_dynamic=false"],
    "mudd_dynamic=False with mudd_static=False leaves nothing to learn; turn one on, or set mudd=False.",
  ),
  "no DA": (["mudd_block_period=9"], "mudd_block_period=9 places no DA in a model of 2 blocks; use at most 2."),
  "window and dilation": (
    ["mudd_window=2", "mudd_source_dilation=2"],
    "mudd_window=2 with mudd_source_dilation=2 leaves a DA without sources besides its own block; use mudd_window=0 "
    "or at least 3.",
  ),
  "FFN width zero": (
    ["base_mlp_dim=100"],
    "mudd_ffn_reallocation=True rounds the FFN of block 1 to width 0 (mlp_dim=100); lower mudd_ffn_round_to=128 or "
    "raise base_mlp_dim.",
  ),
  "one layer": (
    ["base_num_decoder_layers=1"],
    "mudd_ffn_reallocation=True needs at least two blocks, and base_num_decoder_layers=1; turn it off.",
  ),
  "pipeline": (
    ["ici_pipeline_parallelism=2", "num_pipeline_microbatches=2"],
    "mudd_ffn_reallocation=True does not work with mudd=True and a pipeline of 2 stages: all stages have FFNs of one "
    "width; set it to False.",
  ),
  "scan": (
    ["scan_layers=true"],
    "scan_layers=True does not work with mudd_ffn_reallocation=True: the FFNs have different widths; scan groups of "
    "equal width with mudd_ffn_groups=4, for example, or set scan_layers=False.",
  ),
  "axis of scanned layers": (
    ["scan_layers=true", "mudd_ffn_reallocation=false", "param_scan_axis=2"],
    "param_scan_axis=2 does not work with mudd=True and scan_layers=True: norms have two dimensions where they are "
    "stacked; use 0 or 1.",
  ),
  "last axis of scanned layers": (
    ["scan_layers=true", "mudd_ffn_reallocation=false", "param_scan_axis=-1"],
    "param_scan_axis=-1 does not work with mudd=True and scan_layers=True",
  ),
  "parameters of scanned layers on the host": (
    ["scan_layers=true", "mudd_ffn_reallocation=false", "parameter_memory_host_offload=true"],
    "parameter_memory_host_offload=True does not work with mudd=True and scan_layers=True: all layers would be kept on "
    "the device for the backward pass; set scan_layers=False.",
  ),
  "more groups than blocks": (
    ["mudd_ffn_groups=7"],
    "mudd_ffn_groups=7 is more than the model has blocks; use at most 2, or 0 for no groups.",
  ),
  "no DA left": (
    ["mudd_block_period=2", "mudd_dense_streams=qk"],
    "mudd_dense_streams='qk' leaves no DA: the only one follows the last block, and makes the residual stream; add r.",
  ),
  "weight MLP without width": (
    ["mudd_hidden_expansion=0.01", "mudd_hidden_round_to=0"],
    "mudd_hidden_expansion=0.01 (mudd_last_hidden_expansion=4.0) makes a weight MLP of width 0; raise it, or set "
    "mudd_dynamic=False.",
  ),
  "infinite": (["mudd_ffn_last=.inf"], "mudd_ffn_last=inf is not valid: input should be a finite number."),
  "dilation beyond the model": (
    ["mudd_source_dilation=3"],
    "mudd_source_dilation=3 leaves every DA without sources besides its own block in a model of 2 blocks; use at "
    "most 2.",
  ),
  "no layers": (["base_num_decoder_layers=0"], "base_num_decoder_layers=0 makes no blocks; use at least 1."),
  "experts of another width": (
    [
      "decoder_block=qwen3_moe",
      "num_experts=4",
      "num_experts_per_tok=2",
      "base_moe_mlp_dim=64",
      "inhomogeneous_layer_cycle_interval=2",
      "mudd_init=stock",
    ],
    "mudd_ffn_reallocation=True needs experts as wide as the FFN: base_moe_mlp_dim=64, base_mlp_dim=256; make them "
    "equal.",
  ),
  "explicit sharding of heads": (
    [
      "shard_mode=explicit",
      "depth_connection=attnres",
      "mudd_attnres_heads=2",
      "mudd_init=stock",
      "mudd_ffn_reallocation=false",
    ],
    "mudd_attnres_heads=2 does not work with shard_mode=explicit: the channels of a head would have to be gathered; "
    "use shard_mode=auto.",
  ),
  "a kernel for another device": (
    ["mudd_kernel=pallas"],
    "hardware=cpu does not work with mudd_kernel=pallas: it is compiled for TPUs; use mudd_kernel=auto.",
  ),
  "a dtype that the kernel does not take": (
    ["mudd_kernel=pallas_interpret", "dtype=float16"],
    "dtype=float16 does not work with mudd_kernel=pallas_interpret: it takes bfloat16 or float32; use one of these, or "
    "mudd_kernel=xla.",
  ),
  "unknown tokenizer of this package": (
    ["tokenizer_path=maxtext_mudd/bytes"],
    "tokenizer_path=maxtext_mudd/bytes: this package has one tokenizer, maxtext_mudd/byte.",
  ),
  "second file that is not there": (
    ["other.yml"],
    "other.yml: no such configuration file; the nearest of this package is paper.yml (python3 -m "
    "maxtext_mudd.train --list names them all).",
  ),
  "weight of a file": (
    ["grain_train_files=a.parquet,heavy"],
    "grain_train_files=a.parquet,heavy: 'heavy' is not a weight; write pattern,number.",
  ),
  "no corpus": (
    ["dataset_type=hf", "hf_path=text", "hf_train_files=''"],
    "hf_train_files='' names no data; set it to files, or to a pattern that matches files.",
  ),
  "missing corpus": (
    ["grain_train_files=nowhere.parquet"],
    "grain_train_files=nowhere.parquet: no such file; yaml/README.md says where data comes from.",
  ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return runs.build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_configuration_mistakes(mistake, corpus, tmp_path, monkeypatch, capsys):
  overrides, message = MISTAKES[mistake]
  assert refused_run(overrides, corpus, tmp_path, monkeypatch, capsys).startswith(message)
