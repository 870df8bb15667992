"""`python3 -m maxtext_mudd.analyze`: what it writes, and what it refuses."""

import json
import types

import numpy as np
import pytest

from maxtext_mudd.analyze import __main__ as analyze
from maxtext_mudd.analyze import drawing, measurement
from maxtext_mudd.inference import checkpoint
from tests import models, runs
from tests.evaluation import build, letters

GOLDEN = models.DATA / "muddformer_tiny"
RESULTS = runs.ROOT / "benchmarks" / "results"


def run(*arguments, capsys):
  """(what the command prints, the sentence with which it ends, if it does not succeed)."""
  ended = ""
  try:
    analyze.main(list(map(str, arguments)))
  except SystemExit as error:
    assert error.code == 2
    ended = "end"
  out, err = capsys.readouterr()
  sentences = [x for x in err.splitlines() if x.startswith("maxtext-mudd: ")]
  assert len(sentences) == bool(ended)
  return out, sentences[0].removeprefix("maxtext-mudd: ") if ended else ""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  (folder / "text.txt").write_text("Of moons and of lanterns of paper. No swans.\n" * 4)
  letters(folder / "tokenizer")
  return folder


FILES = {
  "similarity": {"mean", "percentile_5", "percentile_95"},
  "heads": {"active", "sinks"},
  "attention": {"block_003"},
  "weights": {"mean", "deviation", "source_norm"},
  "lens": {"loss"},
  "ablate": {"source", "stream", "aggregate", "everything", "baseline"},
}


@pytest.mark.parametrize("figure", [x if x == "similarity" else pytest.param(x, marks=pytest.mark.slow) for x in FILES])
def test_the_command(figure, text, tmp_path, capsys):
  model = ["--checkpoint", GOLDEN, "--text", text / "text.txt", "--tokenizer", text / "tokenizer"]
  options = ["--length", 16, "--against", GOLDEN, "matmul_precision=default"]
  options += ["--sequences", 3, "--batch-size", 2] if figure != "attention" else []
  out, ended = run(figure, *model, *options, "--output", tmp_path / "made", capsys=capsys)
  assert not ended
  *lines, wrote = out.splitlines()[-3:]
  assert [line.split(":")[0] for line in lines] == ["muddformer_tiny", "muddformer_tiny (2)"]
  assert wrote == f"wrote {tmp_path}/made/{figure}.json and .png"
  assert sorted(x.name for x in (tmp_path / "made").iterdir()) == [f"{figure}.json", f"{figure}.png"]
  found = json.loads((tmp_path / "made" / f"{figure}.json").read_text())
  assert found["figure"] == figure
  assert found["numbering"].startswith("Blocks and heads count from 1.") and len(found["definition"]) > 50
  assert found["command"].startswith(f"python3 -m maxtext_mudd.analyze {figure} --checkpoint ")
  for arrays in found["models"].values():
    assert arrays.keys() == FILES[figure] | {"tokens_read"}
    assert arrays["tokens_read"]["values"] == (16 if figure == "attention" else 48)
    for array in arrays.values():
      assert list(np.shape(array["values"])) == array["shape"]
      assert [len(x) for x in array["labels"].values()] == [
        array["shape"][array["dims"].index(x)] for x in array["labels"]
      ]
  again, ended = run(figure, *model, "--output", tmp_path / "made", capsys=capsys)
  assert ended == f"--output={tmp_path}/made has a {figure}.json already; name another folder."
  assert not again


