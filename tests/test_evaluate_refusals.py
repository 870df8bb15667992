"""`python3 -m maxtext_mudd.evaluate`: mistakes and interrupts end in one sentence, and nothing is written."""

import errno
import logging
import os
import pathlib
import signal
import sys
import time

import jax
from lm_eval.loggers import EvaluationTracker
import numpy as np
import pytest

from maxtext_mudd.evaluate import __main__ as evaluate
from maxtext_mudd.evaluate import harness as evaluation
from maxtext_mudd.inference import pretrained
from tests import models, runs
from tests.evaluation import CONTEXT, KEYS, TEXT, build, choice_task, generation_task, letters, metrics, task


@pytest.fixture(scope="module")
def lm():
  return build()


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
  monkeypatch.setattr(pretrained, "open_folder", lambda *_, **__: (lm.config, lambda: lm.model))
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
  for name in ("open_folder", "open_run"):
    monkeypatch.setattr(pretrained, name, lambda *_, **__: (bare, lambda: lm.model))
  text = ["--text", crowded / "many" / "tokenizer_config.json"]
  assert end_of(capsys, "--checkpoint", crowded, *text)[0] == (
    f"{crowded} has no tokenizer; name the one that the model was trained with by --tokenizer=PATH."
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

  monkeypatch.setattr(pretrained, "open_folder", lambda *_, **__: (lm.config, lambda: lm.model))
  monkeypatch.setattr(evaluation, "log_likelihoods", scores)
  if how == "swallowed at the end":
    save = EvaluationTracker.save_results_aggregated
    monkeypatch.setattr(EvaluationTracker, "save_results_aggregated", lambda *args: (save(*args), interrupt()))
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
  monkeypatch.setattr(pretrained, "open_folder", lambda *_, **__: (lm.config, lambda: lm.model))
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

  monkeypatch.setattr(pretrained, "open_folder", lambda *_, **__: (lm.config, lambda: lm.model))
  monkeypatch.setattr(evaluation, "log_likelihoods", exhausted)
  ended, _ = end_of(capsys, "--checkpoint", crowded, "--include-dir", crowded, "--tasks", "choice")
  assert ended.startswith("--batch-size=8 does not fit the device; use a smaller one (")


@pytest.mark.parametrize("of_run", [False, True], ids=["published", "of a run"])
def test_meshes_that_do_not_fit(of_run, crowded, tmp_path, capsys):
  """Said before any parameter is read: the run's folder has none."""
  text, output = tmp_path / "text.txt", tmp_path / "results.json"
  text.write_text(TEXT)
  model = [crowded / "run", runs.RUN_YML] if of_run else [models.DATA / "muddformer_tiny"]
  ended, _ = end_of(capsys, "--checkpoint", *model, "--text", text, "--output", output, "ici_tensor_parallelism=3")
  assert ended.startswith("ici_tensor_parallelism=3: the product 3 of the mesh ")
  assert not output.exists()


def test_without_the_harness(monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  ended, _ = end_of(capsys, "--checkpoint", tmp_path, "--tasks", "sciq")
  assert ended == "lm_eval is not installed; install it by `pip install lm_eval==0.4.13`."
