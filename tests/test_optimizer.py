"""How optimizers treat the parameters of connections: Muon's matrices, weight decay, learning rate, freezing."""

import functools
import json
import re

from flax import nnx
import jax
from maxtext.optimizers import optimizers
import numpy as np
import pytest

from maxtext_mudd.checkpoints import layout
from maxtext_mudd.config import optimizer
from maxtext_mudd.config.errors import ConfigError
from tests import models, steps
from tests.placements import BLOCKS, IRREGULAR
from tests.scanning import entries_of_blocks

RATE = 0.1
MUON = {"opt_type": "muon", "muon_weight_decay": 0.0, "adam_weight_decay": 0.0}
DENSE = {"base_num_decoder_layers": 3, "mudd_first_block_norms": "separate", "mudd_post_norm": True}


@functools.cache
def random_model(overrides: str) -> tuple:
  """A configuration with connections, its random parameters by path, and random gradients of them."""
  cfg = models.config(mudd=True, **json.loads(overrides))
  model = models.build(cfg)
  values = models.randomise(model)
  rng = np.random.default_rng(1)
  return cfg, model, values, {path: rng.standard_normal(x.shape).astype(np.float32) for path, x in values.items()}


def updates(overrides, values=None, gradients=None) -> dict[str, np.ndarray]:
  """What the optimizer of a new model adds to its parameters in the first step."""
  cfg, model, random_values, random_gradients = random_model(json.dumps(overrides))
  values, gradients = values or random_values, gradients or random_gradients
  tx = optimizers.get_optimizer(cfg, RATE, model)
  parameters = nnx.state(model, nnx.Param)

  def as_tree(by_path):
    state = jax.tree.map(lambda x: x, parameters)
    for path, variable in nnx.to_flat_state(state):
      variable.set_value(by_path["/".join(map(str, path))])
    return nnx.as_pure(state)

  with jax.set_mesh(model.mesh):
    found, _ = jax.jit(tx.update)(as_tree(gradients), nnx.as_pure(tx.init(parameters)), as_tree(values))
  return {"/".join(map(str, path)): np.asarray(x) for path, x in nnx.to_flat_state(found)}


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
  """Muon's update of a matrix [rows, columns]: five Newton-Schulz steps, with the coefficients of Keller Jordan."""
  a, b, c = 3.4445, -4.7750, 2.0315
  is_tall = matrix.shape[0] > matrix.shape[1]
  x = matrix.T if is_tall else matrix
  x = x / np.linalg.norm(x)
  for _ in range(5):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x.T if is_tall else x


HYPER = {"base_num_decoder_layers": 3, "depth_connection": "hyper_connections"}
MHC = {"base_num_decoder_layers": 3, "depth_connection": "mhc"}


@pytest.mark.parametrize(
  ("overrides", "names", "number", "consistent_rms"),
  [
    (DENSE, ("w1", "w2"), 2 * 3, None),  # two DAs between blocks, and the last
    (DENSE, ("w1", "w2"), 2 * 3, 0.2),
    (HYPER, ("w_alpha",), 2 * 3, None),  # two sublayers in each block
    (MHC, ("phi_pre", "phi_post", "phi_res"), 3 * 2 * 3, None),
  ],
  ids=["MUDD", "MUDD, consistent", "hyper-connections", "mHC"],
)
def test_muon_orthogonalises_matrices(overrides, names, number, consistent_rms):
  """In the first step momentum is a multiple of the gradient, whose size does not matter."""
  overrides = MUON | overrides | {"muon_consistent_rms": consistent_rms}
  found, gradients = updates(overrides), random_model(json.dumps(overrides))[3]
  checked = [path for path in gradients if path.split("/")[-1] in names]
  assert len(checked) == number
  for path in checked:
    gradient = gradients[path].astype(np.float64)
    # W2 [K,C,N] as [K, C·N]; φ [n,D,m] of mHC as [n·D, m]
    matrix = gradient.reshape(len(gradient), -1) if path.endswith("w2") else gradient.reshape(-1, gradient.shape[-1])
    rows, columns = matrix.shape
    scale = max(1, columns / rows) ** 0.5 if consistent_rms is None else consistent_rms * max(rows, columns) ** 0.5
    expected = -RATE * scale * orthogonalised(matrix).reshape(gradient.shape)
    np.testing.assert_allclose(found[path], expected, atol=2e-5 * np.abs(expected).max())


IRREGULAR_DENSE = DENSE | {"mudd_placements": IRREGULAR, "base_num_decoder_layers": BLOCKS}


