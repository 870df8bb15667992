"""The texts that the launchers print for `--help` and `--list`, without importing JAX or MaxText."""

from collections.abc import Mapping, Sequence
import importlib.util
import itertools
import pathlib
import re
import textwrap

from maxtext_mudd import assets
from maxtext_mudd.config import files as config_files

_RUN_KEYS = {
  "run_name": "name of the run's folder; an existing run of this name is resumed",
  "base_output_directory": "folder of all runs, local or gs://",
}
_BATCH_KEYS = {
  "per_device_batch_size": "sequences per step on each device; 0.5: one on two devices",
  "max_target_length": "tokens in a sequence",
}
_DATA_KEYS = {
  "dataset_type": "grain, hf, tfds or synthetic",
  "grain_train_files": "for grain: Parquet files, or a pair of Megatron files (grain_file_type=mmap)",
  "hf_path": "for hf: text, json, csv or parquet for local files, or a data set's name",
  "hf_train_files": "for hf: files, or a quoted pattern",
  "tokenizer_path": "folder or name of a tokenizer; maxtext_mudd/byte works offline",
}
_DEVICE_KEYS = {
  "hardware": "tpu, gpu or cpu; a CPU also needs skip_jax_distributed_system=true",
}
# For each command: what it does, and its main keys with their meanings.
COMMANDS = {
  "train": (
    "Trains a model, or resumes its run.",
    _RUN_KEYS
    | {
      "steps": "number of steps of the run",
      "learning_rate": "peak of the learning rate",
      "checkpoint_period": "steps from one checkpoint to the next",
      "eval_interval": "steps from one evaluation to the next; -1: none",
      "load_parameters_path": "checkpoint whose parameters a new run starts from",
    }
    | _BATCH_KEYS
    | _DATA_KEYS
    | _DEVICE_KEYS,
  ),
  "train_compile": (
    "Compiles the train step of a model for TPUs that this machine does not have.",
    {
      "compile_topology": "what to compile for, such as v5p-8",
      "compile_topology_num_slices": "number of slices",
      "remat_policy": "what the backward pass recomputes: full, minimal, ...",
      "scan_layers": "true: compile one layer and scan over all",
    }
    | _BATCH_KEYS,
  ),
  "decode": (
    "Continues a prompt.",
    {
      "load_parameters_path": "checkpoint: OUTPUT/RUN/checkpoints/STEP, or what `convert` wrote",
      "prompt": "the text to continue",
      "max_prefill_predict_length": "largest number of tokens of the prompt",
      "max_target_length": "number of tokens of prompt and continuation",
      "decode_sampling_strategy": "greedy, weighted, nucleus, topk or composite",
      "tokenizer_path": "folder or name of the model's tokenizer",
    }
    | _DEVICE_KEYS,
  ),
}
_POST_TRAINING_KEYS = (
  {"load_parameters_path": "checkpoint of the model to start from: OUTPUT/RUN/checkpoints/STEP, or M/items"}
  | _RUN_KEYS
  | {
    "steps": "number of steps of the run",
    "learning_rate": "peak of the learning rate",
    "hf_train_files": "the data: JSON lines, or a quoted pattern of such files",
    "train_data_columns": "columns of the data",
    "tokenizer_path": "folder or name of the model's tokenizer",
  }
  | _BATCH_KEYS
  | _DEVICE_KEYS
)
COMMANDS |= {
  "post_train sft": (
    "Trains a model on conversations, or an adapter of it (LoRA). post_train/sft.yml sets the keys for JSON lines.",
    _POST_TRAINING_KEYS
    | {
      "chat_template": "Jinja template that makes a text of a conversation",
      "sft_train_on_completion_only": "true: only answers have a loss",
      "lora.enable_lora": "true: train an adapter; post_train/lora.yml sets the keys",
    },
  ),
  "post_train dpo": (
    "Trains a model on pairs of a chosen and a rejected answer. post_train/dpo.yml sets the keys for JSON lines.",
    _POST_TRAINING_KEYS | {"dpo.dpo_beta": "weight of the distance to the model at the start"},
  ),
  "post_train distill": (
    "Trains a model on the predictions of another. post_train/distill.yml sets the keys.",
    _POST_TRAINING_KEYS
    | {
      "teacher_overrides": "keys of the teacher, with its load_parameters_path",
      "distill_alpha": "weight of the teacher's predictions in the loss",
    },
  ),
}


def answer(command: str, arguments: Sequence[str]) -> str:
  """The text that a command prints instead of running; empty if the arguments contain neither --help nor --list.

  Args:
    command: a key of `COMMANDS`.
    arguments: the arguments of the command line, without the program.
  """
  if {"-h", "--help"} & set(arguments):
    return _help(command, *COMMANDS[command])
  return listing() if "--list" in arguments else ""


def listing() -> str:
  """The configuration files of this package. Each line has a name and the first sentence of the file's comment."""
  names = config_files.packaged()
  width = max(map(len, names), default=0)
  return "\n".join(f"{name:<{width}}  {_first_sentence(assets.CONFIGURATIONS / name)}".rstrip() for name in names)


def _first_sentence(file: pathlib.Path) -> str:
  """The first sentence of the comment that a file begins with."""
  lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
  comment = " ".join(line.removeprefix("#").strip() for line in lines)
  return re.match(r"(.*?(?<!Fig)\.(?= |$)|.*)", comment)[0]


def _help(command: str, purpose: str, keys: Mapping[str, str]) -> str:
  width = max(map(len, keys)) + 1
  rows = [f"  {key + '=':<{width}}  {meaning}" for key, meaning in keys.items()]
  maxtext = importlib.util.find_spec("maxtext")
  stock = pathlib.Path(maxtext.origin).parent / "configs" / "base.yml" if maxtext else "base.yml of MaxText"
  default_files = textwrap.dedent(f"""
    All keys, with their defaults:
      mudd_*    {assets.CONFIGURATIONS / "mudd_base.yml"}
      MaxText   {stock}
  """)
  usage = textwrap.dedent(f"""\
    usage: python3 -m maxtext_mudd.{command} MODEL.yml [FURTHER.yml ...] [key=value ...]

    {purpose}

      MODEL.yml    a path, or a file of this package: mudd_2p8b.yml, yaml/mudd_2p8b.yml
      FURTHER.yml  overrides keys of the model: data/pile.yml, data/local_text.yml, data/synthetic.yml
      key=value    overrides both
      --list       prints the files of this package
      --help       prints this text

    Main keys:
  """)
  return usage + "\n".join(rows) + "\n" + default_files.rstrip()
