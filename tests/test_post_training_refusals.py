"""What the launcher of fine-tuning refuses, in one sentence, before anything is compiled or written."""

import pathlib
import sys

from flax import traverse_util
from maxtext.configs import pyconfig
import numpy as np
from orbax import checkpoint as ocp
import pytest

from maxtext_mudd import plugin, post_train
from maxtext_mudd.checkpoints import model_config
from tests import conversations, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A folder with data, usable and not, the model of `runs.RUN_YML` in `model`, and an adapter of it in `adapter`."""
  folder = conversations.write(tmp_path_factory.mktemp("data"))
  (folder / "empty.jsonl").touch()
  teacher = "teacher_overrides: {load_parameters_path: /none}"
  (folder / "student.yml").write_text(f"base_config: {runs.RUN_YML}\ndataset_type: synthetic\n{teacher}\n")
  plugin.install(plugin.Reading())
  config = pyconfig.initialize(["", runs.RUN_YML], run_name="x", log_config=False, jax_cache_dir="")
  shapes = {name: x.shape for name, x in model_config.parameter_shapes(config).items()}
  save(folder / "model" / "items", {"params": {"params": tree(shapes)}})
  queries = (name for name in shapes if name.endswith("query/kernel"))
  ranks = {f"{name}_lora_{letter}": (3, 3) for name in queries for letter in "ab"}
  save(folder / "adapter" / "model_params", tree(ranks))
  return folder


def tree(shapes):
  return traverse_util.unflatten_dict({tuple(name.split("/")): np.zeros(x, np.float32) for name, x in shapes.items()})


def save(path: pathlib.Path, values) -> None:
  ocp.PyTreeCheckpointer().save(path, values)


SFT = ["sft", runs.RUN_YML, "post_train/sft.yml"]
DPO = ["dpo", runs.RUN_YML, "post_train/dpo.yml"]
DATA, PAIRS, MODEL = (
  "hf_train_files=FOLDER/chat.jsonl",
  "hf_train_files=FOLDER/pairs.jsonl",
  "load_parameters_path=FOLDER/model",
)
ADAPTER = [*SFT, "post_train/lora.yml", DATA]
RESTORED = [*ADAPTER, MODEL, "lora.lora_restore_path=FOLDER/adapter"]
QUERY = r"lora.lora_module_path=decoder/layers_\d+/self_attention/query"
MISTAKES = {
  "no method": ([], "no method is not a method of fine-tuning; name sft, dpo, distill, before all else."),
  "another method": (["ppo"], "ppo is not a method of fine-tuning; name sft, dpo, distill, before all else."),
  "GRPO": (
    ["rl", runs.RUN_YML],
    "rl: MaxText's GRPO generates answers with vLLM alone, through the module tpu_inference, and vLLM has no model "
    "with connections; use dpo (docs/post_training.md).",
  ),
  "no keys of the method": (
    ["sft", runs.RUN_YML, "dataset_type=synthetic"],
    "use_sft=False: sft needs its own keys; name post_train/sft.yml after the model's file, or set use_sft=True.",
  ),
  "keys of another method": (
    ["dpo", runs.RUN_YML, "post_train/sft.yml", "use_dpo=true", "packing=false", DATA],
    "Only one of `use_sft` or `use_dpo` can be True.",
  ),
  "no data": (
    SFT,
    "hf_train_files='' names no data; set it to files, or to a pattern that matches files.",
  ),
  "no checkpoint": (
    [*SFT, DATA],
    "load_parameters_path='' names no model to fine-tune; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP.",
  ),
  "a missing checkpoint": (
    [*SFT, DATA, "load_parameters_path=/none"],
    "load_parameters_path=/none: there is no such folder; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP.",
  ),
  "an adapter without rank": (
    [*ADAPTER, "lora.lora_rank=0"],
    "lora.lora_rank=0 and lora.lora_alpha=16 make no adapter; set both above 0.",
  ),
  "an adapter in scanned layers": (
    [*ADAPTER, "scan_layers=true", "mudd_ffn_reallocation=false"],
    "lora.enable_lora=True with scan_layers=True: scanned layers with connections take no adapters; set "
    "scan_layers=False.",
  ),
  "an adapter of another family": (
    [*ADAPTER, "depth_connection=mhc", "mudd_expansion_rate=2", "mudd_ffn_reallocation=false"],
    "lora.enable_lora=True with depth_connection=mhc: models with connections of this family take no adapters; set "
    "lora.enable_lora=False.",
  ),
  "an adapter for DPO": (
    [*DPO, DATA, "lora.enable_lora=true"],
    "lora.enable_lora=True does not work with dpo: MaxText adds no adapters to the model there; set it to False.",
  ),
  "no teacher": (
    ["distill", runs.RUN_YML, "post_train/distill.yml", "dataset_type=synthetic"],
    "teacher_overrides has no load_parameters_path, so there is no teacher; write teacher_overrides: "
    "{load_parameters_path: OUTPUT/RUN/checkpoints/STEP, ...} in the model's file.",
  ),
  "a missing file": (
    [*SFT, "hf_train_files=/none.jsonl"],
    "hf_train_files=/none.jsonl: no such file; yaml/README.md says where data comes from.",
  ),
  "an empty file": (
    [*SFT, "hf_train_files=FOLDER/empty.jsonl"],
    "hf_train_files=FOLDER/empty.jsonl: the file holds no text; write it again.",
  ),
  "a column that is not there": (
    [*SFT, DATA, MODEL, "train_data_columns=[question,answer]"],
    "hf_train_files=FOLDER/chat.jsonl: the file has no column 'question'; it has messages.",
  ),
  "a column for evaluation that is not there": (
    [*SFT, DATA, MODEL, "eval_interval=1", "hf_eval_files=FOLDER/pairs.jsonl"],
    "hf_eval_files=FOLDER/pairs.jsonl: the file has no column 'messages'; it has prompt, chosen, rejected.",
  ),
  "a column of preferences that is not there": (
    [*DPO, PAIRS, MODEL, "train_data_columns=[prompt,chosen,worse]"],
    "hf_train_files=FOLDER/pairs.jsonl: the file has no column 'worse'; it has prompt, chosen, rejected.",
  ),
  "too few columns of preferences": (
    [*DPO, PAIRS, MODEL, "train_data_columns=[chosen]"],
    "train_data_columns=['chosen']: dpo reads [prompt,chosen,rejected], or [chosen,rejected] that begin with the same "
    "prompt; set it to columns with these contents.",
  ),
  "too few rows for evaluation": (
    [*DPO, PAIRS, MODEL, "eval_interval=1", "hf_eval_files=FOLDER/pairs.jsonl", "eval_per_device_batch_size=65"],
    "hf_eval_files=FOLDER/pairs.jsonl holds 64 row(s), which fill no batch of eval_per_device_batch_size=65 for each "
    "device; use a smaller batch, more data or, for training, a higher num_epoch.",
  ),
  "a template that cannot be parsed": (
    [*SFT, DATA, MODEL, "chat_template='{% for m in messages %}'"],
    "Specified chat_template is invalid: Unexpected end of template. Jinja was looking for the following tags: "
    "'endfor' or 'else'. The innermost block that needs to be closed is 'for'.",
  ),
  "a template that fails": (
    [*SFT, DATA, MODEL, "chat_template='{{ messages.no.role }}'"],
    "chat_template cannot be used (UndefinedError: 'list object' has no attribute 'no'); correct the template.",
  ),
  "another model": (
    [*SFT, DATA, MODEL, "base_emb_dim=64"],
    "FOLDER/model/items: decoder/decoder_norm/scale is [32], and this configuration needs [64]; name the keys that "
    "the model was trained with.",
  ),
  "another student": (
    ["distill", "FOLDER/student.yml", "post_train/distill.yml", MODEL, "base_emb_dim=64"],
    "FOLDER/model/items: decoder/decoder_norm/scale is [32], and this configuration needs [64]; name the keys that "
    "the model was trained with.",
  ),
  "no steps": ([*SFT, DATA, MODEL, "steps=0"], "steps=0 is not a number of steps to train for; set it to 1 or more."),
  "no steps of distillation": (
    ["distill", "FOLDER/student.yml", "post_train/distill.yml", "steps=0"],
    "steps=0 is not a number of steps to train for; set it to 1 or more.",
  ),
  "evaluation of distillation": (
    ["distill", "FOLDER/student.yml", "post_train/distill.yml", "eval_interval=2"],
    "eval_interval=2 does not work with distill: MaxText reads the evaluation data once, so later evaluations would "
    "find none; set it to -1, and run maxtext_mudd.evaluate on the checkpoints.",
  ),
  "adapters of connections": (
    [*ADAPTER, MODEL, r"lora.lora_module_path=decoder/layers_\d+/(connection/depth_aggregate|mlp/wi_0)"],
    r"lora.lora_module_path=decoder/layers_\d+/(connection/depth_aggregate|mlp/wi_0): "
    "decoder/layers_1/connection/depth_aggregate/a is a parameter of connections, which take no adapters in MaxText; "
    "write a pattern of other layers.",
  ),
  "adapters of no layer": (
    [*ADAPTER, MODEL, "lora.lora_module_path=decoder"],
    "lora.lora_module_path=decoder is the path of no layer that takes an adapter; write a pattern of paths such as "
    "decoder/layers_0/self_attention/query.",
  ),
  "no pattern": (
    [*ADAPTER, MODEL, "lora.lora_module_path=(mlp"],
    "lora.lora_module_path=(mlp is not a regular expression (missing ), unterminated subpattern at position 0); "
    "correct it.",
  ),
  "no adapter": (
    [*ADAPTER, MODEL, "lora.lora_restore_path=/none"],
    "lora.lora_restore_path=/none has no adapter; name a checkpoint of a run with lora.enable_lora=True.",
  ),
  "a model in place of an adapter": (
    [*ADAPTER, MODEL, "lora.lora_restore_path=FOLDER/model"],
    "lora.lora_restore_path=FOLDER/model has no adapter; name a checkpoint of a run with lora.enable_lora=True.",
  ),
  "an adapter of fewer layers": (
    RESTORED,
    "lora.lora_restore_path=FOLDER/adapter has no adapter of decoder/layers_0/mlp/wi_0/kernel; set "
    "lora.lora_module_path as it was in training.",
  ),
  "an adapter of another rank": (
    [*RESTORED, QUERY],
    "lora.lora_rank=8: FOLDER/adapter has an adapter of rank 3; set that.",
  ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_sentence_and_nothing_written(mistake, folder, tmp_path, monkeypatch, capsys):
  arguments, message = MISTAKES[mistake]
  arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
  if len(arguments) > 1:
    arguments += ["run_name=x", f"base_output_directory={tmp_path / 'out'}"]
  monkeypatch.setattr(sys, "argv", ["post_train.py", *arguments])
  try:
    with pytest.raises(SystemExit) as ended:
      post_train.run()
  finally:
    plugin.install(plugin.Reading())
  assert ended.value.code == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maxtext-mudd: ")]
  assert [line.replace(str(folder), "FOLDER") for line in lines] == [f"maxtext-mudd: {message}"]
  assert not (tmp_path / "out").exists()
