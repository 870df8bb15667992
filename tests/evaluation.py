"""A small model of bytes to evaluate, its scores from its logits, and tasks in files."""

import json
import pathlib

from lm_eval.api.instance import Instance
import numpy as np
import tokenizers
import transformers

import maxtext_mudd
from maxtext_mudd import assets
from maxtext_mudd.evaluate import harness as evaluation
from maxtext_mudd.inference import tokens
from tests import models

CONTEXT = 24
BYTES = {"tokenizer_type": "huggingface", "tokenizer_path": assets.BYTE_TOKENIZER, "vocab_size": 264}
KEYS = {"mudd": True, "base_num_decoder_layers": 2, "max_target_length": CONTEXT, "add_bos": True, **BYTES}
TOLERANCE = 2e-6  # of log-likelihoods, relative: float32 sums over tokens; the errors seen are 2e-7 to 4.7e-7


def build(**overrides):
  config = models.config(**KEYS | overrides)
  model = models.build(config)
  models.randomise(model)
  return evaluation.MaxTextLM(model, config, tokens.Tokenizer(config), batch_size=3)


def direct(lm, row, number: int) -> tuple[float, bool]:
  """Of the last tokens of a row, from the logits of the row alone, in float64."""
  row = np.asarray(row)
  logits = np.asarray(maxtext_mudd.logits(lm.model, row[None, :-1]))[0].astype(np.float64)
  peak = logits.max(-1, keepdims=True)
  scores = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
  chosen = scores[np.arange(len(row) - 1), row[1:]][-number:]
  return chosen.sum(), bool((scores.argmax(-1) == row[1:])[-number:].all())


def of_bytes(text: str) -> list[int]:
  return [byte + 3 for byte in text.encode()]  # after <pad>, <bos>, <eos>


def instances(kind: str, *arguments) -> list[Instance]:
  return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


TEXT = "Sphinx of black quartz, judge my vow: naïve façades."  # some letters are two bytes


def rolling(lm, text: str) -> float:
  """Each token once, after all that the context has room for."""
  row = of_bytes(text)
  total, _ = direct(lm, [1, *row[:CONTEXT]], CONTEXT)
  for end in range(CONTEXT, len(row), CONTEXT):
    number = min(CONTEXT, len(row) - end)
    end += number
    total += direct(lm, row[end - CONTEXT - 1 : end], number)[0]
  return total


def task(folder: pathlib.Path, name: str, documents: list[dict], shown: list[dict] | None = None, **keys) -> str:
  """A task file with its data."""
  files = {}
  for split, rows in (("test", documents), ("train", shown)):
    if rows:
      files[split] = str(folder / f"{name}-{split}.jsonl")
      pathlib.Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
  data = {"data_files": files, "cache_dir": f"{folder}-cache"}
  fixed = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
  few = {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}} if shown else {}
  (folder / f"{name}.yaml").write_text(json.dumps(fixed | few | keys))
  return name


def metrics(**aggregations: str) -> list[dict]:
  return [{"metric": name, "aggregation": x, "higher_is_better": name == "acc"} for name, x in aggregations.items()]


CHOICES = [
  {"question": question, "choices": ["drift", "crumb", "plank"], "gold": number % 3}
  for number, question in enumerate(("ab", "xy", "mn", "go", "no"))
]
SHOWN = [{"question": "frenzied", "choices": ["spoon", "crumb", "plank"], "gold": 1}]


def choice_task(folder: pathlib.Path) -> str:
  return task(
    folder,
    "choice",
    CHOICES,
    SHOWN,
    output_type="multiple_choice",
    doc_to_text="{{question}}",
    doc_to_choice="choices",
    doc_to_target="gold",
    metric_list=metrics(acc="mean"),
  )


def last_word_task(folder: pathlib.Path) -> str:
  return task(
    folder,
    "last_word",
    [{"text": x} for x in ("ab words", "of moons", "no swans")],
    output_type="loglikelihood",
    doc_to_text="{{text[:2]}}",
    doc_to_target="{{text[2:]}}",
    metric_list=metrics(perplexity="perplexity", acc="mean"),
  )


def whole_text_task(folder: pathlib.Path) -> str:
  return task(
    folder,
    "whole_text",
    [{"text": TEXT}, {"text": TEXT[:24]}],
    output_type="loglikelihood_rolling",
    doc_to_text="",
    doc_to_target="{{text}}",
    metric_list=metrics(word_perplexity="weighted_perplexity", byte_perplexity="weighted_perplexity"),
  )


def generation_task(folder: pathlib.Path, name="go_on", **kwargs) -> str:
  return task(
    folder,
    name,
    [{"text": x} for x in ("ab", "of moons and of lanterns of paper", "no swans")],
    output_type="generate_until",
    doc_to_text="{{text}}",
    doc_to_target="{{text}}",
    generation_kwargs={"max_gen_toks": 6, "until": ["\n\n"], **kwargs},
    metric_list=metrics(exact_match="mean"),
  )


def letters(folder: pathlib.Path, number: int = 96) -> pathlib.Path:
  """A tokenizer of so many characters, without BOS of its own, and five tokens more."""
  names = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 32 + number - 4))]
  model = tokenizers.models.BPE({x: i for i, x in enumerate(names)}, [], unk_token="<unk>")
  made = tokenizers.Tokenizer(model)
  made.decoder = tokenizers.decoders.Fuse()
  transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(folder)
  return folder
