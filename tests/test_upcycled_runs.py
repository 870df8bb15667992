"""`convert upcycle --run`: the run of a plain model goes on as one with connections."""

import pathlib

from flax import nnx, traverse_util
import jax
from maxtext.common import train_state_nnx
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxtext_mudd import convert
from maxtext_mudd.checkpoints import layout, train_state
from tests import models, runs
from tests.blocks import config_of, packed
from tests.upcycling import (
  check_logits,
  config_file,
  keys_of,
  new_model,
  new_state,
  op_by_op,
  save,
  trained,
  upcycle,
  written,
)

STEP = 5


def plain_run(folder: pathlib.Path, block: str = "llama2", **keys) -> dict[str, np.ndarray]:
  """Writes a checkpoint of a plain run, with random moments and a data position; returns the train state by path."""
  tree = train_state_nnx.to_checkpoint_dict(new_state(config_of(block, **keys)))
  aux = traverse_util.flatten_dict(tree.pop("nnx_aux", {}))
  kept = {path: x for path, x in aux.items() if "rngs" not in path}  # the conversion makes random states anew
  tree |= {"nnx_aux": traverse_util.unflatten_dict(kept)} if kept else {}
  rng = np.random.default_rng(3)

  def filled(x):
    if np.issubdtype(x.dtype, np.floating):
      return jax.numpy.asarray(rng.uniform(0.1, 1, x.shape), x.dtype)
    return jax.numpy.asarray(rng.integers(0, 4, x.shape) if x.ndim else STEP + 1, x.dtype)  # numbers of experts; counts

  checkpoint = folder / "checkpoints" / str(STEP)
  ocp.PyTreeCheckpointer().save(checkpoint / "items", jax.tree.map(filled, tree))
  (checkpoint / "iter").mkdir()
  (checkpoint / "iter" / "process_0-of-1.json").write_text("row 7")
  return train_state.read(checkpoint)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_keeps_its_optimizer_state(scan, tmp_path):
  keys = {"scan_layers": scan}
  before = plain_run(tmp_path / "a", **keys)
  checkpoint, target = tmp_path / "a" / "checkpoints" / str(STEP), tmp_path / "b"
  command = ["upcycle", "--checkpoint", str(checkpoint), "--run", str(target)]
  convert.main([*command, config_file(tmp_path, **keys), "mudd=true"])
  after = train_state.read(target / "checkpoints" / str(STEP))
  assert (target / "checkpoints" / str(STEP) / "iter" / "process_0-of-1.json").read_text() == "row 7"
  cfg = config_of("llama2", **keys, mudd=True)
  if scan:
    before, after = layout.unstack(before, cfg), layout.unstack(after, cfg)

  roots = ("params/params/", "opt_state/0/mu/params/", "opt_state/0/nu/params/")
  copied = 0
  for path, x in before.items():
    norm = path.rpartition("/")[0]
    if norm.endswith("pre_self_attention_layer_norm") and "layers_0" not in path:
      copied += 1
      for stream in "qkv":
        np.testing.assert_array_equal(after.pop(f"{norm}/{stream}/scale"), x, err_msg=path)
    else:
      np.testing.assert_array_equal(after.pop(path), x, err_msg=path)
  assert copied == 2 * 3  # of two blocks: norm and moments
  of_connections = {path.split("connection/")[1] for path in after}
  assert of_connections == {
    f"{da}/{name}" for da in ("depth_aggregate", "final_depth_aggregate") for name in ("w1", "w2", "a")
  }
  new = new_model(cfg)
  for path, x in after.items():
    root = next(root for root in roots if path.startswith(root))
    expected = new[path.removeprefix(root)] if root == roots[0] else np.zeros_like(x)
    np.testing.assert_array_equal(x, expected, err_msg=path)
  assert {path.split("decoder/")[0] for path in after} == set(roots)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_a_run_keeps_state_that_is_no_parameter(scan, tmp_path):
  """Router biases, and tables by which layers choose experts."""
  keys = {"scan_layers": scan}
  before = plain_run(tmp_path / "a", block="deepseek4", **keys)
  checkpoint, target = tmp_path / "a" / "checkpoints" / str(STEP), tmp_path / "b"
  command = ["upcycle", "--checkpoint", str(checkpoint), "--run", str(target), config_file(tmp_path, "deepseek4")]
  convert.main([*command, "mudd=true", *written(keys_of("deepseek4", **keys))])
  after = train_state.read(target / "checkpoints" / str(STEP))
  state = [path for path in before if path.startswith("nnx_aux/")]
  assert len(state) >= 2
  for path in state:
    np.testing.assert_array_equal(after[path], before[path], err_msg=path)
  logits = [logits_of(config_of("deepseek4", mudd=mudd, **keys), x) for mudd, x in ((False, before), (True, after))]
  assert np.std(logits[0]) > 0.1
  np.testing.assert_array_equal(*logits)


