"""`convert upcycle`: a trained plain model with connections computes what it computed, and its run goes on."""

import pathlib

from flax import nnx, traverse_util
import jax
from maxtext.checkpoint_conversion.utils import utils as conversion
from maxtext.common import train_state_nnx
from maxtext.utils import maxtext_utils, model_creation_utils, train_utils
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from maxtext_mudd import connections, convert
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.checkpoints import layout, model_config, model_folder, orbax_folder, train_state
from tests import models, runs
from tests.blocks import BLOCKS, FUSED, LAYOUTS, OTHERS, config_of, packed
from tests.published import hugging_face, refusal

BOTH_NORMS = {"mudd_pre_norm": True, "mudd_post_norm": True}
# Initial values of some of the families depend on the seed, and in part on the number of sources.
FAMILIES = {
  "MUDD": {},
  "both norms, norms of block 1": {**BOTH_NORMS, "mudd_first_block_norms": "separate"},
  "post-norm alone, static weights from zero": {"mudd_post_norm": True, "mudd_static_start": "zero"},
  "value stream, in the upper half": {"mudd_dense_streams": "vr", "mudd_depth_start": 0.5},
  "DDFormer, scaled weights": {"mudd_ways": 1, "mudd_weight_scale": True},
  "shared weight MLPs": {
    "mudd_placements": [{"block": "1..2", "sources": [0, "last:1"], "streams": "vr", "mlp": "both"}]
  },
  "DenseFormer": {"mudd_ways": 1, "mudd_dynamic": False},
  "extra embeddings, both norms": {**BOTH_NORMS, "mudd_extra_embeddings": 2, "mudd_embedding_groups": 2},
  "hyper-connections": {"depth_connection": "hyper_connections"},
  "hyper-connections, static": {
    "depth_connection": "hyper_connections",
    "mudd_dynamic": False,
    "mudd_expansion_rate": 3,
  },
  "residual": {"depth_connection": "residual"},
}
# Those whose new models are not exactly the plain one: what the command says of each.
REFUSED = {
  "mudd_pre_norm=True with mudd_post_norm=False": {"mudd_pre_norm": True},
  "mudd_pre_norm=False with mudd_post_norm=True": {"mudd_post_norm": True},
  "mudd_hyper_end=sum": {"depth_connection": "hyper_connections", "mudd_hyper_end": "sum"},
  "mudd_hyper_scaled_init=True": {"depth_connection": "hyper_connections", "mudd_hyper_scaled_init": True},
  "depth_connection=mhc": {"depth_connection": "mhc"},
  "depth_connection=attnres": {"depth_connection": "attnres"},
  "depth_connection=dca": {"depth_connection": "dca"},
  "mudd_dca_sources=first_and_last": {
    "depth_connection": "dca",
    "mudd_dca_sources": "first_and_last",
    "mudd_dca_k": 1,
  },
}


def written(keys) -> list[str]:
  """Keys as a command line has them."""
  return [f"{key}={str(x).lower() if isinstance(x, bool) else x}".replace("'", "") for key, x in keys.items()]


def keys_of(block: str, **keys) -> dict:
  of_block = OTHERS[block] if block in OTHERS else BLOCKS[block][0]
  return models.SMALL | {"decoder_block": block} | of_block | {"remat_policy": "none", **keys}


def config_file(folder: pathlib.Path, block: str = "llama2", **keys) -> str:
  """A file of the small models of the tests."""
  file = folder / f"{block}.yml"
  file.write_text(yaml.safe_dump({"base_config": "base.yml", **keys_of(block, **keys)}))
  return str(file)


def save(path: pathlib.Path, values) -> pathlib.Path:
  """A folder of parameters by path, as MaxText's trainer saves them, less the moments."""
  nested = traverse_util.unflatten_dict({tuple(name.split("/")): x for name, x in values.items()})
  ocp.PyTreeCheckpointer().save(path, {"params": {"params": nested}})
  return path


