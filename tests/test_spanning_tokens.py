"""Evaluation of questions of which one token spans the context and the answer."""

import logging

from lm_eval.api.instance import Instance
import numpy as np
import pytest
import tokenizers
import transformers

import maxtext_mudd
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.evaluate import harness as evaluation
from maxtext_mudd.inference import tokens
from tests import models

VOCABULARY = {token: number for number, token in enumerate(("<bos>", "a", "b", "c", "d", "bc", " ", " d", "cd"))}
MERGES = [("b", "c"), (" ", "d"), ("c", "d")]
RELATIVE = 5e-7  # of one float32 log-likelihood; the errors seen are up to 9.2e-8


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  words = tokenizers.Tokenizer(tokenizers.models.BPE(VOCABULARY, MERGES))
  words.decoder = tokenizers.decoders.Fuse()
  transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>").save_pretrained(folder)
  config = models.config(mudd=True, add_bos=True, tokenizer_type="huggingface", tokenizer_path=str(folder))
  model = models.build(config)
  models.randomise(model)
  return evaluation.MaxTextLM(model, config, tokens.Tokenizer(config), batch_size=2)


def direct(lm, row: str, number: int) -> float:
  """Log-probability of the last tokens of a row, which are named with a | between them."""
  ids = np.asarray([VOCABULARY[token] for token in row.split("|")])
  logits = np.asarray(maxtext_mudd.logits(lm.model, ids[None, :-1]))[0].astype(np.float64)
  scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return scores[np.arange(len(ids) - 1), ids[1:]][-number:].sum()


def scores(lm, *pairs) -> list[float]:
  requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
  return [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def test_an_answer_inside_a_token_of_the_context(lm, caplog):
  """The answer is encoded alone, and the other questions are answered as before."""
  with caplog.at_level(logging.WARNING, logger="maxtext_mudd.evaluate.harness"):
    answers = scores(lm, ("ab", "c"), ("ab", "d"), ("a", "bc"), ("aab", "c"), ("a ", "d"))
  rows = (("<bos>|a|b|c", 1), ("<bos>|a|b|d", 1), ("<bos>|a|bc", 1), ("<bos>|a|a|b|c", 1), ("<bos>|a| d", 1))
  np.testing.assert_allclose(answers, [direct(lm, *row) for row in rows], rtol=RELATIVE)
  (record,) = caplog.records
  assert record.getMessage().startswith("the target 'c' after 'ab': one token spans both, so the target is encoded")


def test_a_token_that_spans_a_part_of_the_answer(lm):
  """As the models of the harness do: what is left of the target after the context's number of tokens."""
  np.testing.assert_allclose(scores(lm, ("ab", "cd")), [direct(lm, "<bos>|a|b|d", 1)], rtol=RELATIVE)


def test_an_answer_without_tokens_is_refused(lm):
  with pytest.raises(ConfigError, match="the target '' has 0 tokens"):
    scores(lm, ("ab", ""))
