"""Generating tokens with MaxText's engine: the released models' tokens, and those of teacher forcing."""

import pathlib
import subprocess
import sys

from maxtext.inference.maxengine import maxengine
import numpy as np
import pytest
from safetensors.numpy import load_file
import yaml

import maxtext_mudd
from maxtext_mudd import convert, decode
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.inference import generation
from tests import models, runs
from tests.blocks import MOE, OTHERS, config_of

FAST = (("muddformer_tiny", False),)
SLOW = (("muddformer_tiny", True), ("muddpythia_tiny", False), ("muddpythia_tiny", True))


@pytest.mark.parametrize(("name", "scan"), [*FAST, *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW)])
def test_released_tokens(name, scan):
  golden = load_file(models.DATA / name / "generated.safetensors")
  prompts, expected = golden["prompt_ids"], golden["generated"]
  number = expected.shape[1] - prompts.shape[1]
  model, config = maxtext_mudd.from_pretrained(models.DATA / name, scan_layers=scan)
  found = maxtext_mudd.generate(model, config, prompts, number)
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, expected)

  one = maxtext_mudd.generate(model, config, prompts, 1)
  np.testing.assert_array_equal(one, expected[:, : prompts.shape[1] + 1])

  # Of different lengths: a row is what it is alone, and ends in zeros.
  short = prompts[0][:5]
  ragged = maxtext_mudd.generate(model, config, [short, prompts[1]], number)
  np.testing.assert_array_equal(ragged[1], expected[1])
  models.check_greedy(model, ragged[0], len(short), number)
  assert not ragged[0, len(short) + number :].any()


@pytest.mark.parametrize(("name", "scan"), [*FAST, *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW)])
def test_chunks_of_prompts(name, scan):
  golden = load_file(models.DATA / name / "generated.safetensors")
  prompts, expected = golden["prompt_ids"], golden["generated"]
  number = expected.shape[1] - prompts.shape[1]
  model, config = maxtext_mudd.from_pretrained(
    models.DATA / name, scan_layers=scan, use_chunked_prefill=True, prefill_chunk_size=3
  )
  found = maxtext_mudd.generate(model, config, [prompts[0], prompts[1][:4]], number)
  np.testing.assert_array_equal(found[0], expected[0])
  models.check_greedy(model, found[1], 4, number)


@pytest.mark.slow
def test_engines_are_kept(monkeypatch):
  """One for each size, whichever was the last, with the parameters that the model has now."""
  made, init = [], maxengine.MaxEngine.__init__
  monkeypatch.setattr(maxengine.MaxEngine, "__init__", lambda *args, **keys: made.append(init(*args, **keys)))
  config = models.config(mudd=True, max_target_length=64)
  model = models.build(config)
  models.randomise(model)
  for prompt in (3, 20, 3, 20):
    found = maxtext_mudd.generate(model, config, [[1] * prompt], np.int64(4))
    models.check_greedy(model, found[0], prompt, 4)
  assert len(made) == 2
  models.randomise(model, seed=1)
  models.check_greedy(model, maxtext_mudd.generate(model, config, [[1] * 3], 4)[0], 3, 4)
  assert len(made) == 2