def convert_as_maxtext(path: pathlib.Path, values) -> pathlib.Path:
  """The same, as MaxText's conversions from Hugging Face save them."""
  nested = traverse_util.unflatten_dict({tuple(name.split("/")): x for name, x in values.items()})
  conversion.save_weights_to_checkpoint(str(path), {"params": nested}, 1, use_ocdbt=True, use_zarr3=True)
  return path / "0"


def trained(**keys):
  """A plain model with random parameters, and these by path."""
  model = models.build(config_of(**{"block": "llama2", "remat_policy": "none", **keys}))
  return model, models.randomise(model)


def upcycle(checkpoint, target, *arguments) -> None:
  convert.main(["upcycle", "--checkpoint", str(checkpoint), "--maxtext-dir", str(target), *arguments])


def read(folder: pathlib.Path, **overrides):
  """The configuration of a model folder for the tests' data, and the parameters by path."""
  keys = model_folder.read_keys(folder) | model_config.local_keys()
  keys |= {key: models.SMALL[key] for key in ("max_target_length", "per_device_batch_size")}
  overrides |= {"remat_policy": "none", "attention": "dot_product", "dtype": "float32"}
  return model_config.build(keys | overrides), read_parameters(folder)


def read_parameters(folder: pathlib.Path):
  return {name: tensor.read() for name, tensor in orbax_folder.parameters(folder / "items").items()}


def op_by_op(model, data):
  with jax.disable_jit(model.config.scan_layers):  # a loop over layers is compiled otherwise
    return np.asarray(models.logits(model, data))


def check_logits(folder: pathlib.Path, plain, tolerance: float = 0, cfg=None) -> None:
  """Bit for bit, op by op: under jit the compiler may fuse the sums of two models in different ways.

  Args:
    cfg: the configuration of the new model; default: that of the folder.
  """
  cfg = cfg or read(folder)[0]
  model = models.build(cfg)
  models.set_parameters(model, read_parameters(folder))
  data = packed(cfg)
  expected = op_by_op(plain, data)
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(op_by_op(model, data), expected, rtol=0, atol=tolerance)


def check_parameters(folder: pathlib.Path, stock: dict[str, np.ndarray], seed: int = 0) -> None:
  """The trained ones of a model of single layers, its norm as each of LN_q, LN_k and LN_v; others as a new model has
  them, which MaxText's trainer makes in this way."""
  cfg, values = read(folder, init_weights_seed=seed)
  if cfg.scan_layers:
    values = layout.unstack(values, cfg)
  norm, plan, expected = block_spec(cfg).attention_norm, connections.plan(cfg), {}
  for name, x in stock.items():
    parts = name.split("/")
    if norm in parts and plan.has_separate_norms(int(parts[1].removeprefix("layers_")) + 1):
      at = parts.index(norm) + 1
      expected |= {"/".join([*parts[:at], stream, *parts[at:]]): x for stream in "qkv"}
    else:
      expected[name] = x
  for name in values.keys() & expected.keys():
    np.testing.assert_array_equal(values[name], expected[name], err_msg=name)
  new = new_model(cfg)
  is_added = {"connection", "extra_embeddings"}.intersection
  assert values.keys() - expected.keys() == {name for name in new if is_added(name.split("/"))}
  for name in values.keys() - expected.keys():
    np.testing.assert_array_equal(values[name], new[name], err_msg=name)


def new_state(cfg):
  """The state with which MaxText's trainer starts."""
  mesh = maxtext_utils.get_mesh_from_config(cfg)
  create, abstract = model_creation_utils.create_nnx_abstract_model(cfg, mesh)
  _, tx = train_utils.create_training_optimizer(cfg, abstract, mesh=mesh)

  def make():
    model = create()
    return train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))

  with jax.default_prng_impl("unsafe_rbg"):
    return maxtext_utils.setup_training_state(None, cfg, mesh, None, make)[0]


def new_model(cfg) -> dict[str, np.ndarray]:
  """The parameters with which MaxText's trainer starts, of single layers."""
  flat = nnx.to_flat_state(new_state(cfg)["model"].filter(nnx.Param))
  values = {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat}
  return layout.unstack(values, cfg) if cfg.scan_layers else values


