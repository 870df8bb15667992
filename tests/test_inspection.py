"""`maxtext_mudd.inspect`: block outputs, weights, streams and attention maps, by name, of all families."""

import dataclasses
import json
import os
import subprocess
import sys

from flax import nnx
import numpy as np
import pytest

import maxtext_mudd
from maxtext_mudd.checkpoints import layout
from maxtext_mudd.connections import kept
from maxtext_mudd.inference import inspection
from tests import models, runs, scanning
from tests.blocks import KEYS, config_of, packed
from tests.oracle import Arch, Oracle

TOLERANCE = 1e-5  # of arrays whose largest entries are 1 to 20, in float32; the errors seen are up to 4e-6 of those


def inspect(model, data, **options):
  positions, segments = data["inputs_position"], data["inputs_segmentation"]
  return maxtext_mudd.inspect(
    model, data["inputs"], keep=inspection.KINDS, positions=positions, segment_ids=segments, **options
  )


def close(found, expected, name, tolerance=TOLERANCE):
  np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0, err_msg=name)


FOUR = Arch(4, ways=4)
CASES = {
  "MUDD": ({"mudd": True}, FOUR),
  "one way": ({"mudd": True, "mudd_ways": 1}, dataclasses.replace(FOUR, ways=1)),
  "2x2": (
    {"mudd": True, "mudd_source_dilation": 2, "mudd_block_period": 2},
    dataclasses.replace(FOUR, dilation=2, period=2),
  ),
  "value and residual stream, both norms": (
    {"mudd": True, "mudd_dense_streams": "vr", "mudd_pre_norm": True, "mudd_post_norm": True},
    dataclasses.replace(FOUR, streams="vr", pre_norm=True, post_norm="r"),
  ),
  "extra embeddings": (
    {"mudd": True, "mudd_extra_embeddings": 2, "mudd_pre_norm": True, "mudd_post_norm": True},
    dataclasses.replace(FOUR, extra=2, pre_norm=True, post_norm="r"),
  ),
  "plain": ({}, dataclasses.replace(FOUR, ways=0)),
}


FAST = ("MUDD", "plain", "dense")  # the others compile as long and show less


def slow_but_fast(cases):
  return [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in cases]


@pytest.mark.parametrize("case", slow_but_fast(CASES))
def test_equals_the_oracle(case):
  """Every array, and there is an array for everything that the oracle computes on the way."""
  keys, arch = CASES[case]
  config = models.config(base_num_decoder_layers=4, **keys)
  model = models.build(config)
  values = scanning.random_values(config)
  models.set_parameters(model, values)
  oracle = Oracle(arch, values)
  data = packed(config)
  found = inspect(model, data)
  logits = oracle(data["inputs"], data["inputs_position"], data["inputs_segmentation"])
  expected = oracle.seen
  np.testing.assert_allclose(found.pop("logits"), logits, atol=5e-6, rtol=0)  # up to 1.0e-6 was seen
  compared = set()
  for name, x in expected.items():
    kind, *rest = name.split("/")
    at = name if name in found else f"{kind}/x/{rest[-1]}"  # a block that reads one array
    close(found[at], x, name, 3e-6)  # 5e-7 was seen
    compared.add(at)
  assert compared == found.keys()


FAMILIES = ("dense", "residual", "dca", "attnres", "mhc", "hyper_connections")


@pytest.mark.parametrize("family", slow_but_fast(FAMILIES))
def test_scanned_layers_have_the_arrays_of_single_ones(family):
  keys = {"mudd": True, "depth_connection": family}
  single, scanned = models.config(**keys), models.config(**keys, scan_layers=True)
  model, stacked = models.build(single), models.build(scanned)
  models.set_parameters(stacked, layout.stack(models.randomise(model), scanned))
  data = packed(single)
  found = inspect(stacked, data)
  for name, x in inspect(model, data).items():
    np.testing.assert_array_equal(found.pop(name), x, err_msg=name)
  assert not found


@pytest.mark.slow
def test_a_plain_model_of_scanned_layers():
  config = models.config(scan_layers=True)
  model = models.build(config)
  models.randomise(model)
  data = packed(config)
  found = inspect(model, data)
  np.testing.assert_allclose(found["logits"], models.jitted_logits(model, data), atol=1e-5)
  assert [*found] == [
    "logits",
    *(f"attention/block_{i:03d}" for i in (1, 2, 3)),
    *(f"history/{i:03d}" for i in range(4)),
    *(f"streams/x/da_{i:03d}" for i in range(4)),
  ]


