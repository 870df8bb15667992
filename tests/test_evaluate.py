"""Evaluation: the harness's figures are those of the model's logits, and mistakes end in one sentence."""

import errno
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

from flax import nnx
import jax
import jax.numpy as jnp
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
import numpy as np
import pytest
import tokenizers
import transformers

import maxtext_mudd
from maxtext_mudd import assets, convert
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.evaluate import __main__ as evaluate
from maxtext_mudd.evaluate import harness as evaluation
from maxtext_mudd.evaluate import request, results_file
from maxtext_mudd.inference import forward, pretrained, tokens
from tests import models, runs
from tests.test_blocks import MOE

CONTEXT = 24
BYTES = {"tokenizer_type": "huggingface", "tokenizer_path": assets.BYTE_TOKENIZER, "vocab_size": 264}
KEYS = {"mudd": True, "base_num_decoder_layers": 2, "max_target_length": CONTEXT, "add_bos": True, **BYTES}
TOLERANCE = 1e-5


def build(**overrides):
  config = models.config(**KEYS | overrides)
  model = models.build(config)
  models.randomise(model)
  return evaluation.MaxTextLM(model, config, tokens.Tokenizer(config), batch_size=3)


@pytest.fixture(scope="module")
def lm():
  return build()


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


def check(found, expected) -> None:
  np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=TOLERANCE, atol=TOLERANCE)
  assert [x for _, x in found] == [x for _, x in expected]


def check_log_likelihoods(lm) -> None:
  pairs = (
    ("abcdef", "gh"),
    ("x" * 30 + "bcdef", "ghi"),  # too long: its beginning is lost
    ("", "ghijklmn"),  # after BOS
    ("ab ", "cdefg"),  # the harness moves the space to the target
    ("q" * 20, "rstu"),  # fits with BOS
  )
  numbers = (2, 3, 8, 6, 4)
  found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
  rows = [[1, *of_bytes(context + target)][-(CONTEXT + 1) :] for context, target in pairs]
  assert sorted(map(len, rows)) == [9, 9, 9, 25, 25]
  check(found, [direct(lm, row, number) for row, number in zip(rows, numbers)])
  assert not any(greedy for _, greedy in found)

  # Two tokens, each the most probable one; then one of them alone is.
  best, second = [*rows[0][:-2], 0, 0], rows[0][:-2]
  best[-2] = most_probable(lm, best, -2)
  best[-1] = most_probable(lm, best, -1)
  second = [*second, (best[-2] + 1) % 264, 0]
  second[-1] = most_probable(lm, second, -1)
  requests = [(("", ""), row[:-2], row[-2:]) for row in (best, second, [*best[:-1], (best[-1] + 1) % 264])]
  found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
  check(found, [direct(lm, context + target, 2) for _, context, target in requests])
  assert [greedy for _, greedy in found] == [True, False, False]


def check_log_likelihoods_without_bos(lm) -> None:
  """A text begins after the prefix: also one whose context is white space, which the harness moves to the target."""
  pairs = (("\n", "abcdefg"), ("", "abcdefgh"), (" ", "x" * (CONTEXT - 1)), ("abcd", "efghi"))
  found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
  texts = [context + target for context, target in pairs]
  rows = [[1, *of_bytes(text)] for text in texts[:3]] + [of_bytes(texts[3])]
  check(found, [direct(lm, row, number) for row, number in zip(rows, (8, 8, CONTEXT, 5))])


def most_probable(lm, row, place: int) -> int:
  return int(np.asarray(maxtext_mudd.logits(lm.model, np.asarray(row)[None, :-1]))[0, place].argmax())


def test_log_likelihoods(lm):
  check_log_likelihoods(lm)


def test_log_likelihoods_without_bos(lm):
  config = models.config(**KEYS | {"add_bos": False})
  check_log_likelihoods_without_bos(evaluation.MaxTextLM(lm.model, config, tokens.Tokenizer(config), batch_size=3))


@pytest.mark.slow
def test_log_likelihoods_scanned():
  check_log_likelihoods(build(scan_layers=True))


