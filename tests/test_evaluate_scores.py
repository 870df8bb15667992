"""The harness's model: its log-likelihoods and texts are those of the model's logits."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maxtext_mudd
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.evaluate import harness as evaluation
from maxtext_mudd.inference import forward, tokens
from tests import models
from tests.blocks import MOE
from tests.evaluation import CONTEXT, KEYS, TEXT, TOLERANCE, build, direct, instances, letters, of_bytes, rolling


@pytest.fixture(scope="module")
def lm():
  return build()


def check(found, expected) -> None:
  np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=TOLERANCE)
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
  # The harness's own interface for tokens: these are no texts.
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


def test_whole_texts(lm):
  assert len(of_bytes(TEXT)) == 54  # two windows, and six tokens of a third
  found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (TEXT,), (TEXT[:24],), ("",)), disable_tqdm=True)
  expected = [rolling(lm, TEXT), direct(lm, [1, *of_bytes(TEXT[:24])], 24)[0], 0]
  np.testing.assert_allclose(found, expected, rtol=TOLERANCE)


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


@pytest.mark.parametrize(
  ("keys", "says"),
  [
    ({"decoder_block": "gemma2", "sliding_window_size": 8, "base_num_decoder_layers": 2}, "sliding_window_size=8: "),
    ({"moba": True}, "moba=True: "),
  ],
)
def test_models_that_decode_another_function_are_refused_before_tasks(keys, says):
  """By the configuration alone, with a prompt as long as the context."""
  config = models.config(mudd=True, **keys)
  with pytest.raises(ConfigError, match=f"^generation_kwargs: {says}"):
    evaluation._GenerationOptions.read({"max_gen_toks": 6}, config)


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