@pytest.mark.slow
def test_attention_residuals_mix_what_is_kept():
  """With blocks of one Transformer block: sources are the embedding and differences of residual sums."""
  config = models.config(mudd=True, depth_connection="attnres", mudd_attnres_block=2)
  model = models.build(config)
  models.randomise(model)
  found = inspect(model, packed(config))
  sources = [found[f"history/{i:03d}"] for i in range(4)]
  for after in range(4):
    name = f"attention/da_{after:03d}" if after < 3 else "x/da_003"
    weights = found[f"weights/{name}"]
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    mixed = sum(weights[..., j, None] * sources[j] for j in range(after + 1))
    close(found[f"streams/{name}"], mixed, name)
    norms = np.stack([np.linalg.norm(x, axis=-1) for x in sources[: after + 1]], -1)
    close(found[f"norms/{name}"], norms, name)


@pytest.mark.parametrize("family", slow_but_fast(["mhc", "hyper_connections"]))
def test_residual_streams_are_mixed_by_what_is_kept(family):
  config = models.config(mudd=True, depth_connection=family, base_num_decoder_layers=2)
  model = models.build(config)
  models.randomise(model)
  found = inspect(model, packed(config))
  for after in range(2):
    weights, streams = found[f"weights/attention/da_{after:03d}"], found[f"history/{after:03d}"]
    mixed = np.einsum("btn,btnd->btd", weights[:, :, 0], streams)
    close(found[f"streams/attention/da_{after:03d}"], mixed, "attention")
    assert found[f"written/ffn/da_{after:03d}"].shape == streams.shape[:3]
    assert found["weights/x/da_002"].shape == streams.shape[:3]
  mixed = np.einsum("btn,btnd->btd", found["weights/x/da_002"], found["history/002"])
  close(found["streams/x/da_002"], mixed, "x")
  assert {name.split("/")[0] for name in found} == {"logits", *inspection.KINDS} - {"gates"}


@pytest.mark.slow
def test_gates_of_dca():
  """Σ_j (b_j + gate_j) G_j, with the static weights of the parameters. Weights have the mean of b_j over channels."""
  config = models.config(mudd=True, depth_connection="dca")
  model = models.build(config)
  values = models.randomise(model)
  found = inspect(model, packed(config))
  for c, stream in enumerate("qkv"):
    static = values["decoder/layers_2/connection/depth_aggregate/b"][c]
    gates = found[f"gates/{stream}/da_002"]
    assert gates.min() == 0 < gates.max()
    np.testing.assert_allclose(found[f"weights/{stream}/da_002"], gates + static.mean(0), atol=1e-6)
    mixed = sum((static[:, j] + gates[..., j, None]) * found[f"history/{j:03d}"] for j in range(3))
    close(found[f"streams/{stream}/da_002"], mixed, stream)
    norms = np.stack([np.linalg.norm(found[f"history/{j:03d}"], axis=-1) for j in range(3)], -1)
    close(found[f"norms/{stream}/da_002"], norms, stream)


KEPT_BLOCKS = ("gemma2", "gpt_oss", "deepseek", "qwen3_next", "gemma4_small")


@pytest.mark.slow
@pytest.mark.parametrize("block", KEPT_BLOCKS)
def test_attention_of_other_blocks(block):
  """Weights of blocks that have softmax attention sum to 1, or with sinks to less, over tokens before."""
  config = config_of(block, mudd=True)
  model = models.build(config)
  models.randomise(model)
  found = inspect(model, packed(config))
  np.testing.assert_allclose(found["logits"], models.jitted_logits(model, packed(config)), atol=1e-4)
  maps = {name: x for name, x in found.items() if name.startswith("attention/")}
  number = sum(name.startswith("history/") for name in found) - 1
  assert len(maps) == (2 if block == "qwen3_next" else number)
  for x in maps.values():
    assert np.triu(x, 1).max() == 0
    assert (x.sum(-1) < 0.9).any() if block == "gpt_oss" else np.allclose(x.sum(-1), 1)