@pytest.mark.slow
def test_log_likelihoods_of_experts():
  """The model stays as it is, with what its layers sow, and is traced once for each function and length."""
  lm = build(decoder_block="mixtral", **MOE)
  before, traces, ones = jax.tree.structure(nnx.state(lm.model)), [], np.ones((3, 16), np.int32)
  with pytest.MonkeyPatch.context() as patch:
    call = type(lm.model).__call__
    patch.setattr(type(lm.model), "__call__", lambda *args, **keys: traces.append(0) or call(*args, **keys))
    for _ in range(2):
      evaluation.log_likelihoods(lm.model, ones, ones, ones)
      maxtext_mudd.logits(lm.model, ones)
  assert len(traces) == 2
  assert not jax.tree.leaves(nnx.state(lm.model, nnx.Intermediate))
  assert jax.tree.structure(nnx.state(lm.model)) == before
  check_log_likelihoods(lm)


def test_models_stay_as_they_are():
  """Those that sow are not written to, and not traced again; what is set from outside is seen."""

  class Sowing(nnx.Module):
    def __init__(self, mesh, config):
      self.scale, self.mesh, self.config = nnx.Param(jnp.full((), 3.0)), mesh, config

    def __call__(self, x):
      self.sow(nnx.Intermediate, "seen", x)
      return x * self.scale

  traces = []

  @forward.pure
  def twice(model, x):
    traces.append(0)
    return 2 * model(x)

  config = models.config(**KEYS)
  model = Sowing(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), config)
  assert [float(twice(model, jnp.float32(x))) for x in (1, 2)] == [6, 12]
  model.scale.set_value(jnp.full((), 5.0))
  assert float(twice(model, jnp.float32(1))) == 10
  assert len(traces) == 1
  assert set(nnx.state(model)) == {"scale"}


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


def test_whole_texts(lm):
  assert len(of_bytes(TEXT)) == 54  # two windows, and six tokens of a third
  found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (TEXT,), (TEXT[:24],), ("",)), disable_tqdm=True)
  expected = [rolling(lm, TEXT), direct(lm, [1, *of_bytes(TEXT[:24])], 24)[0], 0]
  np.testing.assert_allclose(found, expected, rtol=TOLERANCE)


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


@pytest.fixture
def run(lm, monkeypatch, tmp_path):
  """The command in this process, with the model at hand for any folder; its results."""
  monkeypatch.setattr(pretrained, "from_pretrained", lambda *_, **__: (lm.model, lm.config))

  def main(*arguments: str):
    output = tmp_path / "results.json"
    fixed = ["--checkpoint", str(tmp_path), "--include-dir", str(tmp_path), "--output", str(output)]
    evaluate.main([*fixed, "--batch-size", "3", *arguments])
    results = json.loads(output.read_text())
    output.unlink()
    return results

  return main


def test_tasks(run, lm, tmp_path, capsys):
  """All kinds at once that score; what is written is what the harness writes, and what is printed its table."""
  names = [make(tmp_path) for make in (choice_task, last_word_task, whole_text_task)]
  (tmp_path / "text.txt").write_text(TEXT)
  found = run("--tasks", ",".join(names), "--text", str(tmp_path / "text.txt"))
  results = found["results"]

  right = [picked(lm, [1, *of_bytes(f"{x['question']} ")], x) for x in CHOICES]
  assert results["choice"]["acc,none"] == np.mean(right)

  scores = [direct(lm, [1, *of_bytes(x)], 6) for x in ("ab words", "of moons", "no swans")]
  np.testing.assert_allclose(
    results["last_word"]["perplexity,none"], np.exp(-np.mean([x for x, _ in scores])), rtol=10 * TOLERANCE
  )
  assert results["last_word"]["acc,none"] == np.mean([x for _, x in scores])

  whole = rolling(lm, TEXT)
  both = whole + direct(lm, [1, *of_bytes(TEXT[:24])], 24)[0]
  expected = {
    "whole_text": {"word_perplexity": np.exp(-both / (9 + 5)), "byte_perplexity": np.exp(-both / (54 + 24))},
    "text": {"perplexity": np.exp(-whole / 54), "bits_per_byte": -whole / 54 / np.log(2)},
  }
  for name, values in expected.items():
    for metric, value in values.items():
      np.testing.assert_allclose(results[name][f"{metric},none"], value, rtol=10 * TOLERANCE)

  assert found["config"]["model_args"]["pretrained"] == str(tmp_path)
  assert found["n-samples"]["choice"] == {"original": 5, "effective": 5}
  assert {"configs", "versions", "n-shot", "higher_is_better", "git_hash", "date", "task_hashes"} <= found.keys()
  assert found["configs"]["text"]["metadata"]["tokens"] == 54
  said = capsys.readouterr().out
  assert all(f"|{name}" in said for name in (*names, "text"))
  assert f"{results['text']['perplexity,none']:.4f}" in said
  assert not list(tmp_path.glob(".*"))


