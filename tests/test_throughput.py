"""benchmarks/throughput.py: what it computes from times, whom it compares, what it refuses, and one small run."""

import contextlib
import io
import json
import pathlib
import sys

import jax
from maxtext.utils import maxtext_utils, model_creation_utils
import pytest

from maxtext_mudd.config.errors import ConfigError
from tests import models, runs
from tests.rounding import close

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import chips
import compared_models
import paired
import table_4
import throughput
import train_steps

TINY = str(runs.ROOT / "yaml" / "mudd_tiny.yml")
PLAIN_TINY = str(runs.ROOT / "yaml" / "transformer_tiny.yml")
SMALL = ["per_device_batch_size=2", "max_target_length=32", "base_num_decoder_layers=2", "base_emb_dim=32"]


def test_order_is_reversed_every_other_round():
  calls = []
  times = iter([2.0, 4.0, 5.0, 2.0, 3.0, 4.0])  # as they are asked for: a b, b a, a b
  timed = {name: lambda name=name: (calls.append(name), next(times))[1] for name in "ab"}
  found = paired.alternate(timed["a"], timed["b"], rounds=3)
  assert "".join(calls) == "abbaab"
  assert found == [(2.0, 4.0), (2.0, 5.0), (3.0, 4.0)]
  assert paired.speed_ratios(found) == [0.5, 0.4, 0.75]


def test_rounds_end_before_the_deadline_but_not_before_two():
  now = [0.0]

  def advance():
    now[0] += 5.0
    return 1.0

  def clock():
    return now[0]

  assert len(paired.alternate(advance, advance, rounds=10, deadline=35.0, clock=clock)) == 3
  assert len(paired.alternate(advance, advance, rounds=10, deadline=0.0, clock=clock)) == paired.MIN_ROUNDS


def test_spread():
  spread = paired.Spread.of([0.9, 0.8, 1.0, 0.7, 0.6])
  assert spread == paired.Spread(median=0.8, lower_quartile=0.7, upper_quartile=0.9, min=0.6, max=1.0)
  assert paired.Spread.of([0.9]) == paired.Spread(0.9, 0.9, 0.9, 0.9, 0.9)


def test_mfu_is_known_of_known_devices_only():
  assert chips.peak_tflops("NVIDIA H200", "bfloat16") == 989
  assert chips.peak_tflops("NVIDIA H200", "float32") is None
  assert chips.peak_tflops("NVIDIA H200 NVL", "bfloat16") is None
  assert chips.peak_tflops("cpu", "bfloat16") is None


@pytest.mark.parametrize(
  ("name", "plain"),
  [
    ("mudd_1p4b", "transformer_pp_1p4b"),
    ("mudd_2p8b", "transformer_pp_2p8b"),
    ("muddpythia_1p4b", "pythia_1p4b"),
    ("baseline/ddformer_405m", "transformer_pp_405m"),
    ("ablation/sparse_2x2", "transformer_pp_405m"),
  ],
)
def test_the_baseline_is_what_a_model_builds_on(name, plain):
  assert compared_models.plain_model(str(runs.ROOT / "yaml" / f"{name}.yml")).endswith(f"yaml/{plain}.yml")


def test_no_baseline_where_a_model_builds_on_none(tmp_path):
  mine = tmp_path / "mine.yml"
  mine.write_text(f"base_config: {runs.ROOT}/yaml/mudd_base.yml\nmudd: true\n")
  with pytest.raises(ConfigError, match=r"mine.yml builds on no plain model; name one by --baseline, such as yaml/"):
    compared_models.plain_model(str(mine))
  with pytest.raises(ConfigError, match=r"transformer_tiny.yml has no connections \(mudd: false\); name a model"):
    compared_models.plain_model(PLAIN_TINY)


