"""Plain models and their checkpoints, to upcycle, and what upcycled models have to be."""

import pathlib

from flax import nnx, traverse_util
import jax
from maxtext.checkpoint_conversion.utils import utils as conversion
from maxtext.common import train_state_nnx
from maxtext.utils import maxtext_utils, model_creation_utils, train_utils
import numpy as np
import orbax.checkpoint as ocp
import yaml

from maxtext_mudd import connections, convert
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.checkpoints import layout, model_config, model_folder, orbax_folder
from tests import models
from tests.blocks import KEYS, config_of, packed


def written(keys) -> list[str]:
  """Keys as a command line has them."""
  return [f"{key}={str(x).lower() if isinstance(x, bool) else x}".replace("'", "") for key, x in keys.items()]


def keys_of(block: str, **keys) -> dict:
  return models.SMALL | {"decoder_block": block} | KEYS[block] | {"remat_policy": "none", **keys}


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