def picked(lm, context: list[int], document: dict) -> bool:
  """Whether the choice with the greatest log-likelihood is the right one."""
  scores = [direct(lm, [*context, *of_bytes(choice)][-(CONTEXT + 1) :], 6)[0] for choice in document["choices"]]
  return int(np.argmax(scores)) == document["gold"]


def test_few_shot(run, lm, tmp_path):
  """One solved example before each question, and two documents of the five."""
  found = run("--tasks", choice_task(tmp_path), "--num-fewshot", "1", "--limit", "2")
  example = of_bytes("frenzied crumb\n\n")
  right = [picked(lm, [1, *example, *of_bytes(f"{x['question']} ")], x) for x in CHOICES[:2]]
  assert found["results"]["choice"]["acc,none"] == np.mean(right)
  assert found["n-shot"] == {"choice": 1}
  assert found["n-samples"]["choice"]["effective"] == 2


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    ({"do_sample": True, "top_k": 5000}, "top_k=5000 is not from 1 to vocab_size=264."),
    ({"temperature": 1, "top_k": -1}, "top_k=-1 is not from 1 to vocab_size=264."),
    ({"do_sample": True, "top_k": 2.5}, "top_k=2.5 is not a whole number."),
    ({"do_sample": True, "top_p": 1.5}, "top_p=1.5 is not above 0, and 1 at most."),
    ({"do_sample": True, "top_p": 0.0}, "top_p=0.0 is not above 0, and 1 at most."),
    (
      {"temperature": -1},
      "temperature=-1.0 is not a finite number of 0 or more; 0 takes the most probable token each time.",
    ),
    ({"temperature": "hot"}, "temperature='hot' is not a number."),
    ({"temperature": "nan"}, "temperature='nan' is not a number."),
    ({"max_new_tokens": "all"}, "max_new_tokens='all' is not a whole number."),
    ({"max_tokens": 0}, "max_gen_toks=0 leaves no room for a prompt, or asks for no tokens; "),
    ({"do_sample": "false"}, "do_sample='false' is neither true nor false."),
    ({"until": ["\n", 5]}, "until=['\\n', 5] is not a text, nor a list of texts."),
    (
      {"temperature": 0.7, "top_k": 8, "top_p": 0.9},
      "top_p=0.9 with temperature=0.7: MaxText applies top_p before the temperature, and task files mean after it; "
      "set temperature=1, or leave top_p out.",
    ),
  ],
)
def test_generations_that_cannot_be(lm, asked, message):
  with pytest.raises(ConfigError) as error:
    lm.check_generation({"max_gen_toks": 6} | asked if "max" not in str(asked) else asked)
  assert str(error.value).startswith(f"generation_kwargs: {message}")


def test_generations_that_can_be(lm):
  """Numbers as YAML gives them, and what is not set."""
  for asked in (
    {},
    {"temperature": "1e0", "top_p": "9e-1", "top_k": None},
    {"temperature": 0.7, "top_k": 264, "top_p": 1.0},
    {"do_sample": False, "temperature": 0.0, "top_k": None, "top_p": 1.0, "until": "x"},
    {"do_sample": True, "top_k": 1, "top_p": 0.5},
  ):
    lm.check_generation({"max_gen_toks": 6} | asked)


@pytest.mark.slow
def test_generation(lm):
  """Up to a stop sequence, EOS or the number; by batches of one kind, in the order of the requests."""
  contexts = ("ab", "of moons and of lanterns of paper", "no swans", "")
  greedy = {"max_gen_toks": 6, "until": []}
  whole = lm.generate_until(instances("generate_until", *((x, greedy) for x in contexts)), disable_tqdm=True)
  for context, text in zip(contexts, whole):
    prompt = [1, *of_bytes(context)][-(CONTEXT - 6) :]
    row = maxtext_mudd.generate(lm.model, lm.config, [prompt], 6)[0, len(prompt) :].tolist()
    assert text == lm.text_tokenizer.decode(row[: row.index(2)] if 2 in row else row)
  assert len(set(whole)) > 1

  cut = {"max_gen_toks": 6, "until": [whole[2][1]]}
  drawn = {"max_gen_toks": 6, "do_sample": True, "temperature": 9.0}
  found = lm.generate_until(
    instances("generate_until", ("no swans", cut), ("ab", greedy), ("ab", drawn)), disable_tqdm=True
  )
  assert found[:2] == [whole[2].split(whole[2][1])[0], whole[0]]
  assert found[2] != whole[0]
  for keys in ({"top_k": 1}, {"top_p": 1e-6, "temperature": 1}, {"top_k": 1, "top_p": 0.5, "temperature": 1}):
    assert lm.generate_until(instances("generate_until", ("ab", drawn | keys)), disable_tqdm=True) == [whole[0]]


