"""benchmarks/decode_speed.py: what it computes from times, what it refuses, and one small run."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from tests import models, runs
from tests.rounding import close

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import decode_speed
import decoders
import jax

TINY = str(runs.ROOT / "yaml" / "mudd_tiny.yml")
PLAIN_TINY = str(runs.ROOT / "yaml" / "transformer_tiny.yml")


class Timed:
  """A decoder whose rounds take the seconds that it is given."""

  parameter_bytes, cache_bytes, compile_seconds = 2_500_000_000, 40_000_000, 3.0

  def __init__(self, name: str, log: list, seconds: list[tuple[float, float]]):
    self.name, self.log, self.seconds, self.prepared = name, log, iter(seconds), []

  def prepare(self, *sizes) -> None:
    self.prepared.append(sizes)

  def run(self) -> decoders.Seconds:
    self.log.append(self.name)
    return decoders.Seconds(*next(self.seconds))


def options(**changed) -> argparse.Namespace:
  found = decode_speed.parse(["--config", TINY, "--batch", "4", "--rounds", "3"])
  return argparse.Namespace(**(vars(found) | changed))


def measured(log: list, **changed) -> list[dict]:
  stock = [(0.5, 0.02), (0.5, 0.03), (0.5, 0.04)]
  control = [(0.5, x) for x in (0.02, 0.02, 0.01, 0.04, 0.02, 0.02)]  # second, first in the round between
  pair = Timed("plain", log, stock + control), Timed("mudd", log, [(1.0, 0.04), (1.0, 0.04), (0.5, 0.05)])
  found = decode_speed.measure_all(options(**changed), [4], pair, jax.devices()[0])
  assert [one.prepared for one in pair] == [[(4, 128, 64, 2, False)]] * 2
  return found


def test_ratios_are_by_round_and_in_turn():
  log = []
  pair, control = measured(log)
  assert log == ["plain", "mudd", "mudd", "plain", "plain", "mudd"] + ["plain"] * 6
  step = pair["ratio"]["step"]
  assert step["by_round"] == close([0.5, 0.75, 0.8])
  assert [step[x] for x in ("min", "lower_quartile", "median", "upper_quartile", "max")] == close(
    [0.5, 0.625, 0.75, 0.775, 0.8]
  )
  assert pair["ratio"]["prefill"]["by_round"] == close([0.5, 0.5, 1.0])
  assert (pair["stock"]["step_seconds"], pair["other"]["step_seconds"]) == (0.03, 0.04)
  assert pair["other"]["tokens_per_second"] == close(4 / 0.04)
  assert control["is_control"] and not pair["is_control"]
  assert control["ratio"]["step"]["by_round"] == close([1.0, 4.0, 1.0])


def test_the_table():
  rows = measured([])
  for row in rows:
    row["device_peak_bytes"] = 9_000_000_000
  config = models.config(weight_dtype="bfloat16")
  text = decode_speed.text(rows, options(prompt=100), config, "1 × NVIDIA H200")
  lines = [[x.strip() for x in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
  assert lines[0] == decode_speed.COLUMNS
  of_pair = ["50.0%", "50.0..75.0", "75.0%", "62.5..77.5", "50.0..80.0", "3"]
  of_control = ["100.0%", "100.0..100.0", "100.0%", "100.0..250.0", "100.0..400.0", "3"]
  assert lines[2:] == [
    ["plain", "4", "500.00", "30.000", "133.3", "2.5", "0.04", "", "3.0", *[""] * 6],
    ["mudd", "4", "1000.00", "40.000", "100.0", "2.5", "0.04", "9", "3.0", *of_pair],
    ["plain, again", "4", "500.00", "20.000", "200.0", "2.5", "0.04", "9", "3.0", *of_control],
  ]
  words = " ".join(text.split())
  assert "A prompt had 100 tokens and got 64 new tokens." in words and "the 63 steps" in words
  assert "as one program" in words
  assert "The dtype of the parameters is bfloat16, and the model computes in float32." in words
  assert "CPU" not in text and "Measured on a CPU" in decode_speed.text(rows, options(), config, "CPU (x86_64)")
  assert "each of which is a call of the engine" in decode_speed.text(rows, options(calls=True), config, "CPU (x86_64)")


def test_no_pair_is_begun_after_the_limit():
  assert len(measured([], time_limit=1e-9)) == 1


def test_the_weights_are_as_served_unless_asked():
  stock, config = decode_speed.configurations(options())
  assert {x.weight_dtype.name for x in (stock, config)} == {"bfloat16"} and not stock.mudd and config.mudd
  stock, config = decode_speed.configurations(options(overrides=["weight_dtype=float32"]))
  assert {x.weight_dtype.name for x in (stock, config)} == {"float32"}


def test_out_of_memory_is_one_sentence(monkeypatch):
  def refuse(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 42 bytes.")

  monkeypatch.setattr(decoders.model_creation_utils, "from_pretrained", refuse)
  with pytest.raises(decode_speed.ConfigError) as refused:
    decoders.Decoder("mudd", models.config())
  assert str(refused.value) == (
    "mudd does not fit the device beside the other model; use a smaller --batch, --prompt or --new."
  )


REFUSALS = {
  "config": (["--config", "yaml/no.yml"], "yaml/no.yml: no such configuration file; the nearest of this package is"),
  "baseline": (
    ["--config", TINY, "--baseline", "no.yml"],
    "no.yml: no such configuration file; the nearest of this package is",
  ),
  "no baseline": (["--config", PLAIN_TINY], f"{PLAIN_TINY} has no connections (mudd: false); name a model with them"),
  "key": (["--config", TINY, "mudd_way=4"], "mudd_way is not a configuration key; the nearest is mudd_ways."),
  "rounds": (["--config", TINY, "--rounds", "1"], "--rounds is 1; at least 2 is needed."),
  "new": (["--config", TINY, "--new", "1"], "--new is 1; at least 2 is needed."),
  "batch": (["--config", TINY, "--batch", "1,x"], "--batch is '1,x'; give numbers above 0, as in 1,8."),
  "no batch": (["--config", TINY, "--batch", "0"], "--batch is '0'; give numbers above 0, as in 1,8."),
  "time": (["--config", TINY, "--time-limit", "0"], "--time-limit is 0; seconds above 0 are needed."),
  "two batches": (
    ["--config", TINY, "per_device_batch_size=4"],
    "per_device_batch_size: --batch gives the number of prompts; leave it out.",
  ),
  "checkpoint": (
    ["--config", TINY, "load_parameters_path=/x"],
    "load_parameters_path: weights are random here; leave it out.",
  ),
  "context": (
    ["--config", TINY, "--prompt", "250", "--new", "7"],
    "--prompt 250 and --new 7 are longer than the context, max_target_length=256; lower one of them.",
  ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case, capfd, monkeypatch):
  arguments, sentence = REFUSALS[case]
  monkeypatch.setattr(sys, "argv", [str(runs.ROOT / "benchmarks" / "decode_speed.py"), *arguments])
  assert decode_speed.main(arguments) == 2
  assert capfd.readouterr().err.splitlines()[-1].startswith(f"decode_speed: {sentence}")


@pytest.mark.slow
@pytest.mark.parametrize("calls", [False, True], ids=["one program", "calls"])
def test_a_run(tmp_path, calls):
  sizes = ["base_num_decoder_layers=2", "base_emb_dim=32", "--batch", "1,2", "--prompt", "5", "--new", "4"]
  arguments = ["--config", TINY, "--baseline", PLAIN_TINY, "--rounds", "2", "--output", str(tmp_path / "small"), *sizes]
  finished = subprocess.run(
    [sys.executable, "benchmarks/decode_speed.py", *arguments, *(["--calls"] if calls else [])],
    cwd=runs.ROOT,
    env=runs.environment(),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr
  text = (tmp_path / "small.md").read_text()
  assert text.endswith(finished.stdout.rstrip("\n") + "\n") and "**Measured on a CPU.**" in text
  assert text.count(os.linesep + "| mudd_tiny |") == 2 and text.count("| transformer_tiny, again |") == 2
  written = json.loads((tmp_path / "small.json").read_text())
  assert written["device"].startswith("CPU") and written["baseline"] == PLAIN_TINY
  assert [(row["batch"], row["is_control"]) for row in written["rows"]] == [
    (1, False),
    (1, True),
    (2, False),
    (2, True),
  ]
  for row in written["rows"]:
    stock, other = row["stock"], row["other"]
    assert stock["cache_bytes"] == other["cache_bytes"] > 0
    assert (other["parameter_bytes"] > stock["parameter_bytes"]) is not row["is_control"]
    for one in (stock, other):
      assert one["tokens_per_second"] == pytest.approx(row["batch"] / one["step_seconds"])
    for what in ("prefill", "step"):
      by_round = [a / b for a, b in zip(*(x[f"{what}_seconds_by_round"] for x in (stock, other)))]
      assert len(by_round) == 2 and row["ratio"][what]["by_round"] == pytest.approx(by_round)