def logits_of(cfg, train_state) -> np.ndarray:
  """Of the model of a train state, op by op."""
  model = models.build(cfg)
  state = nnx.state(model)
  for path, variable in nnx.to_flat_state(state):
    name = "/".join(map(str, path))
    value = train_state.get(f"params/params/{name}", train_state.get(f"nnx_aux/model/{name}"))
    assert value is not None or not isinstance(variable, nnx.Param), name
    if value is not None:
      variable.set_value(jax.numpy.asarray(value))
  nnx.update(model, state)
  return op_by_op(model, packed(cfg))


def test_a_run_keeps_the_state_of_muon(tmp_path):
  """Each optimizer has moments of its own parameters only."""
  keys = {"scan_layers": True, "opt_type": "muon"}
  before = plain_run(tmp_path / "a", **keys)
  command = ["upcycle", "--checkpoint", str(tmp_path / "a" / "checkpoints" / str(STEP)), "--run", str(tmp_path / "b")]
  convert.main([*command, config_file(tmp_path, **keys), "mudd=true"])
  after = train_state.read(tmp_path / "b" / "checkpoints" / str(STEP))
  moments = {path: x for path, x in after.items() if path.startswith("opt_state/") and "/connection/" in path}
  assert not any(x.any() for x in moments.values())
  of_muon = {path.rpartition("/")[2] for path in moments if "/muon/" in path}
  of_adam = {path.rpartition("/")[2] for path in moments if "/adam/" in path}
  assert (of_muon, of_adam) == ({"w1", "w2"}, {"a"})
  kept = [path for path in before if path.startswith("opt_state/") and path.endswith("query/kernel")]
  assert kept and all(np.array_equal(after[path], before[path]) for path in kept)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_the_run_goes_on(scan, tmp_path):
  """The first step after upcycling has the loss of the plain run, on the same batch; then connections learn."""
  common = [*runs.build_corpus(tmp_path), "learning_rate_schedule_steps=6", "async_checkpointing=false"]
  common += ["mudd_ffn_reallocation=false", f"scan_layers={str(scan).lower()}", "learning_rate=0.01"]
  plain = [*common, "mudd=false"]

  def train(name, steps, *keys):
    return runs.train(runs.LAUNCHER, runs.RUN_YML, tmp_path, name, f"steps={steps}", *keys)

  train("plain", 3, *plain)
  checkpoint = str(tmp_path / "plain" / "checkpoints" / "2")
  convert.main(["upcycle", "--checkpoint", checkpoint, "--run", str(tmp_path / "kept"), runs.RUN_YML, *common])
  upcycle(checkpoint, tmp_path / "m", runs.RUN_YML, *common)
  expected, kept = train("plain", 6, *plain), train("kept", 6, *common)
  assert sorted(kept) == [3, 4, 5]
  assert kept[3] == pytest.approx(expected[3], rel=1e-6)
  assert kept[5] != pytest.approx(expected[5], rel=1e-4)
  fresh = train("fresh", 2, *common, f"load_parameters_path={tmp_path / 'm' / 'items'}")
  new = train("new", 1, *common)
  assert fresh[0] < new[0] - 0.05  # it has learned


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_layouts_of_layers_that_are_two_blocks(scan, tmp_path):
  """And moments of the optimizer, which move with their parameters."""
  plain, values = trained(block="gemma2", scan_layers=scan)
  source, target = save(tmp_path / "stock", values), tmp_path / "m"
  upcycle(source, target, config_file(tmp_path, "gemma2"), "mudd=true", *written({"scan_layers": not scan}))
  check_logits(target, plain)

  before = plain_run(tmp_path / "a", block="gemma2", scan_layers=scan)
  checkpoint, target = tmp_path / "a" / "checkpoints" / str(STEP), tmp_path / "b"
  command = ["upcycle", "--checkpoint", str(checkpoint), "--run", str(target)]
  convert.main([*command, config_file(tmp_path, "gemma2", scan_layers=scan), "mudd=true"])
  after = train_state.read(target / "checkpoints" / str(STEP))
  layer = "opt_state/0/mu/params/decoder/layers" + ("" if scan else "_1")
  for k, side in enumerate(("local", "global")):
    moment, norm = f"{layer}/half_{k}/self_attention/query/kernel", f"{layer}/half_{k}/pre_self_attention_norm"
    np.testing.assert_array_equal(after[moment], before[f"{layer}/self_attention_{side}/query/kernel"])
    np.testing.assert_array_equal(after[f"{norm}/q/scale"], before[f"{layer}/pre_self_attention_norm_{side}/scale"])