def test_race_of_middle_schools(tmp_path):
  """Questions of one article go together, the last one is asked, as in the harness's `race`."""
  rows = [
    {"article": "A cat.", "question": "Who sat?", "options": ["cat", "dog", "ox", "emu"], "answer": "A"},
    {"article": "A dog.", "question": "Who ran?", "options": ["ant", "dog", "ox", "emu"], "answer": "B"},
    {"article": "A cat.", "question": "It is a  _  .", "options": ["b", "c", "cat", "d"], "answer": "C"},
    {"article": "A cat.", "question": "Which?", "options": ["w", "x", "y", "z"], "answer": "D"},
  ]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  keys = load_yaml(assets.TASKS / "race_middle.yaml")
  local = {
    "dataset_path": "json",
    "dataset_name": None,
    "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/rows.jsonl"}, "cache_dir": f"{tmp_path}/cache"},
  }
  race = ConfigurableTask(config=keys | local)
  documents = list(race.test_docs())
  assert [race.doc_to_text(x) for x in documents] == [
    "Article: A cat.\n\nQuestion: Who sat?\nAnswer: cat\nIt is a cat\nWhich?",
    "Article: A dog.\n\nWho ran?",
  ]
  assert [race.doc_to_target(x) for x in documents] == [3, 1]
  assert race.doc_to_choice(documents[1]) == ["ant", "dog", "ox", "emu"]


def letters(folder: pathlib.Path, number: int = 96) -> pathlib.Path:
  """A tokenizer of so many characters, without BOS of its own, and five tokens more."""
  names = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 32 + number - 4))]
  model = tokenizers.models.BPE({x: i for i, x in enumerate(names)}, [], unk_token="<unk>")
  made = tokenizers.Tokenizer(model)
  made.decoder = tokenizers.decoders.Fuse()
  transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(folder)
  return folder


def test_tokenizers(tmp_path):
  """BOS is where a text begins and the model saw one; a text without one begins after EOS."""
  config = models.config(**KEYS)
  words = tokens.Tokenizer(config)
  assert words.encode("ab", bos=True) == [1, *of_bytes("ab")]
  assert words.encode("ab", bos=False) == of_bytes("ab")
  assert (words.prefix_id, words.eos_id, words.add_bos) == (1, 2, True)
  assert words.decode(of_bytes("naïve")) == "naïve"
  words = tokens.Tokenizer(config, str(letters(tmp_path / "letters")))
  assert words.encode(" a", bos=words.add_bos) == [4, 69]
  assert (words.prefix_id, words.bos_id, words.eos_id) == (1, None, 1)