def test_speed(tmp_path, capsys):
  losses = (("plain", 0.1, 0, 3.0), ("plain", 0.1, 1, 3.2), ("plain", 1.0, 0, 4.0), ("mudd", 0.1, 0, 9.9))
  losses += (("mudd", 0.1, 0, 2.9), ("dead", 0.1, 0, 2.0))  # of two rows of one run the later one counts
  rows = [
    {"kind": "cell", "model": model, "learning_rate": rate, "seed": seed, "held_out": {"9": 5.0, "19": x}, "dead": None}
    for model, rate, seed, x in losses
  ]
  rows[-1]["dead"] = "the loss of step 20 is not finite"
  timing = {"kind": "timing", "model": "dead", "against": "plain", "ratio": {"median": 1.25}}
  study, speed = tmp_path / "study.jsonl", tmp_path / "speed.json"
  study.write_text("".join(json.dumps(row) + "\n" for row in [*rows, timing]) + '{"kind": "ce')
  found = [{"model": "mudd", "refused": None, "ratio": {"median": 0.9}}, {"model": "x", "refused": "no"}]
  speed.write_text(json.dumps({"baseline": "yaml/plain.yml", "rows": found}))
  out, _ = run("speed", "--study", study, "--speed", speed, "--output", tmp_path / "made", capsys=capsys)
  assert out.startswith("plain: loss 3.1000 at 1.000 of the speed; mudd: loss 2.9000 at 0.900 of the speed\n")
  arrays = json.loads((tmp_path / "made" / "speed.json").read_text())["models"]["study"]
  assert arrays["standard_error"]["values"] == [pytest.approx(0.1), None]
  assert arrays["learning_rate"]["values"] == [0.1, 0.1] and arrays["runs"]["values"] == [2, 1]
  named = [
    "--speed",
    RESULTS / "2026-11-22-throughput-mudd-tiny-cpu.json",
    "plain=transformer_tiny",
    "mudd=mudd_tiny 2x2",
  ]
  out, _ = run("speed", "--study", study, *named, "--output", tmp_path / "named", capsys=capsys)
  assert out.startswith("plain: loss 3.1000 at 1.000 of the speed; mudd: loss 2.9000 at 0.8")
  _, ended = run("speed", "--study", study, "--speed", speed, "mudd=y", "--output", tmp_path / "b", capsys=capsys)
  assert ended == f"--speed: mudd=y: --speed={speed} has no y; it has plain, mudd."
  _, ended = run("speed", "--study", study, "--speed", speed, "mudd", "--output", tmp_path / "b", capsys=capsys)
  assert ended == f"--speed {speed} mudd: mudd is not MODEL=MODEL_OF_FILE, such as mudd=mudd_405m."
  study.write_text("".join(json.dumps(row) + "\n" for row in [*rows, timing | {"model": "mudd"}]))
  out, _ = run("speed", "--study", study, "--output", tmp_path / "timed", capsys=capsys)
  assert out.startswith("plain: loss 3.1000 at 1.000 of the speed; mudd: loss 2.9000 at 0.800 of the speed\n")
  study.write_text("".join(json.dumps(row) + "\n" for row in [*rows, timing, timing | {"against": "mudd"}]))
  _, ended = run("speed", "--study", study, "--output", tmp_path / "b", capsys=capsys)
  assert ended == (f"--study={study} has speeds against several models, mudd, plain; name one of a single plain model.")
  study.write_text(json.dumps(rows[0] | {"model": "other"}) + "\n")
  _, ended = run("speed", "--study", study, "--speed", speed, "--output", tmp_path / "b", capsys=capsys)
  assert ended == (
    f"--speed={speed} has speeds of plain, mudd, and none of the models of --study={study}: other; say which are the "
    f"same by --speed {speed} MODEL_OF_STUDY=MODEL_OF_FILE."
  )
  _, ended = run("speed", "--study", study, "--output", tmp_path / "b", capsys=capsys)
  assert ended == (
    f"--study={study} has losses of other, and speeds of no model; run the study with --time, or name a --speed file "
    "with one of these models."
  )
  _, ended = run("speed", "--study", speed, "--speed", speed, "--output", tmp_path / "b", capsys=capsys)
  assert ended.startswith(f"--study={speed} is no file of benchmarks/study.py; ")
  _, ended = run("speed", "--study", study, "--speed", study, "--output", tmp_path / "b", capsys=capsys)
  assert ended == f"--speed={study} is no file of benchmarks/throughput.py; name one that it wrote."


