"""Models of the authors' JAX code: golden logits, their folders, and what is refused."""

import json
import re
import shutil

from flax import traverse_util
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import maxtext_mudd
from maxtext_mudd import convert
from maxtext_mudd.checkpoints import layout as layouts
from maxtext_mudd.checkpoints import model_config, model_folder, tensors
from maxtext_mudd.checkpoints import orbax_folder as saved
from maxtext_mudd.checkpoints.authors_jax import config_json as fork_config
from maxtext_mudd.checkpoints.authors_jax import models as fork
from maxtext_mudd.config.errors import ConfigError
from tests import models
from tests.published import LAYOUTS, LOGITS_TOLERANCE, check_same, each_layout, fork_folder

FORK = ("muddjax_plain", "muddjax_prepost")


@pytest.mark.parametrize(("name", "layout"), each_layout(FORK, [("muddjax_plain", "single")]))
def test_golden_logits_of_the_fork(name, layout):
  model, _ = maxtext_mudd.from_pretrained(models.DATA / name, scan_layers=LAYOUTS[layout])
  golden = load_file(models.DATA / name / "golden.safetensors")
  rows = {"positions": golden["inputs_position"], "segment_ids": golden["inputs_segmentation"]}
  assert np.abs(maxtext_mudd.logits(model, golden["inputs"], **rows) - golden["logits"]).max() <= LOGITS_TOLERANCE


@pytest.mark.slow
def test_the_fork_s_orbax_folders(tmp_path):
  """Parameters alone, and a train state, as the authors save it, too: what `params.safetensors` gives, to the bit."""
  source = models.DATA / "muddjax_prepost"
  values = load_file(source / fork.FILE)
  tree = {"params": traverse_util.unflatten_dict({tuple(name.split("/")): x for name, x in values.items()})}
  ocp.PyTreeCheckpointer().save(tmp_path / "params", tree)
  state = {"params": tree, "step": np.zeros((), np.int32)}
  ocp.PyTreeCheckpointer().save(tmp_path / "run" / "items", state)
  # As the authors' code saves: a file for each array, under this name.
  ocp.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "100" / "state", state | {"opt_state": {"mu": tree}})
  for name in ("params", "run", "100"):
    shutil.copyfile(source / "config.json", tmp_path / name / "config.json")
  made = []
  for number, path in enumerate((source, tmp_path / "params", tmp_path / "run", tmp_path / "100")):
    target = tmp_path / f"maxtext{number}"
    convert.main(["from-fork", "--fork-dir", str(path), "--maxtext-dir", str(target), f"scan_layers={number == 2}"])
    config = model_config.build(model_folder.read_keys(target) | model_config.local_keys())
    values = {name: x.read() for name, x in saved.parameters(target / "items").items()}
    made.append(layouts.unstack(values, config) if config.scan_layers else values)
  for found in made[1:]:
    check_same(found, made[0])


def edited(**changes):
  def edit(path, values):
    for name, x in changes.items():
      values.pop(name) if x is None else values.update({name: x})
    save_file(values, path / fork.FILE)

  return edit


def with_parameter(name, change):
  """An edit: what a function makes of one parameter."""
  return lambda path, values: edited(**{name: np.ascontiguousarray(change(values[name]))})(path, values)


NEEDS = "and the model that its other parameters describe needs"
OF_FORK = {
  "a missing parameter": (
    edited(**{"decoder/layers_2/mlp/wo/kernel": None}),
    "has no decoder/layers_2/mlp/wo/kernel, which the model that its other parameters describe needs.",
  ),
  "a missing aggregate": (
    edited(**{"decoder/layers_0/dynamic_dense_conn1/kernel": None}),
    "has no decoder/layers_0/dynamic_dense_conn1/kernel, which the model that its other parameters describe needs.",
  ),
  "a missing FFN": (
    edited(**{"decoder/layers_2/mlp/wi_0/kernel": None}),
    "has no decoder/layers_2/mlp/wi_0/kernel, which the model that its other parameters describe needs.",
  ),
  "an extra parameter": (
    edited(**{"decoder/layers_2/mgate/kernel": np.zeros(3, np.float32)}),
    "has decoder/layers_2/mgate/kernel, which the model that its other parameters describe does not have.",
  ),
  "a misshapen parameter": (
    edited(**{"decoder/layers_2/mlp/wo/kernel": np.zeros((3, 64), np.float32)}),
    f"decoder/layers_2/mlp/wo/kernel is [3, 64], {NEEDS} [256, 64].",
  ),
  "a narrower aggregate": (
    with_parameter("decoder/layers_2/dynamic_dense_conn1/kernel", lambda x: x[:, :57]),
    f"decoder/layers_2/dynamic_dense_conn1/kernel is [64, 57], {NEEDS} [64, 64].",
  ),
  "fewer hidden weights": (
    with_parameter("decoder/layers_2/dynamic_dense_conn2/kernel", lambda x: x[:57]),
    f"decoder/layers_2/dynamic_dense_conn2/kernel is [57, 4, 4], {NEEDS} [64, 4, 4].",
  ),
  "what would be broadcast": (
    with_parameter("decoder/layers_2/dense_proj2.bias", lambda x: x[:, :1]),
    f"decoder/layers_2/dense_proj2.bias is [4, 1], {NEEDS} [4, 4].",
  ),
  "infinity": (
    edited(**{"decoder/decoder_norm/scale": np.full(64, np.inf, np.float32)}),
    "decoder/decoder_norm/scale has entries that are NaN or infinite; the model is broken.",
  ),
  "64 bits": (
    edited(**{"decoder/decoder_norm/scale": np.ones(64)}),
    "decoder/decoder_norm/scale is of F64; tensors of F32, F16, BF16 can be read.",
  ),
  "a flat kernel": (
    edited(**{"decoder/layers_0/self_attention/query/kernel": np.zeros((64, 64), np.float32)}),
    f"decoder/layers_0/self_attention/query/kernel is [64, 64], {NEEDS} [64, 4, 16].",
  ),
  "FFN widths of no rule": (
    edited(**{"decoder/layers_0/mlp/wi_0/kernel": np.zeros((64, 8), np.float32)}),
    f"decoder/layers_0/mlp/wi_0/kernel is [64, 8], {NEEDS} [64, 128].",
  ),
}