REFUSED = {
  "nothing": (
    [],
    "there is nothing to evaluate on; name tasks, such as --tasks lambada_openai,piqa or --tasks paper, or a --text.",
  ),
  "no checkpoint": (
    ["--checkpoint", "{tmp}/none", "--tasks", "choice"],
    "--checkpoint={tmp}/none is not a folder; name one that holds a model.",
  ),
  "a checkpoint that cannot be looked up": (
    ["--checkpoint", "{tmp}/" + "n" * 300, "--tasks", "choice"],
    "{tmp}/" + "n" * 300 + " cannot be reached: file name too long; name one that can.",
  ),
  "a distant checkpoint": (
    ["--checkpoint", "gs://a/b", "--tasks", "choice"],
    "gs://a/b is not a local folder; copy it first.",
  ),
  "a checkpoint of a run": (
    ["--checkpoint", "{tmp}/run", "--tasks", "choice"],
    "--checkpoint={tmp}/run is a checkpoint of a run; also name the CONFIG.yml that the run was started with.",
  ),
  "no text": (
    ["--text", "{tmp}/none"],
    "--text={tmp}/none cannot be read (No such file or directory); name a text file.",
  ),
  "an empty text": (["--text", "{tmp}/empty"], "--text={tmp}/empty is empty; name a file with a text."),
  "no UTF-8": (["--text", "{tmp}/latin"], "--text={tmp}/latin is not UTF-8 at byte 2; convert it."),
  "an output that exists": (
    ["--tasks", "choice", "--output", "{tmp}/empty"],
    "--output={tmp}/empty exists already; name a file that does not.",
  ),
  "an output nowhere": (
    ["--tasks", "choice", "--output", "{tmp}/none/x.json"],
    "--output={tmp}/none/x.json: there is no folder {tmp}/none; make it first.",
  ),
  "no task folder": (
    ["--tasks", "choice", "--include-dir", "{tmp}/none"],
    "--include-dir={tmp}/none is not a folder; name one with task files.",
  ),
  "fewer than none": (
    ["--tasks", "choice", "--num-fewshot", "-1"],
    "--num-fewshot=-1 is not a whole number of 0 or more.",
  ),
  "half a row": (["--tasks", "choice", "--batch-size", "0.5"], "--batch-size=0.5 is not a whole number of 1 or more."),
  "no documents": (
    ["--tasks", "choice", "--limit", "0"],
    "--limit=0 leaves no documents; set it to a number of documents, or a share below 1.",
  ),
  "no limit": (["--tasks", "choice", "--limit", "nan"], "--limit=nan is not a number of 0 or more."),
  "half a document": (
    ["--tasks", "choice", "--limit", "2.9"],
    "--limit=2.9 is neither a whole number of documents, nor a share below 1.",
  ),
  "an output that cannot be written": (  # not even by root, who may do all where there are permissions alone
    ["--tasks", "choice", "--output", "/proc/results.json"],
    "--output=/proc/results.json cannot be written (",
  ),
  "a configuration beside a model's own": (
    ["--checkpoint", "{tmp}/own", "--tasks", "choice", "a.yml"],
    "a.yml: --checkpoint={tmp}/own has a model.yml, which describes its model; leave a.yml out.",
  ),
  "no key": (
    ["--tasks", "choice", "scan"],
    "scan is not key=value, nor a configuration file, which ends in .yml.",
  ),
  "two files": (
    ["--tasks", "choice", "a.yml", "b.yml"],
    "b.yml is a second configuration file; one, a.yml, describes the checkpoint.",
  ),
  "a data set far away": (
    ["--tasks", "far"],
    "--tasks: far cannot be loaded; if its data set cannot be downloaded, unset HF_HUB_OFFLINE, or copy it to the "
    "cache of Hugging Face (",
  ),
  "more examples than there are": (
    ["--tasks", "choice", "--num-fewshot", "2"],
    "--tasks: the questions of a task cannot be made (",
  ),
  "a target longer than the context": (
    ["--tasks", "long"],
    "the target 'yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy' has 50 tokens; it can have from 1 to max_target_length=24.",
  ),
  "more new tokens than the context": (
    ["--tasks", "choice,endless"],
    "--tasks: endless: generation_kwargs: max_gen_toks=24 leaves no room for a prompt, or asks for no tokens; set it "
    "from 1 to 23, for max_target_length=24.",
  ),
  "beams": (
    ["--tasks", "choice,beams"],  # before the choices are scored
    "--tasks: beams: generation_kwargs: num_beams=4 is not known; the known keys are do_sample, max_gen_toks, "
    "temperature, top_k, top_p, until.",
  ),
  "a tokenizer with more tokens": (
    ["--tasks", "choice", "--tokenizer", "{tmp}/many"],
    "tokenizer_path={tmp}/many has 300 tokens, and the model has vocab_size=264; name the tokenizer that the model was "
    "trained with.",
  ),
  "no tokenizer": (
    ["--tasks", "choice", "--tokenizer", "{tmp}/run"],
    "tokenizer_path={tmp}/run cannot be read as a tokenizer of huggingface; name another (",
  ),
}


