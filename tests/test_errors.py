"""Bad input: one sentence that names the key or file, the value and what would work; status 2; nothing written."""

import ast
import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
from maxtext.configs import pyconfig
from maxtext.layers.nnx_decoders import NNXDecoder
from maxtext.utils import max_utils
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet
import pytest

from maxtext_mudd import plugin, train, train_compile
from maxtext_mudd.config import devices, errors
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.config.mudd_config import MuddConfig
from maxtext_mudd.config.stock_checks import REMAT_POLICIES
from maxtext_mudd.runs import preflight
from tests import data_files, models, runs

MISTAKES = {
  "mistyped key": (["mudd_way=4"], "mudd_way is not a configuration key; the nearest is mudd_ways."),
  "chunks of nothing": (
    ["use_chunked_prefill=true", "prefill_chunk_size=0"],
    "prefill_chunk_size=0 is not a number of tokens; set it to 1 or more, or use_chunked_prefill=False.",
  ),
  "chunks of gpt3": (
    ["use_chunked_prefill=true", "decoder_block=gpt3"],
    "use_chunked_prefill=True does not work with decoder_block='gpt3': MaxText's attends to one chunk alone; set it to "
    "False.",
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
    "depth_connection='hyper_conection' is not valid: there is no such family of depth connections; the nearest is "
    "hyper_connections.",
  ),
  "streams": (
    ["mudd_dense_streams=qx"],
    "mudd_dense_streams='qx' must be some of the letters q, k, v and r, each at most once.",
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
    "depth_connection=hyper_connections.",
  ),
  "hyper-connections with dropout": (
    ["depth_connection=hyper_connections", "enable_dropout=true", "dropout_rate=0.1"],
    "dropout_rate=0.1 does not work with depth_connection=hyper_connections: MaxText drops parts of the one residual "
    "stream, and there are several; set it to 0.",
  ),
  "hyper-connections with metrics": (
    ["depth_connection=hyper_connections", "record_internal_nn_metrics=1"],
    "record_internal_nn_metrics=1 does not work with depth_connection=hyper_connections: MaxText measures the one "
    "residual stream, and there are several; set it to 0.",
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
  "decoder block": (
    ["decoder_block=gpt_oss", "mudd_init=stock"],
    "decoder_block='gpt_oss' does not work with mudd=True: supported are llama2, mistral, mixtral, qwen2, qwen3, "
    "qwen3_moe, gemma, gpt3; use one of these.",
  ),
  "fused_qkv": (
    ["fused_qkv=true"],
    "fused_qkv=True does not work with mudd=True: q, k and v have separate inputs; set fused_qkv=False.",
  ),
  "share_kv_projections": (
    ["share_kv_projections=true"],
    "share_kv_projections=True does not work with mudd=True: k and v have separate inputs; set it to False.",
  ),
  "MLA": (
    ["attention_type=mla"],
    "attention_type='mla' does not work with mudd=True: its latent is made of one input; use 'global'.",
  ),
  "pipeline": (
    ["ici_pipeline_parallelism=2", "num_pipeline_microbatches=2"],
    "ici_pipeline_parallelism or dcn_pipeline_parallelism above 1 does not work with mudd=True: block outputs are not "
    "passed between stages; use fsdp or tensor parallelism.",
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
  "explicit sharding": (
    ["shard_mode=explicit"],
    "shard_mode=explicit does not work with mudd=True: the aggregates leave sharding to the compiler; use "
    "shard_mode=auto.",
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
  "Muon": (
    ["opt_type=muon"],
    "opt_type=muon does not work with mudd=True: it would orthogonalise the static weights of the aggregates; use "
    "adamw.",
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


@pytest.fixture(autouse=True)
def restore_reading():
  yield
  plugin.install(plugin.Reading())


def refuse(argv, monkeypatch, capsys) -> str:
  """Runs the launcher in this process; the one sentence it ends with."""
  monkeypatch.setattr(sys, "argv", ["MaxText/train.py", *argv])
  with pytest.raises(SystemExit) as ended:
    train.run()
  assert ended.value.code == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maxtext-mudd: ")]
  assert len(lines) == 1
  return lines[0].removeprefix("maxtext-mudd: ")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return runs.build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_configuration_mistakes(mistake, corpus, tmp_path, monkeypatch, capsys):
  overrides, message = MISTAKES[mistake]
  overrides = [f"base_output_directory={tmp_path / 'out'}", "run_name=x", *corpus, *overrides]
  keys = [override.split("=")[0] for override in overrides]
  overrides = [o for i, o in enumerate(overrides) if o.split("=")[0] not in keys[i + 1 :]]
  assert refuse([runs.RUN_YML, *overrides], monkeypatch, capsys).startswith(message)
  assert not (tmp_path / "out").exists()


UNREADABLE = {
  "no rows": (pa.table({"text": pa.array([], pa.string())}), "{key}: the file holds no text; write it again."),
  "no bytes": (b"", "{key}: the file holds no text; write it again."),
  "half a file": (b"PAR1 and then nothing", "{key} is not a complete parquet file; write it again."),
  "another column": (pa.table({"content": ["x"]}), "{key}: the file has no column 'text'; it has content."),
  "numbers": (pa.table({"text": [1, 2]}), "{key}: column 'text' holds int64; text or token lists are needed."),
  "a folder": (None, "{key} is not a file; name files, or a pattern that matches files."),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_corpus_that_cannot_be_read(kind, tmp_path, monkeypatch, capsys):
  content, message = UNREADABLE[kind]
  file = tmp_path / "corpus.parquet"
  if content is None:
    file.mkdir()
  elif isinstance(content, bytes):
    file.write_bytes(content)
  else:
    pa.parquet.write_table(content, file)
  key = f"grain_train_files={file}"
  argv = [runs.RUN_YML, key, f"base_output_directory={tmp_path / 'out'}", "run_name=x"]
  assert refuse(argv, monkeypatch, capsys) == message.format(key=key)
  assert not (tmp_path / "out").exists()


def test_files_that_maxtext_finds_are_not_refused(tmp_path, monkeypatch):
  """A hub's own paths, remote files, folders of mmap_npy, Megatron pairs, and the home folder."""
  data_files.write_pair(tmp_path / "pair", [np.arange(5)])
  (tmp_path / "home.parquet").write_bytes(pathlib.Path(corpus_file(tmp_path)).read_bytes())
  monkeypatch.setenv("HOME", str(tmp_path))
  output = f"base_output_directory={tmp_path / 'out'}"
  for overrides in (
    ["dataset_type=hf", "hf_path=allenai/c4", "hf_train_files=en/*.json.gz"],
    ["dataset_type=hf", "hf_path=json", "hf_train_files=https://example.org/a.json"],
    ["grain_train_files=gs://bucket/*.parquet"],
    ["grain_file_type=mmap_npy", f"grain_train_files={tmp_path}"],
    ["grain_file_type=mmap", f"grain_train_files={tmp_path / 'pair'}"],
    ["grain_train_files=~/home.parquet"],
  ):
    cfg = pyconfig.initialize_pydantic(["", runs.RUN_YML, "run_name=x", output, *overrides])
    preflight.check_files(cfg)


def corpus_file(folder) -> str:
  return runs.build_corpus(folder)[0].split("=")[1]


def test_checkpoints_to_start_from(corpus, tmp_path, monkeypatch, capsys):
  """Are looked at before the folders of the run are made."""
  nowhere, other = tmp_path / "nowhere", tmp_path / "other"
  embedding = {"embedding": np.zeros((320, 16), np.float32)}
  ocp.PyTreeCheckpointer().save(other / "items", {"params": {"params": {"token_embedder": embedding}}})
  argv = [runs.RUN_YML, *corpus, f"base_output_directory={tmp_path / 'out'}", "run_name=x"]
  advice = "there is no such folder; name a checkpoint, as OUTPUT/RUN/checkpoints/STEP."
  for key in ("load_parameters_path", "load_full_state_path"):
    assert refuse([*argv, f"{key}={nowhere}"], monkeypatch, capsys) == f"{key}={nowhere}: {advice}"
  said = refuse([*argv, f"load_parameters_path={other}"], monkeypatch, capsys)
  assert re.fullmatch(rf"{other}/items has no \S+, which this configuration needs; name the keys that .*", said)
  assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(corpus, tmp_path, monkeypatch, capsys):
  occupied = tmp_path / "file"
  occupied.touch()
  output = occupied / "out"
  argv = [runs.RUN_YML, *corpus, f"base_output_directory={output}", "run_name=x"]
  expected = f"base_output_directory={output}: {occupied} is not a folder that files can be written to."
  assert refuse(argv, monkeypatch, capsys) == expected
  assert list(tmp_path.iterdir()) == [occupied]


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("model.yaml", "mudd: true", "{file}: a configuration file must end in .yml; rename it or put the file first."),
    ("absent.yml", None, "{file}: no such configuration file; the nearest of this package is "),
    ("broken.yml", "mudd: [", "A configuration file is not valid YAML: while parsing a flow node"),
    (
      "orphan.yml",
      "base_config: nowhere.yml",
      "{file}: base_config=nowhere.yml: no such configuration file beside it, in MaxText or in this package.",
    ),
    (
      "rootless.yml",
      "mudd: true",
      "{file} has no base_config; write base_config: mudd_base.yml (or base.yml, MaxText's own).",
    ),
    ("list.yml", "- mudd", "{file}: a configuration file maps keys to values, as in `mudd: true`."),
    ("latin.yml", b"run_name: \xe9", "'utf-8' codec can't decode byte 0xe9"),
    (
      "circle.yml",
      "base_config: circle.yml",
      "{file}: its base_config leads back to itself; end the chain in base.yml.",
    ),
  ],
)
def test_configuration_files(name, text, message, tmp_path, monkeypatch, capsys):
  file = tmp_path / name
  if text is not None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
  expected = message.format(file=file)
  output = f"base_output_directory={tmp_path / 'out'}"
  assert refuse([str(file), "run_name=x", output], monkeypatch, capsys).startswith(expected)
  assert not (tmp_path / "out").exists()


def test_a_data_file_before_the_model(tmp_path, monkeypatch, capsys):
  data, model = (str(runs.ROOT / "yaml" / name) for name in ("data/synthetic.yml", "mudd_405m.yml"))
  found = refuse([data, model, "run_name=x"], monkeypatch, capsys)
  assert found.startswith(f"{model} builds on transformer_pp_405m.yml, so it is a model")
  found = refuse(["steps=2", data], monkeypatch, capsys)
  assert found == f"{data} comes after steps=2; name the model's file before all else."


def test_files_that_override_a_model():
  """What a later file sets itself goes before an earlier one, and key=value before both."""
  pile, synthetic = (str(runs.ROOT / "yaml" / "data" / f"{name}.yml") for name in ("pile", "synthetic"))
  argv = ["", runs.RUN_YML, pile, synthetic, "run_name=x", "mmap_eod_id=7"]
  cfg = pyconfig.initialize_pydantic(argv)
  assert (cfg.dataset_type.value, cfg.grain_file_type, cfg.mmap_eod_id) == ("synthetic", "mmap", 7)
  assert (cfg.mudd, cfg.base_emb_dim) == (True, 32)  # the model's
  text = str(runs.ROOT / "yaml" / "data" / "local_text.yml")
  cfg = pyconfig.initialize_pydantic(["", runs.RUN_YML, text, "run_name=x", "hf_train_files=a.txt"])
  assert (cfg.dataset_type.value, cfg.hf_path, cfg.hf_train_files, cfg.packing) == ("grain", "text", "a.txt", True)


def test_a_pair_without_its_index(tmp_path, monkeypatch, capsys):
  (tmp_path / "pair.bin").write_bytes(b"1")
  overrides = ["grain_file_type=mmap", f"grain_train_files={tmp_path / 'pair'}", f"base_output_directory={tmp_path}"]
  expected = (
    f"grain_train_files={tmp_path}/pair: {tmp_path}/pair.idx is missing; a .bin file is read with its .idx file."
  )
  assert refuse([runs.RUN_YML, "run_name=x", *overrides], monkeypatch, capsys) == expected


def test_a_cpu_that_would_join_other_hosts(monkeypatch):
  for name in ("JAX_COORDINATOR_ADDRESS", "JOB_INDEX"):
    monkeypatch.delenv(name, raising=False)
  expected = "hardware=cpu: MaxText finds no other hosts to join; on one, set skip_jax_distributed_system=true."
  with pytest.raises(ConfigError, match=re.escape(expected)), errors.one_sentence(MuddConfig):
    max_utils.initialize_jax_for_cpu({})


def test_policies_are_those_of_maxtext():
  tree = ast.parse(textwrap.dedent(inspect.getsource(NNXDecoder.get_remat_policy)))
  compared = [x for x in ast.walk(tree) if isinstance(x, ast.Compare) and ast.unparse(x.left) == "remat_policy"]
  names = {x.value for compare in compared for x in ast.walk(compare) if isinstance(x, ast.Constant)}
  assert set(REMAT_POLICIES) == names


def test_no_arguments(monkeypatch, capsys):
  assert refuse([], monkeypatch, capsys).startswith("name a configuration file first, as in:")


def test_stock_paths_of_configuration_files_still_work():
  pyconfig.initialize(["", "src/maxtext/configs/base.yml", "run_name=x", "log_config=false"])


def test_status_of_the_process(tmp_path):
  finished = subprocess.run(
    runs.command(runs.LAUNCHER, runs.RUN_YML, tmp_path / "out", "x", "mudd_way=4"),
    cwd=runs.ROOT,
    env=runs.environment(),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 2
  assert "Traceback" not in finished.stderr
  assert finished.stderr.splitlines()[-1] == (
    "maxtext-mudd: mudd_way is not a configuration key; the nearest is mudd_ways."
  )
  assert not (tmp_path / "out").exists()


def test_as_a_library_the_same_sentence_is_raised():
  with pytest.raises(ConfigError) as error:
    models.config(mudd=True, depth_connection="hyper_connections", enable_dropout=True, dropout_rate=0.1)
  assert str(error.value).startswith("dropout_rate=0.1 does not work with depth_connection=hyper_connections")


V5P_32 = {"compile_topology": "v5p-32", "compile_topology_num_slices": 1, "hardware": "tpu"}  # 16 chips
MESHES = {
  "too few": (
    {"ici_fsdp_parallelism": 4, "ici_tensor_parallelism": 2},
    "ici_fsdp_parallelism=4, ici_tensor_parallelism=2: the product 8 of the mesh is not the 16 devices of a slice; "
    "set one of them to -1, or change them to a product of 16.",
  ),
  "no divisor": (
    {"ici_tensor_parallelism": 3},
    "ici_tensor_parallelism=3: the product 3 of the mesh does not divide the 16 devices of a slice, for "
    "ici_fsdp_parallelism=-1 takes what is left; use divisors of 16.",
  ),
  "two that take what is left": (
    {"ici_tensor_parallelism": -1},
    "ici_fsdp_parallelism=-1 and ici_tensor_parallelism=-1: only one axis can take the devices of a slice that are "
    "left; set the other.",
  ),
  "slices": (
    {"compile_topology_num_slices": 4, "dcn_data_parallelism": 3},
    "dcn_data_parallelism=3: the product 3 of the mesh is not the 4 slices; set one of them to -1, or change them to a "
    "product of 4.",
  ),
}


THREE_HALVES = {"per_device_batch_size": 1.5}
SYNTHETIC = {"dataset_type": "synthetic"}
MOE = {"decoder_block": "mixtral", "num_experts": 6, "num_experts_per_tok": 2, "base_moe_mlp_dim": 64}
MESHES |= {
  "heads": (
    {"ici_tensor_parallelism": 8},
    "ici_tensor_parallelism=8: the 2 heads of keys and values (base_num_kv_heads) cannot be divided by 8; use a "
    "divisor of 2.",
  ),
  "heads of what is left": (
    {"ici_fsdp_parallelism": 4, "ici_tensor_parallelism": -1, "base_num_query_heads": 6},
    "ici_tensor_parallelism=-1: the 2 heads of keys and values (base_num_kv_heads) cannot be divided by 4; use a "
    "divisor of 2.",
  ),
  "experts": (
    MOE | {"ici_expert_parallelism": 4},
    "ici_expert_parallelism=4: num_experts=6 cannot be divided by 4; use a divisor of 6.",
  ),
}


@pytest.mark.parametrize("case", MESHES)
def test_a_mesh_that_does_not_fit(case):
  keys, sentence = MESHES[case]
  with pytest.raises(ConfigError) as error:
    devices.check_mesh(models.config(**V5P_32 | keys))
  assert str(error.value) == sentence


BATCHES = {
  "length": (
    {"ici_context_parallelism": 4, "max_target_length": 18},
    "ici_context_parallelism=4: max_target_length=18 cannot be divided by 4; use a multiple of 4 for it.",
  ),
  "less than one sequence": (
    {"per_device_batch_size": 0.05, "max_target_length": 20},
    "per_device_batch_size=0.05 makes less than one sequence for 16 device(s); use 1, or a larger share.",
  ),
  "sequences that the devices cannot share": (
    THREE_HALVES | {"dataset_type": "tfds"},
    "per_device_batch_size=1.5: the 24 sequences of a step cannot be divided by the 16 devices, as dataset_type=tfds "
    "divides them; use a whole number.",
  ),
  "sequences that the mesh cannot share": (
    THREE_HALVES,
    "ici_fsdp_parallelism=-1: the 24 sequences of per_device_batch_size=1.5 cannot be divided by 16; use a whole "
    "number for per_device_batch_size.",
  ),
  "sequences of an evaluation": (
    {"eval_per_device_batch_size": 1.5, "eval_interval": 2},
    "ici_fsdp_parallelism=-1: the 24 sequences of eval_per_device_batch_size=1.5 cannot be divided by 16; use a whole "
    "number for eval_per_device_batch_size.",
  ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_that_the_mesh_cannot_divide(case):
  keys, sentence = BATCHES[case]
  with pytest.raises(ConfigError) as error:
    devices.check_batch(models.config(**V5P_32 | SYNTHETIC | keys))
  assert str(error.value) == sentence


def test_a_mesh_and_a_batch_that_fit():
  """Fractions, too, where MaxText loads a sequence for each device, or the devices have fewer to divide."""
  for keys in (
    {"ici_tensor_parallelism": 2, "per_device_batch_size": 0.5},
    {"compile_topology_num_slices": 4, "dcn_fsdp_parallelism": 2, "gradient_accumulation_steps": 2} | THREE_HALVES,
    MOE
    | {"ici_expert_parallelism": 2, "ici_context_parallelism": 4, "max_target_length": 20}
    | THREE_HALVES
    | SYNTHETIC,
  ):
    cfg = models.config(**V5P_32 | keys)
    devices.check_mesh(cfg)
    devices.check_batch(cfg)


def test_compiling_without_a_compiler(monkeypatch):
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  expected = (
    "libtpu, which compiles for TPUs, is not installed; on Linux: python3 -m pip install -r requirements/tpu.txt."
  )
  with pytest.raises(ConfigError) as error:
    train_compile.check_compiling(models.config(**V5P_32))
  assert str(error.value) == expected
  with pytest.raises(ConfigError, match="compile_topology='' names nothing to compile for; add compile_topology=v5p-8"):
    train_compile.check_compiling(models.config())


TOO_LARGE = {
  "by a compiler": (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 19.03G of 15.75G "
    "hbm. Exceeded hbm capacity by 3.28G.\n\nTotal hbm usage >= 19.28G",
    "needs 19.03G of the chip's 15.75G, 3.28G too much",
  ),
  "by libtpu 0.0.52": (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (345.27G) exceeds available HBM (95.73G). HLO module: jit_train_step.",
    "needs 345.27G of the chip's 95.73G, 249.54G too much",
  ),
  "by a compiler that says less": (
    "RESOURCE_EXHAUSTED: Exceeded memory capacity by 4.5GiB",
    "needs 4.5GiB more than the device has",
  ),
  "by a GPU": (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5368709120 bytes.",
    "asks for 5.00GiB more than are free",
  ),
  "by a TPU": (
    "RESOURCE_EXHAUSTED: Attempting to allocate 5.25G. That was not possible. There are 3.13G free.",
    "asks for 5.25G more, and 3.13G are free",
  ),
  "by one that says nothing": ("RESOURCE_EXHAUSTED", "needs more memory than the device has (RESOURCE_EXHAUSTED)"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_a_batch_that_does_not_fit(case):
  message, needs = TOO_LARGE[case]
  cfg = models.config(per_device_batch_size=512, remat_policy="minimal")
  found = devices.out_of_memory(jax.errors.JaxRuntimeError(message), cfg)
  assert found == (
    f"per_device_batch_size=512 with max_target_length=16 does not fit: the step {needs}; use a smaller batch "
    "(gradient_accumulation_steps makes up for it), remat_policy=full (here minimal), or more devices to shard over."
  )
  assert devices.out_of_memory(ValueError(message), cfg) is None
  assert devices.out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: x"), cfg) is None
