"""`python3 -m maxtext_mudd.evaluate`: results of tasks, of texts, of folders and of runs."""

import json
import subprocess
import sys

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
import numpy as np
import pytest

import maxtext_mudd
from maxtext_mudd import assets, convert
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.evaluate import __main__ as evaluate
from maxtext_mudd.evaluate import harness as evaluation
from maxtext_mudd.inference import pretrained, tokens
from tests import models, runs
from tests.evaluation import (
  CHOICES,
  CONTEXT,
  TEXT,
  TOLERANCE,
  build,
  choice_task,
  direct,
  generation_task,
  last_word_task,
  letters,
  of_bytes,
  rolling,
  whole_text_task,
)


@pytest.fixture(scope="module")
def lm():
  return build()


@pytest.fixture
def run(lm, monkeypatch, tmp_path):
  """The command in this process, with the model at hand for any folder; its results."""
  monkeypatch.setattr(pretrained, "open_folder", lambda *_, **__: (lm.config, lambda: lm.model))

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
  assert results["last_word"]["acc,none"] == np.mean([x for _, x in scores])

  whole = rolling(lm, TEXT)
  both = whole + direct(lm, [1, *of_bytes(TEXT[:24])], 24)[0]
  expected = {
    ("last_word", "perplexity"): -np.mean([x for x, _ in scores]),
    ("whole_text", "word_perplexity"): -both / (9 + 5),
    ("whole_text", "byte_perplexity"): -both / (54 + 24),
    ("text", "perplexity"): -whole / 54,
  }
  for (name, metric), value in expected.items():
    np.testing.assert_allclose(np.log(results[name][f"{metric},none"]), value, rtol=TOLERANCE)
  check_bits_per_byte(results["text"])

  assert found["config"]["model_args"]["pretrained"] == str(tmp_path)
  assert found["n-samples"]["choice"] == {"original": 5, "effective": 5}
  assert {"configs", "versions", "n-shot", "higher_is_better", "git_hash", "date", "task_hashes"} <= found.keys()
  assert found["configs"]["text"]["metadata"]["tokens"] == 54
  said = capsys.readouterr().out
  assert all(f"|{name}" in said for name in (*names, "text"))
  assert f"{results['text']['perplexity,none']:.4f}" in said
  assert not list(tmp_path.glob(".*"))


def check_bits_per_byte(results) -> None:
  """Perplexities here are of bytes. The two differ by roundings of float64, 1.1e-16 each."""
  np.testing.assert_allclose(results["bits_per_byte,none"], np.log2(results["perplexity,none"]), rtol=1e-15)


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
  # All of the paper's are known, or the first that is not would be named; their data sets are not at hand.
  for names, message in (
    ("paper", "lambada_openai cannot be loaded; if its data set"),
    ("paper,piqa, mine", "mine is not a task; the nearest"),
  ):
    with pytest.raises(SystemExit):
      evaluate.main(["--checkpoint", str(tmp_path), "--tasks", names])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"maxtext-mudd: --tasks: {message}")


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
    np.testing.assert_allclose(np.log(results["perplexity,none"]), -total / 132, rtol=TOLERANCE)
    check_bits_per_byte(results)


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

  one = evaluated("1.json", runs.RUN_YML)
  assert one.returncode == 0, one.stderr[-4000:]
  four = "--xla_force_host_platform_device_count=4"
  many = evaluated("4.json", runs.RUN_YML, "ici_tensor_parallelism=2", XLA_FLAGS=four)
  assert many.returncode == 0, many.stderr[-4000:]
  found, sharded = (json.loads((tmp_path / name).read_text()) for name in ("1.json", "4.json"))
  assert found["results"].keys() == {"choice", "last_word", "go_on", "text"}
  assert [x["config"]["batch_size"] for x in (found, sharded)] == [3, 4]
  for name, values in found["results"].items():
    for metric, value in values.items():
      if isinstance(value, float):
        # Perplexities of words grow the rounding of their logarithms; the errors seen are up to 4.3e-7.
        np.testing.assert_allclose(sharded["results"][name][metric], value, rtol=4e-6)

  model, config = pretrained.from_run(str(checkpoint), runs.RUN_YML)
  lm = evaluation.MaxTextLM(model, config, tokens.Tokenizer(config))
  row = of_bytes(TEXT * 3)
  assert (len(row), lm.max_length) == (162, 64)
  total = direct(lm, [1, *row[:64]], 64)[0] + direct(lm, row[63:128], 64)[0] + direct(lm, row[97:162], 34)[0]
  np.testing.assert_allclose(np.log(found["results"]["text"]["perplexity,none"]), -total / 162, rtol=TOLERANCE)

  with pytest.raises(ConfigError, match=r"1/items: decoder/\S+ is \[32, 384\], and this configuration needs \[32, 256"):
    pretrained.from_run(str(checkpoint), runs.RUN_YML, base_num_decoder_layers=3)
  with pytest.raises(ConfigError, match=r"1 is a checkpoint without the keys of its model; name the folder that has"):
    maxtext_mudd.from_pretrained(checkpoint)