TENSOR = {"ici_tensor_parallelism": 2, "ici_fsdp_parallelism": 4}
MESHES = {
  "FSDP 8": ({"ici_fsdp_parallelism": 8}, {}),
  "tensor 2, FSDP 4": (TENSOR, {}),
  "tensor 2, FSDP 4, explicit": (TENSOR | {"shard_mode": "explicit"}, {}),
  "FSDP 8, scanned": ({"ici_fsdp_parallelism": 8}, {"scan_layers": True, "mudd_extra_embeddings": 1}),
  "FSDP 8, mhc": ({"ici_fsdp_parallelism": 8}, {"depth_connection": "mhc", "mudd_expansion_rate": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_of_eight_devices_has_the_arrays_of_one(mesh, tmp_path):
  """What `inspect` returns, and the figures of `analyze`."""
  found = []
  of_mesh, of_model = MESHES[mesh]
  for devices, keys in ((1, {}), (8, of_mesh)):
    keys = keys | of_model | {"mudd": True, "per_device_batch_size": 8 // devices}
    path = tmp_path / f"{devices}.npz"
    flags = os.environ.get("XLA_FLAGS", "")
    finished = subprocess.run(
      [sys.executable, "-m", "tests.inspect_on_mesh", str(path), json.dumps(keys)],
      cwd=runs.ROOT,
      env=os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"},
      capture_output=True,
      text=True,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    found.append(dict(np.load(path)))
  one, eight = found
  assert one.keys() == eight.keys()
  assert {"similarity.mean", "weights.mean"} < one.keys()
  for name, x in one.items():
    np.testing.assert_array_equal(np.isnan(eight[name]), np.isnan(x), err_msg=name)
    if name.startswith("ablate."):  # differences of losses of about 5, in float32
      np.testing.assert_allclose(eight[name], x, atol=2e-6, rtol=0, err_msg=name)
    else:  # devices add in another order; of attention weights 1.1e-5 was seen. Percentiles are to 5e-4.
      close(np.nan_to_num(eight[name]), np.nan_to_num(x), name, 5e-4 if "percentile" in name else 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "keys",
  [
    {
      "mudd_placements": [
        {"block": 1, "sources": "all", "streams": "x"},
        {"block": 3, "sources": [0, "last:1"], "streams": "vr"},
      ]
    },
    {"mtp_num_layers": 1, "mudd_mtp": "connected"},
    {"num_vocab_tiling": 4},
    {"mudd_ways": 1, "mtp_num_layers": 1, "mudd_mtp": "connected"},
  ],
)
def test_forms_of_models(keys):
  """Logits are those of the model, and there is a stream and an output of each block."""
  config = models.config(mudd=True, base_num_decoder_layers=4, **keys)
  model = models.build(config)
  models.randomise(model)
  data = packed(config)
  found = inspect(model, data)
  keys = {key: value for key, value in keys.items() if key != "num_vocab_tiling"}
  untiled = models.build(models.config(mudd=True, base_num_decoder_layers=4, **keys))
  models.set_parameters(untiled, {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()})
  np.testing.assert_allclose(found["logits"], models.jitted_logits(untiled, data), atol=2e-5)
  for i in range(5):
    assert f"history/{i:03d}" in found
    assert any(name.startswith("streams/") and name.endswith(f"da_{i:03d}") for name in found)


def test_nothing_is_kept_elsewhere():
  model = models.build(models.config(mudd=True))
  models.logits(model, models.batch(model.config))
  assert not nnx.to_flat_state(nnx.state(model, kept.Kept))
  inspect(model, models.batch(model.config))
  models.logits(model, models.batch(model.config))
  assert not nnx.to_flat_state(nnx.state(model, kept.Kept))


def test_mistakes():
  model = models.build(models.config(mudd=True))
  tokens = models.batch(model.config)["inputs"]
  with pytest.raises(
    ValueError, match="keep has 'maps'; the kinds of arrays are history, weights, gates, written, norms, streams"
  ):
    maxtext_mudd.inspect(model, tokens, keep=["maps"])
  with pytest.raises(ValueError, match="pass an array"):
    maxtext_mudd.inspect(model, tokens[0])
  assert "simple" not in KEYS
  model = models.build(models.config(decoder_block="simple", scan_layers=True, mudd=True, mudd_ways=1))
  with pytest.raises(ValueError, match="decoder_block=simple has no attention, and MaxText runs it scanned only"):
    maxtext_mudd.inspect(model, tokens)