@pytest.mark.parametrize(
  ("keys", "consistent_rms"),
  [*((keys, rms) for keys in (DENSE, IRREGULAR_DENSE) for rms in (None, 0.2)), (HYPER, None), (MHC, None)],
)
def test_muon_treats_each_scanned_layer_as_a_single_one(keys, consistent_rms):
  """Padding of the matrices of a stack changes no update, and stays zero."""
  overrides = MUON | keys | {"muon_consistent_rms": consistent_rms, "muon_weight_decay": 0.1}
  _, _, values, gradients = random_model(json.dumps(overrides))
  single = updates(overrides)
  scanned = overrides | {"scan_layers": True}
  cfg, _, shapes, _ = random_model(json.dumps(scanned))
  values, gradients, expected = (layout.stack(x, cfg) for x in (values, gradients, single))
  assert expected.keys() == shapes.keys()
  found = updates(scanned, values, gradients)
  for path, x in expected.items():
    if path.endswith(("/w1", "/w2")):
      np.testing.assert_array_equal(found[path][x == 0], 0)
    np.testing.assert_allclose(found[path], x, atol=1e-5 * np.abs(x).max(), err_msg=path)


MATRICES = {
  "dense": ({"mudd_weight_norm_scale": True, "mudd_weight_scale": True}, {"w1", "w2"}),
  "MTP": ({"depth_connection": "dense", "mudd_mtp": "connected", "mtp_num_layers": 1}, {"w1", "w2"}),
  "hyper_connections": ({}, {"w_alpha"}),
  "mhc": ({}, {"phi_pre", "phi_post", "phi_res", "phi"}),
  "attnres": ({}, set()),
  "dca": ({}, set()),
  "residual": ({}, set()),
}


def trained_by(overrides) -> dict[str, set[str]]:
  """The last names of the parameters of connections that Muon trains, and of those that Adam trains."""
  cfg, model, *_ = random_model(json.dumps(MUON | overrides))
  numbers = optimizers.get_muon_weight_dimension_numbers(model, cfg)
  leaves = jax.tree_util.tree_leaves_with_path(numbers, is_leaf=lambda x: x is None or hasattr(x, "reduction_axis"))
  found = {"muon": set(), "adam": set()}
  for path, x in leaves:
    names = [str(getattr(entry, "key", entry)) for entry in path]
    if "connection" in names:
      found["adam" if x is None else "muon"].add(names[-1])
    else:
      is_matrix = names[-1] in ("kernel", "query", "wi_0", "wi_1", "wo") and "logits_dense" not in names
      assert (x is not None) == is_matrix, names
  return found


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", MATRICES)
def test_muon_takes_the_matrices_of_every_family(family, scan_layers):
  keys, matrices = MATRICES[family]
  overrides = {"depth_connection": family, "scan_layers": scan_layers, **keys}
  found = trained_by(overrides)
  assert found["muon"] == matrices
  values = random_model(json.dumps(MUON | overrides))[2]
  names = {path.split("/")[-1] for path in values if "connection/" in path}
  assert found["adam"] == names - matrices
  if matrices:
    assert not trained_by(overrides | {"mudd_muon_matrices": False})["muon"]


def test_what_muon_trains_is_logged(caplog):
  with caplog.at_level("INFO"):
    trained_by({})
  (text,) = [record.getMessage() for record in caplog.records if "Muon orthogonalises" in record.getMessage()]
  muon, adam = text.splitlines()
  assert "decoder/layers_*/connection/depth_aggregate/w2" in muon
  assert "decoder/layers_*/connection/depth_aggregate/a" in adam
  assert "decoder/layers_*/self_attention/query/kernel" in muon
  assert not re.search(r"layers_\d", text)


STATIC = {"a"}
OTHERS = {"scale", "weight_norm_scale", "weight_scale"}
DECAYED = {
  ("adamw", "auto"): {"w1", "w2"} | STATIC | OTHERS,
  ("adamw", "all"): {"w1", "w2"} | STATIC | OTHERS,
  ("adamw", "not_static"): {"w1", "w2"} | OTHERS,
  ("adamw", "matrices"): {"w1", "w2"},
  ("adamw", "nothing"): set(),
  ("adam_pax", "not_static"): {"w1", "w2"} | OTHERS,
  ("muon", "auto"): {"w1", "w2"},
  ("muon", "all"): {"w1", "w2"} | STATIC | OTHERS,
}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(("optimizer", "rule"), DECAYED)
def test_decay(optimizer, rule, scan_layers):
  """Where gradients are zero, weight decay is the whole update."""
  overrides = DENSE | {"opt_type": optimizer, "mudd_decay": rule, "scan_layers": scan_layers}
  overrides |= {"mudd_weight_norm_scale": True, "mudd_weight_scale": True}
  check_decay(overrides, DECAYED[optimizer, rule], {"w1", "w2"} if optimizer == "muon" else set())


