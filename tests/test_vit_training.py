"""Training image classifiers: the optimizer, the step of every family, devices, runs and how they resume."""

import json
import math
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import omegaconf
import pytest

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.vit import config as vit_config
from maxtext_mudd.vit import data, run, step, train
from tests import runs, vit_models


def test_the_learning_rate_rises_and_falls_to_zero():
  rate = step.learning_rate(vit_models.config(learning_rate=0.5, warmup_steps=10, steps=110))
  for done, expected in ((0, 0.0), (5, 0.25), (10, 0.5), (60, 0.25), (110, 0.0)):
    assert rate(done) == pytest.approx(expected, abs=1e-7)
  assert rate(35) == pytest.approx(0.25 * (1 + math.cos(math.pi / 4)), rel=1e-6)


@pytest.mark.parametrize("name", ["MUDD with norms", pytest.param("DHC×4", marks=pytest.mark.slow)])
def test_kernels_and_matrices_alone_are_decayed(name):
  """With gradients of zero, a step is the decay."""
  config = vit_models.config(**vit_models.FAMILIES[name], depth=2, learning_rate=0.1, weight_decay=0.5)
  optimizer = step.make_optimizer(config)
  params = jax.eval_shape(step.make_program(config, vit_models.mesh()).init).params
  params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params)

  @jax.jit
  def second_update(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = optimizer.update(zeros, optimizer.init(params), params)  # the first step has a rate of zero
    return optimizer.update(zeros, state, params)[0]

  decayed = {"kernel", "w1", "w2", "w_alpha"}
  for path, update in second_update(params).flat_state():
    np.testing.assert_allclose(update, -0.05 if path[-1] in decayed else 0.0, rtol=1e-6, err_msg=str(path))


def test_mix_up():
  """Shares add to one; each image keeps the larger one, and the rest is of the image before it."""
  rng = np.random.default_rng(0)
  inputs, targets = rng.standard_normal((4, 2, 2, 1)), np.eye(4)
  mixed, of_targets = step.mix_up(jax.random.key(0), 0.9, inputs, targets)
  share = float(of_targets[0, 0])
  assert 0.5 < share < 0.999
  np.testing.assert_allclose(of_targets, share * targets + (1 - share) * np.roll(targets, 1, 0), rtol=1e-6)
  np.testing.assert_allclose(mixed, share * inputs + (1 - share) * inputs[[3, 0, 1, 2]], rtol=1e-5, atol=1e-6)


def trained(name, **keys):
  """The losses of steps on one batch, and the parameters that did not change."""
  config = vit_models.config(**vit_models.FAMILIES[name], steps=50, learning_rate=0.01, **keys)
  program = step.make_program(config, vit_models.mesh())
  state = program.init()
  before = {path: np.asarray(x) for path, x in state.params.flat_state()}
  batch = next(data.train_iterator(config, data.source(config, "train")))
  losses = []
  for _ in range(8):
    state, metrics = program.train(state, *program.place(batch))
    losses.append(float(metrics["loss"]))
  return losses, {"/".join(map(str, p)) for p, x in state.params.flat_state() if (np.asarray(x) == before[p]).all()}


@pytest.mark.slow
@pytest.mark.parametrize("name", vit_models.FAMILIES)
def test_every_family_trains(name):
  losses, unchanged = trained(name)
  assert np.isfinite(losses).all()
  assert losses[0] == pytest.approx(math.log(10), rel=1e-5)  # the head starts at zero
  assert losses[-1] < losses[0] - 0.05
  assert not unchanged


TINY = [f"{key}={value}" for key, value in (vit_models.SMALL | vit_models.NORMS | {"depth": 2}).items()]


def arguments(tmp_path, *further):
  return ["vit/vit_small.yml", *TINY, f"output={tmp_path}", "run_name=r", "log_interval=1", *further]


def test_a_run_and_what_is_refused_to_write_to_its_folder(tmp_path, capsys):
  given = arguments(tmp_path, "eval_interval=3", "checkpoint_interval=3")
  assert train.main(given) == 0
  folder = tmp_path / "r"
  records = run.read_metrics(folder / "metrics.jsonl")
  assert [x["step"] for x in records if "loss" in x] == [1, 2, 3, 4, 5, 6]
  assert [x["step"] for x in records if "accuracy" in x] == [3, 6]
  assert (folder / "curve.png").stat().st_size > 5000
  assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["6"]  # checkpoints_kept=1
  assert vit_config.build(omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(folder / "config.yml"))).mudd
  capsys.readouterr()

  before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"}
  assert train.main(given) == 0  # nothing is left to do
  assert f"{folder}: eval loss {records[-1]['eval_loss']:.4f}, " in capsys.readouterr().out
  assert train.main([*given, "learning_rate=0.5"]) == 2
  assert capsys.readouterr().err == (
    f"maxtext-mudd: {folder} is a run with learning_rate=0.002, and not learning_rate=0.5; give this run another "
    "run_name, or repeat the command of that run to resume it.\n"
  )
  assert {path: path.read_bytes() for path in before} == before

  (folder / "config.yml").unlink()
  assert train.main(given) == 2
  assert "exists and is no run of an image classifier; give this run another run_name." in capsys.readouterr().err


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
  assert train.main(arguments(tmp_path, "learning_rate=1e30", "gradient_clip=0")) == 2
  assert "is nan; lower learning_rate=1e+30." in capsys.readouterr().err