def test_a_baseline_that_was_found_is_of_one_size_with_its_model(tmp_path):
  mine = tmp_path / "mine.yml"
  mine.write_text(f"base_config: {PLAIN_TINY}\nmudd: true\nscan_layers: false\nbase_emb_dim: 64\n")
  pair = compared_models.read_stock(PLAIN_TINY, [], {}), compared_models.read(str(mine), [], {})
  with pytest.raises(ConfigError, match=r"emb_dim=64, and its baseline plain has 128; name another by --baseline"):
    compared_models.check_pair(*pair, ("plain", "mine"), derived=True)
  compared_models.check_pair(*pair, ("plain", "mine"), derived=False)


def test_the_batch_is_the_same():
  pair = (
    compared_models.read_stock(PLAIN_TINY, SMALL, {}),
    compared_models.read(TINY, [*SMALL[1:], "per_device_batch_size=4"], {}),
  )
  with pytest.raises(ConfigError, match=r"per_device_batch_size=4, and its baseline plain has 2; set"):
    compared_models.check_pair(*pair, ("plain", "mudd"), derived=False)


def test_keys_of_connections_leave_the_baseline_as_it_is():
  overrides = [*SMALL, "mudd_window=1", "mudd_init=normal"]
  stock, config = compared_models.read_stock(PLAIN_TINY, overrides, {}), compared_models.read(TINY, overrides, {})
  assert (stock.mudd, stock.mudd_window, config.mudd_window) == (False, 0, 1)
  assert (stock.mudd_init, config.mudd_init) == ("normal", "normal")
  assert set(compared_models.different_keys(stock, config)) == {"mudd", "mudd_ffn_reallocation", "mudd_window"}
  assert compared_models.stock_keys({"scan_layers": True, "mudd_kernel": "xla"}) == {"scan_layers": True}


def test_variants_are_the_files_of_ablation():
  assert compared_models.variant_keys("2x2") == {"mudd_source_dilation": 2, "mudd_block_period": 2}
  assert compared_models.variant_keys("trimmed") == {"mudd_dense_streams": "vr", "mudd_depth_start": 0.5}


def test_the_baseline_is_stock():
  config = compared_models.read_stock(PLAIN_TINY, SMALL, {})
  _, model = model_creation_utils.create_nnx_abstract_model(config, maxtext_utils.get_mesh_from_config(config))
  layers = [getattr(model.decoder, f"layers_{i}") for i in range(2)]
  assert all(type(layer).__module__.startswith("maxtext.") for layer in layers)
  assert not any("connection" in path for path in models.parameters(model))


REFUSALS = {
  "config": (["--config", "yaml/no.yml"], "yaml/no.yml: no such configuration file; the nearest of this package is"),
  "baseline": (
    ["--config", TINY, "--baseline", "no.yml"],
    "no.yml: no such configuration file; the nearest of this package is",
  ),
  "variant": (
    ["--config", TINY, "--variants", "xla,3x3"],
    "--variants has '3x3'; use some of xla, pallas, scanned, unscanned, 2x2, trimmed.",
  ),
  "baseline with connections": (
    ["--config", TINY, "--baseline", TINY],
    f"--baseline {TINY} has connections (mudd: true); name a plain model.",
  ),
  "mesh": (
    ["--config", TINY, "ici_fsdp_parallelism=3"],
    "ici_fsdp_parallelism=3: the product 3 of the mesh is not the one device of a slice; leave them at 1.",
  ),
  "topology": (
    ["--config", TINY, "compile_topology=v5p-8"],
    "compile_topology=v5p-8: a measurement needs compile_topology='', on the devices here; leave it out.",
  ),
  "data": (
    ["--config", TINY, "dataset_type=grain"],
    "dataset_type=grain: a measurement needs dataset_type='",
  ),
  "hardware": (["--config", TINY, "hardware=gpu"], "hardware=gpu: JAX finds a cpu here; leave hardware out."),
  "rounds": (["--config", TINY, "--rounds", "1"], "--rounds is 1; at least 2 is needed."),
  "key": (["--config", TINY, "mudd_way=4"], "mudd_way is not a configuration key; the nearest is mudd_ways."),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case, capfd, monkeypatch):
  arguments, sentence = REFUSALS[case]
  monkeypatch.setattr(sys, "argv", [str(runs.ROOT / "benchmarks" / "throughput.py"), *arguments])
  assert throughput.main(arguments) == 2
  last = capfd.readouterr().err.splitlines()[-1]
  assert last.startswith(f"throughput: {sentence}")


