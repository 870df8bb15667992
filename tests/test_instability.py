"""Totals over connections in the metrics of every train step, and the warning when they grow fast."""

import datetime
import json

from flax import nnx
import jax
from maxtext.common import metric_logger
import numpy as np
import pytest
import yaml

from maxtext_mudd import muddformer
from maxtext_mudd.checkpoints import layout
from maxtext_mudd.model import instability, reporting
from maxtext_mudd.runs import console
from tests import models, steps
from tests.parameters import to_muddformer

CLIPPED = {"gradient_clipping_threshold": 0.01}


@pytest.fixture(scope="module")
def by_hand():
  """Of the random model of `steps.prepare`: its parameters, the norms of its gradients by DA, and its largest dynamic
  weights by DA, computed by muddformer.py."""
  cfg = models.config(mudd=True)
  values = models.randomise(models.build(cfg))
  _, _, gradients = steps.value_and_gradients(cfg)
  squares = {}
  for path, x in gradients.items():
    if "connection" in path:
      da = 3 if "final_depth_aggregate" in path else int(path[1].removeprefix("layers_"))
      squares[da] = squares.get(da, 0) + np.square(x.astype(np.float64)).sum()
  params = to_muddformer(values)
  config = muddformer.Config(layers=3, width=32, heads=2, ffn=64, vocabulary=64)
  _, out = jax.jit(muddformer.forward, static_argnums=2)(params, models.batch(cfg)["inputs"], config)
  # The last sixteenth of 16 positions.
  largest = {i: np.abs(out[f"weights_{i}"] - da["a"])[:, -1].max() for i, da in enumerate(params["aggregates"], 1)}
  return values, {da: np.sqrt(x) for da, x in squares.items()}, largest


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_totals_of_a_step(scan_layers, by_hand):
  """Gradients are counted before they are clipped."""
  values, norms, largest = by_hand
  cfg = models.config(mudd=True, scan_layers=scan_layers, **CLIPPED)
  step, state = steps.prepare(cfg)
  if scan_layers:
    values = layout.stack(values, cfg)
    for path, variable in nnx.to_flat_state(state["model"].filter(nnx.Param)):
      variable.set_value(jax.numpy.asarray(values["/".join(map(str, path))]))
  metrics = step(state, models.batch(cfg))[1]
  parts = metrics[instability.TOTALS]
  assert {1, 2, 3} <= parts["max_weight"].keys() == {1, 2, 3}
  # In float32; the errors seen are below 1e-6.
  for da, expected in largest.items():
    assert float(parts["max_weight"][da]) == pytest.approx(expected, rel=1e-5)
  for da, expected in norms.items():
    assert float(parts["grad_norm"][da]) == pytest.approx(expected, rel=1e-5)
  scalars = metrics["scalar"]
  assert float(scalars["mudd/max_weight"]) == pytest.approx(max(largest.values()), rel=1e-5)
  assert float(scalars["mudd/grad_norm"]) == pytest.approx(np.sqrt(sum(x * x for x in norms.values())), rel=1e-5)
  assert float(scalars["learning/grad_norm"]) == pytest.approx(0.01, rel=1e-3)
  assert not any(key.startswith("activ_") for key in scalars)


READERS = {  # in a model of four blocks whose DAs are DA_2 and DA_4
  "layers_0/connection/embedding_norm": 2,
  "layers_0/connection/output_norm": 2,
  "layers_1/connection/output_norm": 2,
  "layers_2/connection/output_norm": 4,
  "layers_2/connection/depth_aggregate": 2,
  "layers_3/connection/output_norm": 4,
  "layers_3/connection/final_depth_aggregate": 4,
}


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_of_norms_count_for_the_first_da_that_reads_what_they_norm(scan_layers):
  norms = {"mudd_pre_norm": True, "mudd_post_norm": True, "mudd_block_period": 2, "base_num_decoder_layers": 4}
  _, _, gradients = steps.value_and_gradients(models.config(mudd=True, **norms))
  of_connections = {"/".join(path): x for path, x in gradients.items() if "connection" in path}
  squares = {2: 0.0, 4: 0.0}
  for path, x in of_connections.items():
    (da,) = {da for start, da in READERS.items() if path.startswith(f"decoder/{start}/")}
    squares[da] += np.square(x.astype(np.float64)).sum()
  cfg = models.config(mudd=True, scan_layers=scan_layers, **norms)
  step, state = steps.prepare(cfg)
  if scan_layers:
    values = layout.stack(models.randomise(models.build(models.config(mudd=True, **norms))), cfg)
    for path, variable in nnx.to_flat_state(state["model"].filter(nnx.Param)):
      variable.set_value(jax.numpy.asarray(values["/".join(map(str, path))]))
  parts = {da: float(x) for da, x in step(state, models.batch(cfg))[1][instability.TOTALS]["grad_norm"].items()}
  for da, expected in squares.items():
    assert parts.pop(da) == pytest.approx(expected**0.5, rel=1e-5)
  assert not any(parts.values())