def test_an_incomplete_line_of_metrics_is_left_out(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
  assert run.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
  ("keys", "sentence"),
  [
    ({"fsdp": 3}, "fsdp=3 does not divide the {} devices; use a divisor of {}."),
    (
      {"data_parallelism": 7},
      "data_parallelism=7 times fsdp=1 is not the number of devices, {}; use data_parallelism={}.",
    ),
  ],
)
def test_devices_that_are_not_there(keys, sentence):
  devices = jax.device_count()
  if devices % 3 == 0 or devices == 7:
    pytest.skip("these devices are there")
  with pytest.raises(ConfigError) as error:
    step.make_mesh(vit_models.config(**keys))
  assert str(error.value) == sentence.format(devices, devices)


def on_devices(number, keys):
  done = subprocess.run(
    [sys.executable, "-m", "tests.vit_on_mesh", json.dumps(keys)],
    cwd=runs.ROOT,
    env=runs.environment(XLA_FLAGS=f"--xla_force_host_platform_device_count={number}"),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes():
  names = ("MUDD with norms", "DCA")
  keys = [vit_models.FAMILIES[name] | {"dropout": 0.2, "mixup": 0.2, "crop": "pad", "depth": 2} for name in names]
  expected = on_devices(1, keys)
  for fsdp, parts in ((1, 1), (4, 4)):
    found = on_devices(8, [x | {"fsdp": fsdp} for x in keys])
    for name, one, eight in zip(names, expected, found):
      assert (one["devices"], eight["devices"], eight["parts"]) == (1, 8, parts)
      np.testing.assert_allclose(eight["metrics"], one["metrics"], rtol=2e-5, err_msg=name)
      np.testing.assert_allclose(eight["sums"], one["sums"], rtol=2e-5, err_msg=name)


LONG = [
  *("steps=240", "warmup_steps=10", "eval_interval=100", "checkpoint_interval=20"),
  *("dropout=0.1", "mixup=0.2", "crop=pad", "flip=true"),
]


def start(tmp_path, run=subprocess.run, **kwargs):
  command = [sys.executable, "-m", "maxtext_mudd.vit.train", *arguments(tmp_path, *LONG)]
  kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **kwargs}
  return run(command, cwd=runs.ROOT, env=runs.environment(), **kwargs)


def losses(folder):
  return {x["step"]: x["loss"] for x in run.read_metrics(folder / "metrics.jsonl") if "loss" in x}


def leaves(folder):
  """The parameters of the last checkpoint, and what else it has."""
  import orbax.checkpoint as ocp

  restored = ocp.StandardCheckpointer().restore((folder / "checkpoints" / "240" / "state").absolute())
  return [np.asarray(x) for x in jax.tree.leaves(restored)]


@pytest.mark.slow
def test_a_killed_run_resumes_bit_by_bit(tmp_path):
  """Killed twice, wherever it is, which may be within a checkpoint or a line of metrics."""
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  start(whole, check=True)
  for after in (45, 130):
    with start(killed, run=subprocess.Popen) as process:
      end = time.monotonic() + 300
      while process.poll() is None and time.monotonic() < end:
        if max(losses(killed / "r"), default=0) >= after:
          process.send_signal(signal.SIGKILL)
          break
        time.sleep(0.002)
      process.wait()
    assert process.returncode == -signal.SIGKILL
    assert after <= max(losses(killed / "r")) < 240
  assert "resuming from" in start(killed, check=True).stdout
  assert losses(killed / "r") == losses(whole / "r")
  assert len(losses(whole / "r")) == 240
  for one, other in zip(leaves(whole / "r"), leaves(killed / "r"), strict=True):
    np.testing.assert_array_equal(one, other)