REFUSED = {
  "another figure": (
    ["heat"],
    "heat is not a figure; choose one of similarity, heads, attention, weights, lens, ablate, speed.",
  ),
  "no model": (["lens"], "lens needs --checkpoint; name a model."),
  "no text": (["lens", "--checkpoint", "{tmp}"], "lens needs --text; name a text file."),
  "no such text": (
    ["lens", "--checkpoint", "{tmp}", "--text", "{tmp}/none"],
    "--text={tmp}/none cannot be read (No such file or directory); name a text file.",
  ),
  "no checkpoint": (
    ["lens", "--checkpoint", "{tmp}/none", "--text", "{text}"],
    "--checkpoint={tmp}/none is not a folder; name one that holds a model.",
  ),
  "nothing to compare with": (
    ["lens", "--checkpoint", str(GOLDEN), "--text", "{text}", "--against", ""],
    "--against is empty; name a folder that holds a model.",
  ),
  "no model to compare with": (
    ["lens", "--checkpoint", str(GOLDEN), "--text", "{text}", "--against", "{tmp}/none"],
    "--against={tmp}/none is not a folder; name one that holds a model.",
  ),
  "no sequences": (
    ["lens", "--checkpoint", "{tmp}", "--text", "{text}", "--sequences", "0"],
    "--sequences=0 is not a whole number of 1 or more.",
  ),
  "one token": (
    ["lens", "--checkpoint", "{tmp}", "--text", "{text}", "--length", "1"],
    "--length=1 is not a whole number of 2 or more.",
  ),
  "an output that is a file": (
    ["lens", "--checkpoint", "{tmp}", "--text", "{text}", "--output", "{text}"],
    "--output={text} is a file; name a folder.",
  ),
  "an argument of another figure": (
    ["lens", "--checkpoint", "{tmp}", "--text", "{text}", "--to", "mean"],
    "--to does nothing with lens; leave it out.",
  ),
  "sequences of one map": (
    ["attention", "--checkpoint", "{tmp}", "--text", "{text}", "--sequences", "2"],
    "--sequences does nothing with attention; leave it out.",
  ),
  "a model for speed": (
    ["speed", "--study", "{text}", "--checkpoint", "{tmp}"],
    "--checkpoint does nothing with speed; leave it out.",
  ),
  "speed of nothing": (
    ["speed"],
    "speed needs --study=FILE.jsonl; name results of benchmarks/study.py.",
  ),
  "no such study": (
    ["speed", "--study", "{tmp}/none", "--speed", "{text}"],
    "--study={tmp}/none is not a file; name one that a benchmark wrote.",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes(case, text, tmp_path, capsys):
  arguments, sentence = REFUSED[case]
  places = {"tmp": tmp_path, "text": text / "text.txt"}
  arguments = [x.format(**places) for x in arguments]
  out, ended = run(*arguments, *(["--output", tmp_path / "out"] if "--output" not in arguments else []), capsys=capsys)
  assert ended == sentence.format(**places)
  assert not out
  assert not (tmp_path / "out").exists()


OF_MODELS = {
  "a block too many": ("attention", {}, ["--block", "4"], "--block=4: the model has 3 blocks; name one of 1 to 3."),
  "a sink of two tokens": (
    "heads",
    {},
    ["--sink", "ab"],
    "--sink='ab' is no single token of the tokenizer; name texts that are.",
  ),
  "sequences of two tokens": (
    "heads",
    {},
    ["--length", "2"],
    "heads needs sequences of more than 2 tokens; name a longer text or --length.",
  ),
  "a sequence too long": (
    "lens",
    {},
    ["--length", "25"],
    "--length=25 is more than the context, max_target_length=24.",
  ),
  "weights of a plain model": (
    "weights",
    {"mudd": False},
    [],
    "weights: the model has no depth weights; name one with depth connections.",
  ),
  "static weights": (
    "ablate",
    {"mudd_dynamic": False},
    [],
    "ablate: the weights of this model are the same for all tokens (mudd_dynamic=False), so --to=static changes "
    "nothing; use --to=zero.",
  ),
  "ablation of sublayers": (
    "ablate",
    {"depth_connection": "attnres"},
    [],
    "ablate needs a model that mixes block outputs (depth_connection=dense); this one has depth_connection=attnres.",
  ),
}


def test_several_residual_streams(text, tmp_path, monkeypatch, capsys):
  config = types.SimpleNamespace(mhc_expansion_rate=2)
  monkeypatch.setattr(checkpoint, "read", lambda *_: (config, None, None))
  given = ["--checkpoint", tmp_path, "--text", text / "text.txt", "--output", tmp_path / "out"]
  _, ended = run("lens", *given, capsys=capsys)
  assert ended == (
    "mhc_expansion_rate=2: figures are of models with one residual stream; call maxtext_mudd.inspect in Python."
  )


@pytest.mark.parametrize("case", OF_MODELS)
def test_mistakes_that_the_model_shows(case, text, tmp_path, monkeypatch, capsys):
  figure, keys, arguments, sentence = OF_MODELS[case]
  lm = build(base_num_decoder_layers=3, **keys)
  monkeypatch.setattr(checkpoint, "read", lambda *_: (lm.config, lm.text_tokenizer, lambda: lm.model))
  given = ["--checkpoint", tmp_path, "--text", text / "text.txt", "--output", tmp_path / "out"]
  _, ended = run(figure, *given, *arguments, capsys=capsys)
  assert ended == sentence
  assert not (tmp_path / "out").exists()


def test_all_models_are_checked_before_the_first_is_loaded(text, tmp_path, monkeypatch, capsys):
  read = checkpoint.read
  monkeypatch.setattr(checkpoint, "read", lambda *arguments: (*read(*arguments)[:2], lambda: pytest.fail("is loaded")))
  given = ["--checkpoint", GOLDEN, "--text", text / "text.txt", "--tokenizer", text / "tokenizer"]
  against = ["--against", GOLDEN, "max_target_length=16"]
  _, ended = run("similarity", *given, *against, "--length", "20", "--output", tmp_path / "out", capsys=capsys)
  assert ended == "muddformer_tiny (2): --length=20 is more than the context, max_target_length=16."


def test_tokens_that_look_like_mathematics_are_drawn(tmp_path):
  texts = ["$$", "\u5b57", "$x", "_"]
  maps = measurement.Named(("head", "query", "key"), np.eye(4)[None], {"query": texts, "key": texts})
  drawing.write("attention", {"a $$ model": {"block_001": maps}}, tmp_path / "x.png")
  assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_scales_of_weights_have_numbers():
  values = np.array([[[20.0, -3.0], [0.04, 5.0]]])
  labels = {"stream": ["v"], "aggregate": [1, 2], "source": [0, 1]}
  mean, deviation = (measurement.Named((*labels,), x, labels) for x in (values, abs(values)))
  bars = drawing.DRAWN["weights"]({"mudd": {"mean": mean, "deviation": deviation}}).axes[-2:]
  assert [[x.get_text() for x in bar.get_yticklabels()] for bar in bars] == [
    ["-10", "-1", "0", "1", "10"],
    ["0", "1", "10"],
  ]