class Sized:
  """What `check_fit` reads of a step."""

  name, config = "mudd", compared_models.read(TINY, SMALL, {})
  argument_bytes, temporary_bytes = 30_000_000_000, 12_500_000_000


def test_what_does_not_fit_is_said_by_how_much():
  train_steps.check_fit(Sized, 0, None)
  train_steps.check_fit(Sized, 0, 42_500_000_000)
  with pytest.raises(ConfigError) as refused:
    train_steps.check_fit(Sized, 30_000_000_000, 70_000_000_000)
  assert str(refused.value) == (
    "per_device_batch_size=2 does not fit (mudd): 30.0 GB of arguments and 12.5 GB of temporaries, and 30.0 GB of the "
    "baseline beside it exceed the device's 70.0 GB by 2.5 GB; lower it, or max_target_length."
  )


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> pathlib.Path:
  """One run, but for the process of its own; the path of its files less their endings."""
  output = tmp_path_factory.mktemp("throughput") / "small"
  options = ["--rounds", "2", "--steps", "2", "--warmup", "1", "--variants", "pallas", "--output", str(output)]
  arguments = ["--config", TINY, "--baseline", PLAIN_TINY, *options, *SMALL]
  process_wide = ("jax_default_prng_impl", "jax_use_shardy_partitioner", "jax_remove_size_one_mesh_axis_from_type")
  before = {name: getattr(jax.config, name) for name in process_wide}
  printed = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
    patch.setattr(sys, "argv", [str(runs.ROOT / "benchmarks" / "throughput.py"), *arguments])
    assert throughput.main(arguments) == 0
  for name, value in before.items():
    jax.config.update(name, value)
  assert output.with_suffix(".md").read_text().endswith(printed.getvalue().rstrip("\n") + "\n")
  return output


def test_figures_agree(result):
  written = json.loads(result.with_suffix(".json").read_text())
  assert written["device"].startswith("CPU") and written["baseline"] == PLAIN_TINY
  row, pallas = written["rows"]
  stock, mudd = row["stock"], row["mudd"]
  for one in (stock, mudd):
    seconds = one["step_seconds_by_round"]
    assert len(seconds) == 2 and one["step_seconds"] == close(sum(seconds) / 2)
    assert one["tokens_per_step"] == 2 * 32
    assert one["tokens_per_second"] == close(64 / one["step_seconds"])
    assert one["tflops_per_second"] == close(one["tflops_per_step"] / one["step_seconds"])
    assert one["mfu"] is None and one["compile_seconds"] > 0 and min(one["argument_bytes"], one["temporary_bytes"]) > 0
  by_round = [a / b for a, b in zip(stock["step_seconds_by_round"], mudd["step_seconds_by_round"])]
  assert row["ratio"]["by_round"] == close(by_round)
  assert row["ratio"]["median"] == close(sum(by_round) / 2)
  assert mudd["tflops_per_step"] > stock["tflops_per_step"]  # the aggregates count
  assert set(row["differs_from_stock"]) == {"mudd", "mudd_ffn_reallocation"}
  assert pallas["refused"].startswith("hardware=cpu does not work with mudd_kernel=pallas")


def test_a_cpu_is_called_one(result):
  text = result.with_suffix(".md").read_text()
  assert "**Measured on a CPU.** It shows that the tool works, and nothing about an accelerator" in text
  assert "- mudd_tiny pallas: hardware=cpu does not work with mudd_kernel=pallas: it is compiled for TPUs;" in text
  assert table_4.warning(["CPU (x86_64)"]) and not table_4.warning(["1 × NVIDIA H200"])


def test_picture_of_results(result, tmp_path):
  picture = tmp_path / "both.png"
  written = f"{result}.json"
  assert table_4.main([written, written, str(picture)]) == 0
  for path in (picture, result.with_suffix(".png")):
    assert path.read_bytes().startswith(b"\x89PNG")
  assert table_4.main([written]) == 2