@pytest.fixture(scope="module")
def crowded(tmp_path_factory) -> pathlib.Path:
  """A folder with tasks, and all kinds of what cannot be read."""
  folder = tmp_path_factory.mktemp("crowded")
  choice_task(folder)
  rows = [{"text": "y" * 50}]
  scored = {"doc_to_text": "x", "doc_to_target": "{{text}}", "metric_list": metrics(acc="mean")}
  task(folder, "long", rows, output_type="loglikelihood", **scored)
  task(folder, "far", rows, output_type="loglikelihood", **scored | {"dataset_path": "nobody/nothing"})
  generation_task(folder, "endless", max_gen_toks=CONTEXT)
  generation_task(folder, "beams", num_beams=4)
  (folder / "empty").write_text("")
  (folder / "latin").write_bytes("naïve".encode("latin-1"))
  (folder / "run").mkdir()
  (folder / "run" / "_CHECKPOINT_METADATA").write_text("{}")
  (folder / "own").mkdir()
  (folder / "own" / "model.yml").write_text("{}")
  letters(folder / "many", 300)
  return folder


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, crowded, lm, monkeypatch, capsys):
  monkeypatch.setattr(pretrained, "from_pretrained", lambda *_, **__: (lm.model, lm.config))
  monkeypatch.setattr(evaluation, "log_likelihoods", None)  # nothing is compiled before
  arguments, message = REFUSED[case]
  before = sorted(crowded.rglob("*"))
  fixed = ["--checkpoint", "{tmp}", "--include-dir", "{tmp}", "--output", "{tmp}/results.json"]
  with pytest.raises(SystemExit) as ended:
    evaluate.main([x.format(tmp=crowded) for x in (*fixed, *arguments)])
  assert ended.value.code == 2
  said = capsys.readouterr().err.splitlines()[-1]
  assert said.startswith("maxtext-mudd: " + message.format(tmp=crowded)), said
  assert sorted(crowded.rglob("*")) == before


def end_of(capsys, *arguments) -> tuple[str, str]:
  """The sentence that the command ends with, and what it printed."""
  with pytest.raises(SystemExit) as ended:
    evaluate.main([str(x) for x in arguments])
  assert ended.value.code == 2
  said = capsys.readouterr()
  return said.err.splitlines()[-1].removeprefix("maxtext-mudd: "), said.out