def check_decay(overrides, decayed: set[str], of_muon: set[str]) -> None:
  """Which parameters of connections are decayed, by last name, and which of them with the factor of Muon."""
  overrides = overrides | {"adam_weight_decay": 0.1, "muon_weight_decay": 0.3}
  _, _, values, gradients = random_model(json.dumps(overrides))
  found = updates(overrides, gradients={path: np.zeros_like(x) for path, x in gradients.items()})
  names = {path.split("/")[-1] for path in found if "connection/" in path}
  assert decayed <= names
  for path, x in found.items():
    name = path.split("/")[-1]
    if "connection/" in path:
      factor = 0.3 if name in of_muon else 0.1
      np.testing.assert_allclose(x, -RATE * factor * values[path] * (name in decayed), rtol=1e-6, err_msg=path)
    else:  # which of them Muon trains is MaxText's choice
      assert any(np.allclose(x, -RATE * factor * values[path], rtol=1e-6, atol=0) for factor in (0.1, 0.3)), path


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
  ("family", "static"),
  [
    ("hyper_connections", {"static_alpha", "static_beta"}),
    ("mhc", {"b_pre", "b_post", "b_res", "b"}),
    ("dca", {"b"}),
  ],
)
def test_decay_of_families(family, static, scan_layers):
  overrides = {"depth_connection": family, "base_num_decoder_layers": 3, "scan_layers": scan_layers}
  values = random_model(json.dumps(overrides))[2]
  names = {path.split("/")[-1] for path in values if "connection/" in path}
  assert static < names
  check_decay(overrides | {"mudd_decay": "all"}, names, set())
  check_decay(overrides | {"mudd_decay": "not_static"}, names - static, set())


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"scan_layers": True}, {"skip_step_on_spikes": True}])
def test_muon_trains(keys):
  """Through MaxText's train step; padding stays zero."""
  cfg = models.config(mudd=True, opt_type="muon", learning_rate=0.02, warmup_steps_fraction=0.0, steps=20, **keys)
  step, state = steps.prepare(cfg)

  def parameters():
    return {"/".join(map(str, path)): x for path, x in nnx.to_flat_state(state["model"].filter(nnx.Param))}

  exists = None
  if cfg.scan_layers:
    exists = entries_of_blocks(cfg, parameters())
    assert not all(x.all() for x in exists.values())
    for path, variable in parameters().items():
      variable.set_value(np.where(exists[path], variable.get_value(), 0))
  data, losses = models.batch(cfg), []
  for _ in range(8):
    state, metrics = step(state, data)
    losses.append(float(metrics["scalar"]["learning/loss"]))
  assert losses[-1] < 0.8 * losses[0], losses
  assert "mudd/grad_norm" in metrics["scalar"]
  for path in exists or ():
    np.testing.assert_array_equal(parameters()[path].get_value()[~exists[path]], 0)


