"""What `python3 -m maxtext_mudd.complexity pipeline=S` plans: by hand, and against compiled programs."""

import functools
import json
import math
import os
import re
import subprocess
import sys

import pytest

from maxtext_mudd import connections
from maxtext_mudd.complexity import __main__ as command
from maxtext_mudd.complexity import pipeline
from tests import runs

MODEL = [str(runs.ROOT / "yaml" / "mudd_2p8b.yml"), "mudd_ffn_reallocation=false"]
FOUR = [*MODEL, "pipeline=4", "microbatches=32"]  # 2 of 16 sequences of 2048 tokens on a chip: 4096 tokens


def printed(capsys, *arguments) -> dict[str, list[str]]:
  """By its first column, the other columns of what the command prints."""
  command.main(list(arguments))
  rows = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
  return {row[0]: row[1:] for row in rows}


def test_one_model(capsys):
  """By hand: 32 blocks of width 2560 with FFNs of 6912, in bfloat16."""
  rows = printed(capsys, *FOUR)
  array = 2 * 2560 * 4096
  seconds = 8 * 2 * (4 * 2560**2 + 2560 * 2048 + 3 * 2560 * 6912) * 4096 / (0.5 * 459e12)
  kept = 35 * 33 * array
  times = [f"{25 * array / 9e10 / seconds:.3f}", f"{25 * array / 6.25e9 / seconds:.2f}"]
  expected = ["9 17 25", f"{25 * array / 1e6:.0f}", f"{8 * array / 1e6:.0f}", *times, f"{kept / 1e9:.1f}", "100%"]
  assert rows["as given"] == expected
  assert [rows[x][0] for x in ("2x2", "4x4", "window 8", "plain")] == ["5 9 13", "3 5 7", "9 9 9", "1 1 1"]
  assert [rows[x][-1] for x in ("2x2", "4x4", "window 8", "plain")] == ["53%", "29%", "53%", "6%"]  # of 9 + 17 + 25
  # X_0, sums of 8 sublayers, and the sum so far beside them; with each of the sources 65 logits in float32.
  attnres = 6 * (array + 4 * 65 * 4096) + array
  assert rows["block AttnRes"][:2] == ["3 5 7", f"{attnres / 1e6:.0f}"]
  assert rows["turns"] == ["35, in 3 of which a stage is idle (8.6%)"]
  assert rows["with pipeline_delay_activation_forwarding"] == ["38, in 6 of which a stage is idle (15.8%)"]
  assert rows["forward pass of a stage on a v5p"] == [f"{1000 * seconds:.1f} ms, at half of its peak"]
  keys = "ici_pipeline_parallelism=4 num_layers_per_pipeline_stage=8 num_pipeline_microbatches=32"
  assert rows["keys"] == [keys]


def test_plain_model_and_streams(capsys):
  rows = printed(capsys, str(runs.ROOT / "yaml" / "transformer_pp_2p8b.yml"), *FOUR[2:])
  assert rows["as given"] == [*printed(capsys, *FOUR)["plain"][:-1], "100%"]
  assert "plain" not in rows
  assert rows["2x2"][0] == "5 9 13"
  rows = printed(capsys, *FOUR, "depth_connection=mhc")
  assert rows["as given"][0] == "4 4 4"


def test_delayed_forwarding_keeps_more(capsys):
  now, later = (printed(capsys, *FOUR, *x) for x in ([], ["pipeline_delay_activation_forwarding=true"]))
  kept = [float(rows["as given"][-2]) for rows in (now, later)]
  assert kept[1] / kept[0] == pytest.approx(38 / 35, rel=0.01)