@pytest.mark.slow
def test_sampling():
  golden = load_file(models.DATA / "muddformer_tiny" / "generated.safetensors")
  prompts, expected = golden["prompt_ids"], golden["generated"]
  number = expected.shape[1] - prompts.shape[1]
  model, config = maxtext_mudd.from_pretrained(models.DATA / "muddformer_tiny")
  drawn = [maxtext_mudd.generate(model, config, prompts, number, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert (drawn[0] != drawn[2]).any()
  best = maxtext_mudd.generate(model, config, prompts, number, temperature=1.5, top_k=1, seed=3)
  np.testing.assert_array_equal(best, expected)


FAMILIES = {
  "hyper_connections": {},
  "mhc": {},
  "attnres": {"mudd_attnres_block": 3},
  "attnres of heads": {
    "depth_connection": "attnres",
    "mudd_attnres_heads": 4,
    "mudd_attnres_value_route": True,
  },
  "dca": {"mudd_dca_sources": "middle_sum", "mudd_dca_k": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["single", "scanned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, scan):
  """Prompts whole and in chunks, for the same tokens."""
  keys = {"mudd": True, "depth_connection": family, "scan_layers": scan, "max_target_length": 24, **FAMILIES[family]}
  found = []
  for chunk in ({}, {"use_chunked_prefill": True, "prefill_chunk_size": 4}):
    config = models.config(**keys, **chunk)
    model = models.build(config)
    models.randomise(model)
    found.append(maxtext_mudd.generate(model, config, [[5, 9, 3, 7, 1, 8], [2, 4]], 6))
  for row, prompt in zip(found[0], (6, 2)):
    models.check_greedy(model, row, prompt, 6)
  np.testing.assert_array_equal(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 4], ids=["whole", "chunks"])
@pytest.mark.parametrize("scan", [False, True], ids=["single", "scanned"])
def test_experts(scan, chunk):
  keys = {"decoder_block": "mixtral", **MOE, "mudd": True, "mudd_pre_norm": True, "mudd_post_norm": True}
  keys |= {"use_chunked_prefill": True, "prefill_chunk_size": chunk} if chunk else {}
  config = models.config(**keys, scan_layers=scan, max_target_length=64)
  model = models.build(config)
  models.randomise(model)
  prompts = [[3, 14, 15, 9, 26, 5], [35, 8, 9]]
  found = maxtext_mudd.generate(model, config, prompts, 12)
  for row, prompt in zip(found, prompts):
    models.check_greedy(model, row, len(prompt), 12)
  assert len(np.unique(found)) > 5


REFUSED = {
  "no prompt": (([], 4), "there is no prompt; pass at least one."),
  "an empty prompt": (
    ([[1], []], 4),
    "prompt 1 is float64[0]; pass a list of tokens, which are whole numbers.",
  ),
  "one list": (([1, 2], 4), "prompt 0 is int64[]; pass a list of tokens, which are whole numbers."),
  "no new tokens": (([[1]], 0), "max_new_tokens=0 is not a number of tokens; set it to 1 or more."),
  "a token too far": (([[1, 64]], 4), "prompt 0 has the token 64, and the model has vocab_size=64."),
  "too long": (
    ([[1] * 13], 4),
    "prompt 0 has 13 tokens, and 4 more do not fit into the context, max_target_length=16; shorten the prompt, or "
    "lower max_new_tokens.",
  ),
  "half a token": (
    ([[1.5]], 4),
    "prompt 0 is float64[1]; pass a list of tokens, which are whole numbers.",
  ),
  "no temperature": (
    ([[1]], 4, float("nan")),
    "temperature=nan is not a finite number of 1e-06 or more; temperature=0 takes the most probable token each time.",
  ),
  "too cold to divide by": (
    ([[1]], 4, 1e-40),
    "temperature=1e-40 is not a finite number of 1e-06 or more; temperature=0 takes the most probable token each time.",
  ),
  "temperature left out": (([[1]], 4, None), "temperature=None is not a number."),
  "a complex temperature": (([[1]], 4, 1j), "temperature=1j is not a number."),
  "a generator": ((iter([[1]]), 4), "prompts are list_iterator; pass a list of lists of tokens."),
  "lists in lists": (
    ([[1, [2, 3]]], 4),
    "prompt 0 is made of rows of different lengths; pass a list of tokens, which are whole numbers.",
  ),
  "a part of a token": (([[1]], 2.5), "max_new_tokens=2.5 is not a whole number."),
  "a seed too large": (([[1]], 4, 1.0, 0, 2**70), f"seed={2**70} is not from 0 to 2**32 - 1."),
  "more than all": (([[1]], 4, 1.0, 65), "top_k=65 is not from 0 to vocab_size=64; 0 draws from all."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
  arguments, message = REFUSED[case]
  with pytest.raises(ConfigError) as refused:
    generation.generate(None, models.config(), *arguments)
  assert str(refused.value) == message


def test_refusals_of_the_command(tmp_path):
  nowhere = tmp_path / "nowhere"
  for keys, message in (
    ({}, "load_parameters_path='' names no checkpoint; name one, such as OUTPUT/RUN/checkpoints/STEP."),
    ({"load_parameters_path": str(nowhere)}, f"load_parameters_path={nowhere}: there is no such folder."),
    (
      {"load_parameters_path": str(tmp_path / ("n" * 300))},
      f"{tmp_path / ('n' * 300)} cannot be reached: file name too long; name one that can.",
    ),
    (
      {"load_full_state_path": str(nowhere), "enable_checkpointing": True},
      f"load_full_state_path={nowhere}: decoding reads parameters only; name the checkpoint by load_parameters_path, "
      "which also accepts a checkpoint of a run.",
    ),
    (
      {"load_parameters_path": str(tmp_path), "image_path": "cat.png"},
      "image_path=cat.png: decoding reads a prompt of text alone; leave it empty.",
    ),
    (
      {"load_parameters_path": str(tmp_path), "max_prefill_predict_length": 64, "max_target_length": 64},
      "max_prefill_predict_length=64 leaves no room for new tokens in max_target_length=64; lower the first key, "
      "or raise the second.",
    ),
    (
      {"load_parameters_path": str(tmp_path), "decode_sampling_strategy": "topk"},
      "decode_sampling_top_k=0 is not from 1 to vocab_size=64.",
    ),
    (
      {"load_parameters_path": str(tmp_path), "decode_sampling_strategy": "composite", "decode_sampling_top_k": 64},
      "decode_sampling_nucleus_p=-1 is not above 0, and 1 at most.",
    ),
    (
      {
        "load_parameters_path": str(tmp_path),
        "decode_sampling_strategy": "weighted",
        "decode_sampling_temperature": 0.0,
      },
      "decode_sampling_temperature=0.0 is not a finite number of 1e-06 or more; "
      "decode_sampling_strategy=greedy takes the most probable token each time.",
    ),
    (
      {"load_parameters_path": str(tmp_path), "moba": True},
      "moba=True: MaxText attends to all keys in decoding, and to chosen blocks of them in training; use logits.",
    ),
    (
      {"load_parameters_path": str(tmp_path), "quantize_kvcache": True},
      "quantize_kvcache=True with dtype=float32: MaxText keeps the scales of the cache in bfloat16; set "
      "dtype=bfloat16.",
    ),
    (
      {"load_parameters_path": str(tmp_path), "decoder_block": "deepseek4"} | OTHERS["deepseek4"],
      "decoder_block='deepseek4': MaxText makes other compressed keys in decoding than in training; use logits.",
    ),
  ):
    with pytest.raises(ConfigError) as refused:
      decode.check_decoding(models.config(**keys))
    assert str(refused.value) == message


def test_windows_that_are_shorter_than_the_text_are_refused():
  """Padding counts: a prompt of 20 tokens takes 32 slots, of which MaxText's decoding sees the last ones."""
  for prompt, new, needed in ((8, 4, 16), (20, 4, 32), (20, 14, 34)):
    config = config_of("gpt_oss", mudd=True, sliding_window_size=needed - 1, max_target_length=64)
    with pytest.raises(ConfigError) as refused:
      generation.check([[1], [1] * prompt], new, config)
    assert str(refused.value) == (
      f"sliding_window_size={needed - 1}: MaxText decodes other functions than it trains where a window is shorter "
      f"than prompt and new tokens, which need {needed} here with padding; use a shorter prompt or fewer "
      "new tokens (in commands, a lower max_target_length), or logits."
    )
    generation.check([[1] * prompt], new, config_of("gpt_oss", sliding_window_size=needed, max_target_length=64))
  for block in ("gemma", "mistral", "envy"):  # have no windows
    generation.check([[1] * 8], 4, config_of(block, sliding_window_size=4))


TEXT = "def f(x): # [a] "  # as YAML it would be something else


@pytest.mark.slow
def test_the_command(tmp_path):
  """After a training run, from its checkpoint, named with and without what is inside; a prompt that is too long.
  The checkpoint as a folder of its own, too."""
  overrides = runs.build_corpus(tmp_path)
  runs.train(runs.LAUNCHER, runs.RUN_YML, tmp_path, "run", *overrides, "steps=2")
  checkpoint = tmp_path / "run" / "checkpoints" / "1"
  made, moved = tmp_path / "made", tmp_path / "moved"
  convert.main(["from-run", "--checkpoint", str(checkpoint), "--maxtext-dir", str(made), runs.RUN_YML])
  assert yaml.safe_load((made / "model.yml").read_text())["scan_layers"] is False
  prompt = np.arange(24)[None]
  alike = [maxtext_mudd.from_pretrained(made)[0], maxtext_mudd.from_run(checkpoint, pathlib.Path(runs.RUN_YML))[0]]
  np.testing.assert_array_equal(*(maxtext_mudd.logits(model, prompt) for model in alike))
  made.rename(moved)
  on_a_cpu = ["hardware=cpu", "skip_jax_distributed_system=true", "dtype=float32", "attention=dot_product"]
  said = []
  for config, folder, prompt, *more in (
    (runs.RUN_YML, checkpoint, TEXT),
    (runs.RUN_YML, checkpoint / "items", TEXT),
    (runs.RUN_YML, checkpoint, "x" * 60),
    (runs.RUN_YML, checkpoint, ""),
    (moved / "model.yml", moved, TEXT, *on_a_cpu),
    (runs.RUN_YML, checkpoint, TEXT, "autoregressive_decode_assert=no such text"),
  ):
    keys = [f"load_parameters_path={folder}", f"prompt={prompt}", "max_prefill_predict_length=40", *more]
    finished = subprocess.run(
      [sys.executable, "MaxText/decode.py", str(config), *keys],
      cwd=runs.ROOT,
      env=runs.environment(),
      capture_output=True,
      text=True,
    )
    said.append(
      (finished.returncode, *("".join(text.splitlines()[-1:]) for text in (finished.stdout, finished.stderr)))
    )
    assert finished.stdout.startswith("Input `") or (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.count("\n") <= 1
  assert said[0][:2] == said[1][:2]
  assert said[0][0] == 0
  assert said[0][1].startswith(f"Input `{TEXT}` -> `")
  assert len(said[0][1]) > len(f"Input `{TEXT}` -> ``")
  assert said[2][0] == 2
  assert said[2][2] == (
    "maxtext-mudd: the prompt has 61 tokens, more than max_prefill_predict_length=40; shorten it, or raise that "
    "key, which leaves fewer new tokens up to max_target_length=64."
  )
  assert said[3][::2] == (2, 'maxtext-mudd: prompt is empty; pass prompt="...".')
  assert said[4][:2] == said[0][:2]
  assert said[5][0] == 2
  assert said[5][2].startswith(
    "maxtext-mudd: autoregressive_decode_assert=no such text: the new text does not begin with it: '"
  )