@pytest.mark.parametrize(
  "overrides",
  [
    *({"opt_type": optimizer} for optimizer in ("adamw", "muon", "sgd")),
    {"opt_type": "muon", "scan_layers": True},
    {"opt_type": "adamw", "scan_layers": True},
    HYPER,
  ],
)
def test_learning_rate_factor(overrides):
  """It scales what is added to parameters of connections, and nothing else."""
  plain = updates(overrides)
  found = updates({**overrides, "mudd_learning_rate_factor": 0.25})
  for path, x in plain.items():
    np.testing.assert_allclose(found[path], (0.25 if "connection/" in path else 1) * x, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_extra_embeddings_are_trained_as_the_token_embedding(optimizer):
  """From the same values and gradients, whatever the keys for connections say."""
  overrides = {"opt_type": optimizer, "adam_weight_decay": 0.1, "mudd_decay": "nothing"}
  overrides |= {"mudd_learning_rate_factor": 0.25, "mudd_extra_embeddings": 2}
  _, _, values, gradients = random_model(json.dumps(overrides))
  token, *tables = sorted((path for path in values if path.endswith("/embedding")), key=lambda path: "extra" in path)
  assert len(tables) == 2
  values, gradients = ({**x, **dict.fromkeys(tables, x[token])} for x in (values, gradients))
  found = updates(overrides, values, gradients)
  decayed = updates({**overrides, "adam_weight_decay": 0.2}, values, gradients)
  for table in tables:
    np.testing.assert_array_equal(found[table], found[token])
    assert (found[table] != decayed[table]).any()


def test_a_mask_that_trains_nothing_is_refused():
  with pytest.raises(ConfigError, match=r"trainable_parameters_mask=\['conection'\] matches no parameter, so nothing"):
    updates({"trainable_parameters_mask": ["conection"]})


@pytest.mark.parametrize("overrides", [{}, {"scan_layers": True}, {"opt_type": "muon"}, HYPER])
def test_connections_alone_can_be_trained(overrides):
  """By MaxText's `trainable_parameters_mask`, as yaml/README.md says."""
  found = updates({"trainable_parameters_mask": ["/connection/"], "mudd_decay": "nothing", **overrides})
  for path, x in found.items():
    assert bool(np.any(x)) == ("/connection/" in path), path


def test_muon_leaves_matrices_to_adam():
  """As Adam alone updates them, up to the Nesterov momentum of the Adam in optax's Muon, a factor in the first step."""
  keys = DENSE | {"adam_weight_decay": 0.0, "mudd_decay": "nothing"}
  adam = updates(keys | {"opt_type": "adamw"})
  found = updates(keys | {"opt_type": "muon", "mudd_muon_matrices": False})
  of_connections = [path for path in adam if "connection/" in path]
  static = next(path for path in of_connections if path.endswith("/a"))
  factor = found[static].flat[0] / adam[static].flat[0]
  assert 1 < factor < 2
  for path in of_connections:
    np.testing.assert_allclose(found[path], factor * adam[path], rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("keys", [{"opt_type": "muon"}, {"mudd_decay": "nothing"}, {"mudd_learning_rate_factor": 0.5}])
def test_optimizers_without_the_plugin_are_refused(keys, monkeypatch):
  """A MaxText with our patch uses the configuration and the decoder of this package, but its own optimizers."""
  monkeypatch.setattr(optimizer, "are_replaced", False)
  setting = "=".join(map(str, *keys.items()))
  with pytest.raises(ConfigError) as refused:
    models.config(mudd=True, **keys)
  assert str(refused.value) == (
    f"{setting} does not work with mudd=True in MaxText's own commands: their optimizers do not know the parameters of "
    "connections; use the commands of maxtext_mudd."
  )
  assert models.config(mudd=True).mudd
  assert models.config(mudd=True, opt_type="muon", depth_connection="residual").mudd


REFUSED = {
  "Muon with a block that MaxText does not have it for": (
    {"opt_type": "muon", "decoder_block": "mistral"},
    "opt_type=muon does not work with decoder_block='mistral': MaxText has Muon for llama2, qwen3, qwen3_moe, "
    "qwen3_custom_moe, qwen3_next, gemma3, gpt_oss, deepseek, deepseek4; use one of these, or opt_type=adamw.",
  ),
  "another Muon": (
    {"opt_type": "muon", "muon_type": "maxtext_muon"},
    "muon_type=maxtext_muon does not work with opt_type=muon and mudd=True: it does not take the matrices of "
    "connections as they are; use muon_type=optax_muon.",
  ),
  "Muon, with layers stacked along the first axis": (
    {"opt_type": "muon", "scan_layers": True, "param_scan_axis": 0},
    "param_scan_axis=0 does not work with opt_type=muon and mudd=True: MaxText's Muon takes axis 1 of the parameters "
    "of scanned layers for the number of the layer; use 1.",
  ),
  "a choice of Muon without Muon": (
    {"mudd_muon_matrices": False},
    "mudd_muon_matrices=False does not work with opt_type=adamw: only Muon orthogonalises matrices; leave it at True.",
  ),
  "Muon's choice where there are no matrices": (
    {"opt_type": "muon", "mudd_muon_matrices": False, "mudd_dynamic": False},
    "mudd_muon_matrices=False does not work with depth_connection=dense: its connections have no matrices; leave it at "
    "True.",
  ),
  "a learning rate of no parameters": (
    {"depth_connection": "residual", "mudd_learning_rate_factor": 0.5},
    "mudd_learning_rate_factor=0.5 does not work with depth_connection=residual: it has no parameters; leave the key "
    "at its default.",
  ),
  "decay without decay": (
    {"opt_type": "sgd", "mudd_decay": "matrices"},
    "mudd_decay=matrices does not work with opt_type=sgd: it decays nothing; leave mudd_decay at auto.",
  ),
  "a learning rate of zero": (
    {"mudd_learning_rate_factor": 0},
    "mudd_learning_rate_factor=0 is not valid: input should be greater than 0.",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
  keys, sentence = REFUSED[case]
  with pytest.raises(ConfigError) as refused:
    models.config(mudd=True, **keys)
  assert str(refused.value) == sentence