@pytest.mark.parametrize(
  ("family", "keys"),
  [
    ("hyper_connections", {}),
    ("mhc", {}),
    ("attnres", {}),
    ("dca", {}),
    ("dca", {"mudd_dca_sources": "middle_sum", "mudd_dca_k": 1}),
    ("dca", {"mudd_dca_weights": "v2"}),
  ],
)
def test_totals_of_other_families(family, keys):
  """DeepCrossAttention alone has weights that are not bounded, unless they are static."""
  cfg = models.config(mudd=True, depth_connection=family, base_num_decoder_layers=3, **keys)
  step, state = steps.prepare(cfg)
  metrics = jax.eval_shape(step, state, models.batch(cfg))[1]
  assert ("mudd/max_weight" in metrics["scalar"]) == (family == "dca" and "mudd_dca_weights" not in keys)
  assert "mudd/grad_norm" in metrics["scalar"]


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", ["hyper_connections", "mhc", "attnres", "dca"])
def test_the_gradient_norm_of_other_families_is_that_of_their_parameters(family, scan):
  cfg = models.config(mudd=True, depth_connection=family, base_num_decoder_layers=3, scan_layers=scan)
  step, state = steps.prepare(cfg)
  scalars = step(state, models.batch(cfg))[1]["scalar"]
  _, _, gradients = steps.value_and_gradients(cfg)
  squares = [np.square(x.astype(np.float64)).sum() for path, x in gradients.items() if "connection" in path]
  assert squares
  assert float(scalars["mudd/grad_norm"]) == pytest.approx(sum(squares) ** 0.5, rel=1e-5)


def test_gradients_that_stay_clipped_are_not_counted():
  """With the optimizer's state on the host MaxText does not say by how much it clipped them."""
  clipped = {"gradient_clipping_threshold": 1.0, "optimizer_memory_host_offload": True, "hardware": "cpu"}
  cfg = models.config(mudd=True, base_num_decoder_layers=1, **clipped)
  _, metrics = reporting.with_connection_totals(lambda *_: ({}, {"scalar": {}}))(None, cfg)
  assert "mudd/grad_norm" not in metrics["scalar"]


def test_the_plain_model_has_no_totals():
  cfg = models.config(base_num_decoder_layers=1)
  step, state = steps.prepare(cfg)
  metrics = jax.eval_shape(step, state, models.batch(cfg))[1]
  assert not [key for key in (*metrics, *metrics["scalar"]) if key.startswith("mudd")]


def warnings(watch, series) -> list[tuple[int, str]]:
  found = [(step, watch.warning(step, totals)) for step, totals in enumerate(series)]
  return [(step, sentence) for step, sentence in found if sentence]


def test_sudden_growth_is_warned_of_once():
  """Of the gradient norm and of the largest weight alike; the DA with the largest total is named."""
  calm = [{"max_weight": {1: 0.5, 2: 0.9}, "grad_norm": {1: 0.03, 2: 0.04}}] * 60
  for name, grown in (("max_weight", {1: 9.5, 2: 0.9}), ("grad_norm", {1: 0.6, 2: 0.04})):
    watch = instability.Watch(["a lower learning_rate", "another key"], ["mudd_pre_norm=true"])
    ((step, sentence),) = warnings(watch, [*calm, *[calm[0] | {name: grown}] * 50])
    assert step == 60
    assert sentence.startswith(f"step 60: mudd/{name} is ")
    assert "of DA_1 (da_001 in the metrics)" in sentence
    assert sentence.endswith(
      "with a lower learning_rate or another key; a new run is stable at higher rates with mudd_pre_norm=true."
    )


@pytest.mark.parametrize("name", ["grad_norm", "max_weight"])
def test_a_total_that_is_not_finite_is_warned_of(name):
  series = [{name: {1: 0.1, 2: 0.2}}] * 60 + [{name: {1: 0.1, 2: float("nan")}}]
  ((step, sentence),) = warnings(instability.Watch([]), series)
  assert (step, f"mudd/{name} is nan" in sentence, "of DA_2 (da_002" in sentence) == (60, True, True)


@pytest.mark.parametrize(
  "series",
  [
    [0.01 * 1.02**k for k in range(400)],  # a hundred steps of the window make 2.7 of it
    [0.001] * 60 + [0.5] * 60,  # dynamic weights leave zero, and are smaller than a static one
    [1.0] * 20 + [30.0] * 60,  # before there is a median to compare with
  ],
)
def test_what_is_no_sudden_growth(series):
  assert not warnings(instability.Watch([]), [{"max_weight": {1: x}} for x in series])