@pytest.mark.parametrize("keys", [{}, {"mudd_pre_norm": True}, {"mudd_block_period": 3}, {"mudd_depth_start": 0.5}])
@pytest.mark.parametrize("stages", [2, 8])
def test_least_traffic(keys, stages):
  """A boundary is crossed by X_i of the block before it, and by each source that an aggregate behind it mixes."""
  request = pipeline.Request(stages, stages, "v5p")
  given = command.read([*MODEL, *(f"{key}={value}" for key, value in keys.items())])
  for name, config in pipeline.compared(pipeline.pipelined(given, request)).items():
    if config.depth_connection != "dense":
      continue
    bound = []
    for last in range(32 // stages, 32, 32 // stages):
      later = [site.sources for site in connections.plan(config).sites.values() if site.block >= last]
      mixed = {source for sources in later for source in sources if source <= last}
      bound.append(len(mixed) + 1 if "mudd_pre_norm" in keys else len(mixed | {last}))
    assert [x.arrays for x in pipeline.traffic(config).boundaries] == bound, name


def test_picture(capsys, tmp_path):
  file = tmp_path / "plan.png"
  printed(capsys, *FOUR, "--png", str(file))
  assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["pipeline=5"], "pipeline=5 does not divide the number of layers, 32; use one of 2, 4, 8, 16, 32."),
    (["pipeline=1"], "pipeline=1 is not valid; use a whole number from 2 on."),
    (["pipeline=4", "microbatches=6"], "microbatches=6 is no multiple of pipeline=4, which MaxText needs; use 4 or 8"),
    (["pipeline=4", "chip=v9"], "chip=v9 is not known; use one of v4, v5e, v5p, v6e, h100."),
    (["chip=v5e"], "chip=v5e is of a pipeline; name its number of stages, too, as in pipeline=4."),
    (["--png", "x.png"], "--png x.png draws a pipeline; name its number of stages, too, as in pipeline=4."),
    (["pipeline=4", "--png=x.pdf"], "--png x.pdf: name a file that ends in .png, in a folder that exists."),
    (["pipeline=4", "mudd_ffn_reallocation=true"], "mudd_ffn_reallocation=True does not work with mudd=True and a pip"),
    (["pipeline=4", "mudd_extra_embeddings=2"], "mudd_extra_embeddings=2 does not work with mudd=True and a pipeline"),
    (["pipeline=4", "shard_mode=explicit"], "shard_mode=explicit does not work with mudd=True and a pipeline of 4"),
    (["pipeline=4", "opt_type=muon"], "opt_type=muon does not work with mudd=True and a pipeline of 4 stages"),
    (["pipeline=4", "lora.enable_lora=true"], "lora.enable_lora=True does not work with mudd=True and a pipeline"),
    (
      ["pipeline=4", "pipeline_delay_activation_forwarding=true"],
      "microbatches=4 is too few for pipeline_delay_activation_forwarding=True; use at least 8.",
    ),
  ],
)
def test_mistakes(arguments, message, capsys):
  with pytest.raises(SystemExit) as ended:
    command.main([*MODEL, *arguments])
  assert ended.value.code == 2
  assert capsys.readouterr().err.splitlines()[-1].startswith(f"maxtext-mudd: {message}")


# ---------------------------------------------------------------- compiled programs

PIPELINE = {"ici_pipeline_parallelism": 4, "num_layers_per_pipeline_stage": 2, "num_pipeline_microbatches": 8}
FSDP, TURNS = 2, 11
COMMON = {"mudd": True, "base_num_decoder_layers": 8, "per_device_batch_size": 4}
COMPILED = {
  "dense": {},
  "pre-norm": {"mudd_pre_norm": True},
  "2x2": {"mudd_source_dilation": 2, "mudd_block_period": 2},
  "window 2": {"mudd_window": 2},
  "block AttnRes": {"depth_connection": "attnres", "mudd_attnres_block": 2},
  "DCA": {"depth_connection": "dca"},
  "mHC": {"depth_connection": "mhc"},
}


@functools.cache
def compiled() -> dict[str, dict]:
  """By case, what `tests.pipeline_traffic` prints of it."""
  cases = [COMMON | keys for keys in COMPILED.values()]
  finished = subprocess.run(
    [
      sys.executable,
      "-m",
      "tests.pipeline_traffic",
      json.dumps(cases),
      json.dumps(PIPELINE | {"ici_fsdp_parallelism": 2}),
    ],
    cwd=runs.ROOT,
    env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr[-4000:]
  return dict(zip(COMPILED, map(json.loads, finished.stdout.splitlines()[-len(cases) :])))


def planned(name: str) -> pipeline.Traffic:
  from tests import models  # imports JAX

  keys = models.SMALL | {"mudd_ffn_reallocation": False} | COMMON | COMPILED[name]
  config = command.read([runs.RUN_YML, *(f"{key}={value}" for key, value in keys.items() if value != "")])
  return pipeline.traffic(pipeline.pipelined(config, pipeline.Request(4, 8, "v5p")))


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_programs_send_what_is_planned(name, backward):
  """In all, over the pairs of devices that are no pairs of the rotation of inputs and outputs, which stock has, too."""
  sent = 0
  for x in compiled()[name]["permutes"]:
    if x["backward"] == backward and x["pairs"] < 4 * FSDP:
      sent += x["pairs"] * 4 * math.prod(x["shape"])  # float32
  tokens = 4 * 8 * 16 / 8  # of a microbatch of all chips
  assert sent == planned(name).total_bytes * tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "2x2", "window 2"])
def test_compiled_programs_keep_what_is_planned(name):
  """Of each turn one buffer, and nothing else."""
  kept = sum(4 * math.prod(shape) for shape in compiled()[name]["of_turns"])
  tokens = 4 * 8 * 16 / 8 / FSDP  # of a microbatch on one device
  assert kept == TURNS * planned(name).kept_bytes * tokens