def slow_but(fast, cases):
  """Parameters of a test, of which those that are not in `fast` are left to the slow tests."""
  marks = {True: (), False: pytest.mark.slow}
  return [pytest.param(*(x if isinstance(x, tuple) else [x]), marks=marks[x in fast]) for x in cases]


@pytest.mark.parametrize("family", slow_but(["both norms, norms of block 1"], FAMILIES))
def test_families(family, tmp_path):
  plain, values = trained()
  source, target = save(tmp_path / "stock", values), tmp_path / "m"
  upcycle(source, target, config_file(tmp_path), *written({"mudd": True, "init_weights_seed": 7, **FAMILIES[family]}))
  check_logits(target, plain)
  check_parameters(target, values, seed=7)


# model.yml cannot hold the name of the model, which its layers read: the command writes the parameters alone.
WITHOUT_MODEL_YML = ("gemma3", "gemma4_small")
# The router biases and tables of deepseek4 are no parameters: it is upcycled as a run.
UPCYCLED = [*((x, "single") for x in BLOCKS), *(case for case in LAYOUTS if case[0] != "deepseek4")]


@pytest.mark.parametrize(("block", "layout"), slow_but([("pythia", "single")], UPCYCLED))
def test_upcycled_blocks(block, layout, tmp_path):
  keys = {"scan_layers": layout == "scanned"}
  plain, values = trained(block=block, **keys)
  source, target = save(tmp_path / "stock", values), tmp_path / "m"
  cfg, sizes = None, []
  if block in WITHOUT_MODEL_YML:
    cfg = config_of(block, mudd=True, remat_policy="none", **keys)
    sizes = written(keys_of(block, **keys))  # which win over those of a model's name on the command line only
  upcycle(source, target, config_file(tmp_path, block, **keys), "mudd=true", *sizes)
  assert (target / "model.yml").exists() == (cfg is None)
  check_logits(target, plain, 5e-5 if block in FUSED else 0, cfg)  # as tests/test_blocks.py


@pytest.mark.parametrize(("before", "after"), slow_but([(True, True)], [(True, True), (True, False), (False, True)]))
def test_layouts(before, after, tmp_path):
  """Scanned and single layers, of the checkpoint and of the new model."""
  plain, values = trained(scan_layers=before)
  singles = layout.unstack(values, plain.config) if before else values
  source, target = convert_as_maxtext(tmp_path / "stock", values), tmp_path / "m"
  upcycle(source, target, config_file(tmp_path), "mudd=true", *written({"scan_layers": after}))
  check_logits(target, plain)
  check_parameters(target, singles)


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


def test_every_family_is_upcycled_or_refused():
  cases = [*FAMILIES.values(), *REFUSED.values()]
  of_package = {name for name, family in connections.FAMILIES.items() if family.__module__.startswith("maxtext_mudd.")}
  assert {keys.get("depth_connection", connections.DEFAULT) for keys in cases} == of_package


@pytest.mark.parametrize("setting", REFUSED)
def test_refused_families_change_logits(setting):
  """Of a plain model, even if its parameters are initial ones."""
  keys = {"remat_policy": "none"}
  stock, cfg = config_of("llama2", **keys), config_of("llama2", **keys, mudd=True, **REFUSED[setting])
  assert connections.family(cfg).why_not_plain(cfg).startswith(setting)
  data = packed(cfg)
  assert (op_by_op(models.build(cfg), data) != op_by_op(models.build(stock), data)).any()


STEP = 5


def plain_run(folder: pathlib.Path, block: str = "llama2", **keys) -> dict[str, np.ndarray]:
  """Writes a checkpoint of a plain run, with random moments and a data position; returns the train state by path."""
  tree = train_state_nnx.to_checkpoint_dict(new_state(config_of(block, **keys)))
  aux = traverse_util.flatten_dict(tree.pop("nnx_aux", {}))
  kept = {path: x for path, x in aux.items() if "rngs" not in path}  # the conversion makes random states anew
  tree |= {"nnx_aux": traverse_util.unflatten_dict(kept)} if kept else {}
  rng = np.random.default_rng(3)

  def filled(x):
    is_float = np.issubdtype(x.dtype, np.floating)
    return jax.numpy.asarray(rng.uniform(0.1, 1, x.shape) if is_float else np.full(x.shape, STEP + 1), x.dtype)

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