def test_models_without_tokenizers(crowded, lm, monkeypatch, capsys):
  """Where nobody named one, the sentence is not of MaxText's default."""
  bare = models.config(**KEYS | {"tokenizer_path": "", "tokenizer_type": "sentencepiece"})
  for name in ("from_pretrained", "from_run"):
    monkeypatch.setattr(pretrained, name, lambda *_, **__: (lm.model, bare))
  text = ["--text", crowded / "many" / "tokenizer_config.json"]
  assert end_of(capsys, "--checkpoint", crowded, *text)[0] == (
    f"--checkpoint={crowded} has no tokenizer; name the one that the model was trained with by --tokenizer=PATH."
  )
  assert end_of(capsys, "--checkpoint", crowded / "run", *text, "data/pile.yml")[0] == (
    "data/pile.yml names no tokenizer_path; name the tokenizer that the model was trained with by --tokenizer=PATH."
  )
  named = f"tokenizer_path={bare.tokenizer_path}"  # by the user
  assert end_of(capsys, "--checkpoint", crowded, *text, named)[0].startswith(
    f"{named} cannot be read as a tokenizer of "
  )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
  "how", ["", "swallowed", "swallowed in the last batch", "another error", "swallowed at the end"]
)
def test_interrupts(crowded, lm, monkeypatch, capsys, number, how):
  """Nothing is written after one, also where a library swallows it; nor is anything computed that need not be."""
  batches, size = [], 3 if how in ("", "swallowed", "another error") else 15

  def interrupt(*_):
    try:
      os.kill(os.getpid(), number)
      time.sleep(9)
    except KeyboardInterrupt:
      if not how:
        raise
      if how == "another error":
        raise ValueError("stopped") from None
    return True

  def scores(_, tokens, *__):
    batches.append(len(tokens))
    if how != "swallowed at the end":
      interrupt()
    return np.zeros(tokens.shape), np.zeros(tokens.shape, bool)

  monkeypatch.setattr(pretrained, "from_pretrained", lambda *_, **__: (lm.model, lm.config))
  monkeypatch.setattr(evaluation, "log_likelihoods", scores)
  if how == "swallowed at the end":
    monkeypatch.setattr(results_file, "_is_json", interrupt)
  before, handlers = sorted(crowded.rglob("*")), [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
  arguments = ["--checkpoint", crowded, "--include-dir", crowded, "--tasks", "choice", "--batch-size", size]
  ended, table = end_of(capsys, *arguments, "--output", crowded / "results.json")
  assert ended == "interrupted; no results were written."
  assert ("|choice" in table) == (how == "swallowed at the end")
  assert batches == [size]
  assert sorted(crowded.rglob("*")) == before
  assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_outputs_that_cannot_be_written(crowded, lm, monkeypatch, capsys):
  """On a full disk: the table is printed, the cause is told, and no part of a file is left."""

  def full(path, text, **_):
    if path.name == "results.json":  # the trial at the start
      return write(path, text)
    write(path, text[: len(text) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  write = pathlib.Path.write_text
  monkeypatch.setattr(pathlib.Path, "write_text", full)
  monkeypatch.setattr(pretrained, "from_pretrained", lambda *_, **__: (lm.model, lm.config))
  logging.disable(logging.NOTSET)  # the end of an earlier test
  before = sorted(crowded.rglob("*"))
  zeros = np.zeros((3, 16))
  monkeypatch.setattr(evaluation, "log_likelihoods", lambda *_: (zeros, zeros.astype(bool)))
  arguments = ["--checkpoint", crowded, "--include-dir", crowded, "--tasks", "choice", "--batch-size", 3]
  ended, table = end_of(capsys, *arguments, "--output", crowded / "made.json")
  assert ended == (
    f"--output={crowded}/made.json cannot be written (OSError(28, 'No space left on device')); name a file that "
    "can be written."
  )
  assert "|choice" in table
  assert sorted(crowded.rglob("*")) == before


def test_memory_that_runs_out(crowded, lm, monkeypatch, capsys):
  def exhausted(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.")

  monkeypatch.setattr(pretrained, "from_pretrained", lambda *_, **__: (lm.model, lm.config))
  monkeypatch.setattr(evaluation, "log_likelihoods", exhausted)
  with pytest.raises(SystemExit):
    evaluate.main(["--checkpoint", str(crowded), "--include-dir", str(crowded), "--tasks", "choice"])
  assert (
    capsys.readouterr()
    .err.splitlines()[-1]
    .startswith("maxtext-mudd: --batch-size=8 does not fit the device; use a smaller one (")
  )


def test_meshes_that_do_not_fit(tmp_path, capsys):
  text = tmp_path / "text.txt"
  text.write_text(TEXT)
  with pytest.raises(SystemExit):
    evaluate.main(
      ["--checkpoint", str(models.DATA / "muddformer_tiny"), "--text", str(text), "ici_tensor_parallelism=3"]
    )
  assert "maxtext-mudd: ici_tensor_parallelism=3: the product 3" in capsys.readouterr().err.splitlines()[-1]


def test_without_the_harness(monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  with pytest.raises(SystemExit):
    evaluate.main(["--checkpoint", str(tmp_path), "--tasks", "sciq"])
  assert (
    capsys.readouterr().err.splitlines()[-1]
    == "maxtext-mudd: lm_eval is not installed; install it by `pip install lm_eval==0.4.13`."
  )


@pytest.mark.slow
def test_names(tmp_path, capsys):
  """A name that is none, groups that overlap, and the paper's eleven, of which the harness knows ten."""
  with pytest.raises(SystemExit):
    evaluate.main(["--checkpoint", str(tmp_path), "--tasks", "piqa,lambada_openia"])
  assert (
    capsys.readouterr()
    .err.splitlines()[-1]
    .startswith("maxtext-mudd: --tasks: lambada_openia is not a task; the nearest are lambada_openai")
  )
  choice_task(tmp_path)
  for name in ("one", "other"):
    (tmp_path / f"{name}.yaml").write_text(json.dumps({"group": name, "task": ["choice"]}))
  with pytest.raises(SystemExit):
    evaluate.main(["--checkpoint", str(tmp_path), "--include-dir", str(tmp_path), "--tasks", "one,other"])
  assert capsys.readouterr().err.splitlines()[-1] == (
    "maxtext-mudd: --tasks: these cannot be evaluated together (ValueError: Duplicate task 'choice': found in both "
    "'one' and 'other')."
  )
  manager = evaluate.task_manager(["paper"], None)
  assert len(request.PAPER_TASKS) == 11
  assert set(request.PAPER_TASKS) <= set(manager.all_subtasks)
  assert request.read_task_names("paper,piqa, mine") == [*request.PAPER_TASKS, "mine"]


@pytest.mark.slow
def test_folders(tmp_path, capsys):
  """A published folder, and what `convert` makes of it, scanned."""
  source, target = models.DATA / "muddformer_tiny", tmp_path / "maxtext"
  convert.main(["from-hf", "--hf-dir", str(source), "--maxtext-dir", str(target), "scan_layers=true"])
  words = letters(tmp_path / "letters")
  (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 3)
  found = []
  for number, folder in enumerate((source, target)):
    output = tmp_path / f"{number}.json"
    fixed = ["--text", str(tmp_path / "text.txt"), "--tokenizer", str(words), "--output", str(output)]
    evaluate.main(["--checkpoint", str(folder), *fixed])
    found.append(json.loads(output.read_text())["results"]["text"])
  model, config = maxtext_mudd.from_pretrained(source)
  lm = evaluation.MaxTextLM(model, config, tokens.Tokenizer(config, str(words)))
  row = lm.tok_encode((tmp_path / "text.txt").read_text())
  assert len(row) == 132 and lm.max_length == 64
  total = direct(lm, [1, *row[:64]], 64)[0] + direct(lm, row[63:128], 64)[0] + direct(lm, row[67:132], 4)[0]
  for results in found:
    np.testing.assert_allclose(results["perplexity,none"], np.exp(-total / 132), rtol=10 * TOLERANCE)
    np.testing.assert_allclose(results["bits_per_byte,none"], -total / 132 / np.log(2), rtol=10 * TOLERANCE)


@pytest.mark.slow
def test_the_command(tmp_path):
  """On a run's checkpoint: on one device, and on four, of which two share each layer; with keys of another model."""
  overrides = runs.build_corpus(tmp_path)
  runs.train(runs.LAUNCHER, runs.RUN_YML, tmp_path, "run", *overrides, "steps=2")
  (tmp_path / "text.txt").write_text(TEXT * 3)
  names = ",".join(make(tmp_path) for make in (choice_task, last_word_task, generation_task))
  checkpoint = tmp_path / "run" / "checkpoints" / "1"

  def evaluated(name, *arguments, **env):
    texts = ["--include-dir", str(tmp_path), "--tasks", names, "--text", str(tmp_path / "text.txt")]
    texts += ["--output", str(tmp_path / name), "--batch-size", "3"]
    return subprocess.run(
      [sys.executable, "-m", "maxtext_mudd.evaluate", "--checkpoint", str(checkpoint), *texts, *arguments],
      cwd=runs.ROOT,
      env=runs.environment(**env),
      capture_output=True,
      text=True,
    )

  four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  one = evaluated("1.json", runs.RUN_YML)
  assert one.returncode == 0, one.stderr[-4000:]
  many = evaluated("4.json", runs.RUN_YML, "ici_tensor_parallelism=2", **four)
  assert many.returncode == 0, many.stderr[-4000:]
  found, sharded = (json.loads((tmp_path / name).read_text()) for name in ("1.json", "4.json"))
  assert found["results"].keys() == {"choice", "last_word", "go_on", "text"}
  assert [x["config"]["batch_size"] for x in (found, sharded)] == [3, 4]
  for name, values in found["results"].items():
    for metric, value in values.items():
      if isinstance(value, float):
        np.testing.assert_allclose(sharded["results"][name][metric], value, rtol=10 * TOLERANCE)

  model, config = pretrained.from_run(str(checkpoint), runs.RUN_YML)
  lm = evaluation.MaxTextLM(model, config, tokens.Tokenizer(config))
  row = of_bytes(TEXT * 3)
  assert (len(row), lm.max_length) == (162, 64)
  total = direct(lm, [1, *row[:64]], 64)[0] + direct(lm, row[63:128], 64)[0] + direct(lm, row[97:162], 34)[0]
  np.testing.assert_allclose(found["results"]["text"]["perplexity,none"], np.exp(-total / 162), rtol=10 * TOLERANCE)

  with pytest.raises(ConfigError, match=r"1/items: decoder/\S+ is \[32, 384\], and this configuration needs \[32, 256"):
    pretrained.from_run(str(checkpoint), runs.RUN_YML, base_num_decoder_layers=3)
  with pytest.raises(ConfigError, match=r"1 is a checkpoint without the keys of its model; name the folder that has"):
    maxtext_mudd.from_pretrained(checkpoint)
  mesh = evaluated("mesh.json", runs.RUN_YML, "ici_tensor_parallelism=3", **four)
  assert mesh.returncode == 2
  assert mesh.stderr.splitlines()[-1].startswith(
    "maxtext-mudd: ici_tensor_parallelism=3: the product 3 of the mesh does"
  )
  assert not (tmp_path / "mesh.json").exists()
