"""`convert upcycle`: a trained plain model with connections computes what it computed, and its run goes on."""

import pathlib

from flax import nnx, traverse_util
import jax
from maxtext.common import train_state_nnx
from maxtext.utils import maxtext_utils, model_creation_utils, train_utils
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from maxtext_mudd import connections, convert
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.checkpoints import layout, model_config, model_folder, orbax_folder
from tests import models
from tests.blocks import BLOCKS, config_of, packed

BOTH_NORMS = {"mudd_pre_norm": True, "mudd_post_norm": True}
# Initial values of some of the families depend on the seed, and in part on the number of sources.
FAMILIES = {
  "MUDD": {},
  "both norms, norms of block 1": {**BOTH_NORMS, "mudd_first_block_norms": "separate"},
  "value stream, in the upper half": {"mudd_dense_streams": "vr", "mudd_depth_start": 0.5},
  "DDFormer, scaled weights": {"mudd_ways": 1, "mudd_weight_scale": True},
  "DenseFormer": {"mudd_ways": 1, "mudd_dynamic": False},
  "hyper-connections": {"depth_connection": "hyper_connections"},
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


def config_file(folder: pathlib.Path, block: str = "llama2", **keys) -> str:
  """A file of the small models of the tests."""
  file = folder / f"{block}.yml"
  keys = models.SMALL | {"decoder_block": block} | BLOCKS[block][0] | {"remat_policy": "none", **keys}
  file.write_text(yaml.safe_dump({"base_config": "base.yml", **keys}))
  return str(file)


def save(path: pathlib.Path, values, root=("params", "params")) -> pathlib.Path:
  """A folder of parameters, as MaxText saves them."""
  nested = traverse_util.unflatten_dict({(*root, *name.split("/")): x for name, x in values.items()})
  ocp.PyTreeCheckpointer().save(path, nested)
  return path


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
  cfg = model_config.build(keys | overrides)
  return cfg, {name: tensor.read() for name, tensor in orbax_folder.parameters(folder / "items").items()}


def op_by_op(model, data):
  with jax.disable_jit():
    return np.asarray(models.logits(model, data))


def check_logits(folder: pathlib.Path, plain) -> None:
  """Bit for bit, op by op: under jit the compiler may fuse the sums of two models in different ways."""
  cfg, values = read(folder)
  model = models.build(cfg)
  models.set_parameters(model, values)
  data = packed(cfg)
  expected = op_by_op(plain, data)
  assert np.std(expected) > 0.1
  np.testing.assert_array_equal(op_by_op(model, data), expected)


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
  assert values.keys() - expected.keys() == {name for name in new if "connection" in name.split("/")}
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

  with jax.default_prng_impl("unsafe_rbg"), jax.set_mesh(mesh):
    return maxtext_utils.setup_training_state(None, cfg, mesh, None, make)[0]


def new_model(cfg) -> dict[str, np.ndarray]:
  """The parameters with which MaxText's trainer starts, of single layers."""
  flat = nnx.to_flat_state(new_state(cfg)["model"].filter(nnx.Param))
  values = {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat}
  return layout.unstack(values, cfg) if cfg.scan_layers else values


def slow_but(fast, cases):
  return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("family", slow_but(("both norms, norms of block 1", "hyper-connections"), FAMILIES))
def test_families(family, tmp_path):
  plain, values = trained(base_num_decoder_layers=4)
  source, target = save(tmp_path / "stock", values), tmp_path / "m"
  file = config_file(tmp_path, base_num_decoder_layers=4)
  upcycle(source, target, file, *written({"mudd": True, "init_weights_seed": 7, **FAMILIES[family]}))
  check_logits(target, plain)
  check_parameters(target, values, seed=7)


@pytest.mark.parametrize("block", slow_but(("qwen3", "pythia"), BLOCKS))
def test_blocks(block, tmp_path):
  plain, values = trained(block=block)
  source, target = save(tmp_path / "stock", values), tmp_path / "m"
  upcycle(source, target, config_file(tmp_path, block), "mudd=true")
  check_logits(target, plain)


@pytest.mark.parametrize(
  ("before", "after"), [(True, True), (True, False), pytest.param(False, True, marks=pytest.mark.slow)]
)
def test_layouts(before, after, tmp_path):
  """Scanned and single layers, of the checkpoint and of the new model."""
  keys = {"base_num_decoder_layers": 4}
  plain, values = trained(**keys, scan_layers=before)
  singles = layout.unstack(values, plain.config) if before else values
  source, target = save(tmp_path / "stock", values), tmp_path / "m"
  upcycle(source, target, config_file(tmp_path, **keys), "mudd=true", *written({"scan_layers": after}))
  check_logits(target, plain)
  check_parameters(target, singles)


def test_every_family_is_upcycled_or_refused():
  cases = [*FAMILIES.values(), *REFUSED.values()]
  assert {keys.get("depth_connection", connections.DEFAULT) for keys in cases} == connections.FAMILIES.keys()


@pytest.mark.parametrize("setting", REFUSED)
def test_refused_families_change_logits(setting):
  """Of a plain model, even if its parameters are initial ones."""
  keys = {"remat_policy": "none", "base_num_decoder_layers": 4}
  stock, cfg = config_of("llama2", **keys), config_of("llama2", **keys, mudd=True, **REFUSED[setting])
  assert connections.family(cfg).why_not_plain(cfg).startswith(setting)
  data = packed(cfg)
  assert (op_by_op(models.build(cfg), data) != op_by_op(models.build(stock), data)).any()