def test_refusals(tmp_path, capsys):
  """One sentence each, nothing written."""
  _, values = trained()
  stock, file = save(tmp_path / "stock", values), config_file(tmp_path)
  connected = models.build(config_of("llama2", mudd=True))
  connected = save(tmp_path / "connected", models.randomise(connected))
  target, exists = tmp_path / "m", tmp_path / "exists"
  exists.mkdir()
  advice = "name the keys that the model was trained with."

  def said(*keys, checkpoint=stock, option="--maxtext-dir", target=target):
    return refusal(capsys, "upcycle", "--checkpoint", checkpoint, option, target, file, *keys)

  assert said() == "mudd=False: upcycling adds depth connections to a model; set mudd=true."
  assert said("mudd=true", "mudd_ffn_reallocation=true", "mudd_ffn_round_to=8") == (
    "mudd_ffn_reallocation=True: the FFNs of the new model would have other widths than those of the checkpoint; set "
    "mudd_ffn_reallocation=false."
  )
  assert said("mudd=true", "mudd_pre_norm=true") == (
    "mudd_pre_norm=True with mudd_post_norm=False: with one of the two norms alone, a model does not start as the "
    "plain model, and neither does the released code; turn both on or both off, or set "
    "mudd_static_start=zero with mudd_post_norm alone."
  )
  assert said("mudd=true", "mudd_rope_table=bfloat16") == (
    "mudd_rope_table=bfloat16: the checkpoint was trained with MaxText's rotary table, which has other values; set "
    "mudd_rope_table=stock."
  )
  assert said("mudd=true", "depth_connection=dca").startswith("depth_connection=dca adds the outputs of blocks in ")
  assert "attention_type='mla' does not work with decoder_block='llama2'" in said("mudd=true", "attention_type=mla")
  assert said("mudd=true", checkpoint=connected).startswith(
    f"{connected} has decoder/layers_1/connection/depth_aggregate/a: its model has depth connections already"
  )
  assert said("mudd=true", "base_mlp_dim=128") == (
    f"{stock}: decoder/layers_0/mlp/wi_0/kernel is [32, 64], and this configuration needs [32, 128]; {advice}"
  )
  assert said("mudd=true", "base_num_decoder_layers=2") == (
    f"{stock} has decoder/layers_2/mlp/wi_0/kernel, which this configuration does not have; {advice}"
  )
  assert said("mudd=true", checkpoint=tmp_path / "none") == (
    f"{tmp_path / 'none'}: there is no such folder; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP."
  )
  assert said("mudd=true", checkpoint=hugging_face(tmp_path / "hf")) == (
    f"{tmp_path / 'hf'} is a Hugging Face folder; convert it by python3 -m maxtext.checkpoint_conversion.to_maxtext."
  )
  assert said("mudd=true", target=exists) == f"{exists} exists already; name a folder that does not."
  assert said("mudd=true", option="--run", target=exists) == f"{exists} exists already; name a run that does not."
  assert said("mudd=true", option="--run") == (
    f"{stock} is not a checkpoint of a run, which --run needs; name OUTPUT/RUN/checkpoints/STEP."
  )
  step = tmp_path / "run" / "checkpoints" / "3"
  save(step / "items", values)
  assert said("mudd=true", option="--run", checkpoint=step) == (
    f"{step / 'items'} has no optimizer state, which --run keeps; write the parameters with --maxtext-dir."
  )
  assert said("mudd=true", checkpoint=tmp_path / "run") == (
    f"{tmp_path / 'run'} is the folder of a run; name one of its checkpoints, such as {step}."
  )
  assert not target.exists() and not list(exists.iterdir()) and not list(tmp_path.glob(".*"))