SCALARS = {"learning/loss": np.float32(1), "learning/total_weights": 1, "perf/step_time_seconds": 1.0}
SCALARS |= {"perf/per_device_tflops_per_sec": 1.0, "perf/per_device_tokens_per_sec": 1.0}


def test_the_logger_of_metrics_warns(caplog):
  """With the keys that the family has and the run does not set."""
  cfg = models.config(mudd=True, mudd_pre_norm=True, enable_tensorboard=False)
  logger = metric_logger.MetricLogger(cfg, lambda step: 0.1)
  with caplog.at_level("WARNING"):
    for step in range(70):
      parts = {"grad_norm": {1: np.float32(0.1), 2: np.float32(0.1 if step < 60 else 7)}}
      logger.write_metrics({"scalar": SCALARS, "scalars": {}, instability.TOTALS: parts}, step)
  (text,) = [record.getMessage() for record in caplog.records if "mudd/grad_norm" in record.getMessage()]
  assert "step 60" in text
  assert "of DA_2 (da_002" in text
  assert text.endswith(
    "with a lower learning_rate or a lower mudd_learning_rate_factor; a new run is stable at higher rates with "
    "mudd_post_norm=true."
  )


ADVICE = [
  ({}, "mudd_pre_norm=true mudd_post_norm=true"),
  ({"mudd_ways": 1}, "mudd_pre_norm=true mudd_post_norm=true"),
  ({"mudd_pre_norm": True, "mudd_post_norm": True}, None),
  ({"mudd_post_norm": True}, "mudd_pre_norm=true"),
  ({"mudd_post_norm": True, "mudd_static_start": "zero"}, "mudd_pre_norm=true mudd_static_start=released"),
  ({"mudd_dense_streams": "qkv"}, "mudd_pre_norm=true"),  # X_i is the residual stream, and has no post-norm
  ({"depth_connection": "mhc"}, None),
]


@pytest.mark.parametrize(("keys", "advice"), ADVICE)
def test_advice_can_be_followed(keys, advice, caplog):
  cfg = models.config(mudd=True, enable_tensorboard=False, **keys)
  logger = metric_logger.MetricLogger(cfg, lambda step: 0.1)
  with caplog.at_level("WARNING"):
    for step in range(60):
      logger.write_metrics(
        {"scalar": SCALARS, "scalars": {}, "mudd": {"grad_norm": {1: 0.1 if step < 55 else 9.0}}}, step
      )
  (text,) = [record.getMessage() for record in caplog.records if "mudd/grad_norm" in record.getMessage()]
  if advice is None:
    assert "a new run" not in text
  else:
    assert text.endswith(f"a new run is stable at higher rates with {advice}.")
    models.config(mudd=True, **(keys | {key: yaml.safe_load(x) for key, x in (y.split("=") for y in advice.split())}))


@pytest.mark.slow
def test_from_a_train_step_to_the_console(tmp_path, capsys):
  """Weights that grow between two train steps are warned of on the console; each step's totals are in metrics_file."""
  file = tmp_path / "metrics.jsonl"
  keys = {"base_output_directory": str(tmp_path), "enable_tensorboard": False, "metrics_file": str(file)}
  cfg = models.config(mudd=True, base_num_decoder_layers=2, learning_rate=1e-6, opt_type="sgd", steps=56, **keys)
  step, state = steps.prepare(cfg)
  step(state, models.batch(cfg))  # what the compiler says is not of this test
  logger = metric_logger.MetricLogger(cfg, lambda step: cfg.learning_rate)
  logger.write_setup_info_to_tensorboard(state["model"])
  with console.Console(holds_output=False):
    console.start(cfg)
    for number in range(56):
      if number == 54:
        parameters = nnx.to_flat_state(state["model"].filter(nnx.Param))
        (w2,) = [x for path, x in parameters if path[-2:] == ("depth_aggregate", "w2")]  # of DA_1
        w2.set_value(1000 * w2.get_value())
      state, metrics = step(state, models.batch(cfg))
      logger.buffer_and_write_metrics(metrics, number, datetime.timedelta(seconds=1))
    logger.flush_metrics_and_cleanup()
  (line,) = [line for line in capsys.readouterr().err.splitlines() if "mudd/" in line]
  assert line.startswith("warning: step 54: mudd/max_weight is ")
  assert "of DA_1 (da_001 in the metrics)" in line
  written = [json.loads(line) for line in file.read_text().splitlines()]
  assert len(written) == 56
  assert all(x["mudd/max_weight"] > 0 and x["mudd/grad_norm"] > 0 for x in written)