@pytest.mark.parametrize(
  ("case", "layout"),
  each_layout(
    OF_FORK,
    [
      ("a missing aggregate", "single"),
      ("an extra parameter", "single"),
      ("a misshapen parameter", "single"),
      ("a narrower aggregate", "scanned"),
      ("what would be broadcast", "scanned"),
    ],
  ),
)
def test_refusals_of_the_fork(case, layout, tmp_path):
  source = fork_folder(tmp_path / "fork")
  edit, message = OF_FORK[case]
  edit(source, load_file(models.DATA / "muddjax_plain" / fork.FILE))
  with pytest.raises(ConfigError, match=re.escape(message)):
    fork.from_fork(source, tmp_path / "maxtext", {"scan_layers": LAYOUTS[layout]})
  assert [x.name for x in tmp_path.iterdir()] == ["fork"]


OF_FORK_ALONE = {  # without config.json
  "another model": (edited(**{"token_embedder/embedding": None}), "has no token_embedder/embedding; name a folder"),
  "a flat kernel": (
    edited(**{"decoder/layers_0/self_attention/query/kernel": np.zeros((64, 64), np.float32)}),
    "has a decoder/layers_0/self_attention/query/kernel of [64, 64]; name a folder with a MUDD model",
  ),
  "FFN widths of no rule": (
    edited(**{"decoder/layers_0/mlp/wi_0/kernel": np.zeros((64, 8), np.float32)}),
    "FFN widths 8, 128, 256, 256, 384, 384 do not follow from re-allocating their mean, 236",
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder/mudd_prenorm/scale", "decoder/mudd_postnorm_3/scale"])
def test_missing_norms_of_the_fork_by_its_own_names(name, tmp_path):
  edited(**{name: None})(tmp_path, load_file(models.DATA / "muddjax_prepost" / fork.FILE))
  shutil.copyfile(models.DATA / "muddjax_prepost" / "config.json", tmp_path / "config.json")
  with pytest.raises(ConfigError, match=f"has no {name}, which the model"):
    maxtext_mudd.from_pretrained(tmp_path)


@pytest.mark.parametrize("case", OF_FORK_ALONE)
def test_parameters_of_the_fork_alone(case, tmp_path):
  edit, message = OF_FORK_ALONE[case]
  edit(tmp_path, load_file(models.DATA / "muddjax_plain" / fork.FILE))
  with pytest.raises(ConfigError, match=re.escape(message)):
    fork.Model(tmp_path)


def test_fields_of_the_fork(tmp_path):
  shapes = {name: x.shape for name, x in tensors.of_file(models.DATA / "muddjax_plain" / fork.FILE).items()}
  told = json.loads((models.DATA / "muddjax_plain" / "config.json").read_text())
  keys = fork_config.keys(shapes, told, tmp_path)
  assert keys == fork_config.keys(shapes, {"max_target_length": 32}, tmp_path)
  for field, value, message in (
    (
      "dynamic_dense_act_cls",
      "relu",
      'dynamic_dense_act_cls="relu" is not supported; dynamic_dense_act_cls="gelu"',
    ),
    (
      "mlp_activations",
      ["gelu", "linear"],
      'mlp_activations=["gelu", "linear"] is not supported; mlp_activations=["s',
    ),
    ("window_size", [4, 4], "window_size=[4, 4] is not supported; window_size=null is."),
    ("dense_conn", False, "dense_conn=false is not supported; dense_conn=true is."),
    ("dense_conn", 1, "dense_conn=1 is not supported; dense_conn=true is."),
    ("logits_via_embedding", True, "logits_via_embedding=true is not supported; logits_via_embedding=false is."),
    ("emb_dim", "64", 'emb_dim="64" is not a whole number above 0.'),
    ("mlp_dim", 256.0, "mlp_dim=256.0 is not a whole number above 0."),
    ("mudd_prenorm", "false", 'mudd_prenorm="false" is not true or false.'),
    ("normalization_layer_epsilon", np.inf, "normalization_layer_epsilon=Infinity is not a finite number above 0."),
    ("num_decoder_layers", 5, "num_decoder_layers=5, and the parameters have 6."),
    (
      "dynamic_dense_hidden_expand",
      [1, 2],
      "dynamic_dense_hidden_expand=[1, 2] is not supported; use one number for",
    ),
  ):
    with pytest.raises(ConfigError, match=re.escape(f"config.json: {message}")):
      fork_config.keys(shapes, told | {field: value}, tmp_path)
  found = fork_config.keys(shapes, told | {"rope_min_timescale": 2, "dynamic_dense_hidden_round": False}, tmp_path)
  assert found == keys | {"rope_min_timescale": 2, "mudd_hidden_round_to": 0}
