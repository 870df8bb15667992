"""Every configuration of yaml/: the paper's sizes, counted exactly, and two steps of training, shrunk by one rule."""

import functools
import math
import re

from flax import nnx
import jax
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils
import numpy as np
import pytest

from maxtext_mudd.complexity import sizes
from maxtext_mudd.config import files as config_files
from maxtext_mudd.model import counts
from tests import models, runs, shrink, steps

FOLDER = runs.ROOT / "yaml"
SHARED = {"mudd_base", "paper", "tiny", "transformer_pp", "transformer", "pythia"}  # what models build on
NAMES = sorted(
  name
  for file in config_files.packaged()
  if (name := file.removesuffix(".yml")) not in SHARED and not name.startswith(("data/", "study/", "post_train/"))
)
TINY = {"mudd_tiny", "transformer_tiny"}

# Layers, width, heads, FFN width, learning rate, sequences in a batch, tokens (method: Tables 2 to 4, App. D).
SIZES = {
  "405m": (24, 1024, 16, 2816, 3e-4, 256, 7e9),
  "834m": (24, 1536, 24, 4096, 2.5e-4, 256, 15e9),
  "1p4b": (24, 2048, 32, 5632, 2e-4, 256, 26e9),
  "deep_797m": (34, 1280, 20, 3584, 2.5e-4, 256, 15e9),
  "deep_1p34b": (42, 1536, 24, 4096, 2e-4, 256, 26e9),
  "1p3b": (24, 2048, 16, 5632, 2e-4, 1024, 300e9),
  "2p8b": (32, 2560, 32, 6912, 3.2e-4, 1024, 300e9),
  "6p9b": (32, 4096, 32, 11008, 1.2e-4, 1024, 300e9),
  "moe_1p8b_a405m": (24, 1024, 16, 1408, 3e-4, 256, 26e9),
  "pythia_1p4b": (24, 2048, 16, 8192, 2e-4, 1024, 300e9),
  "pythia_2p8b": (32, 2560, 32, 10240, 1.6e-4, 1024, 300e9),
}
CHIPS = {"405m": 8, "834m": 8, "797m": 8, "1p4b": 16, "1p34b": 16, "1p3b": 64, "2p8b": 64, "6p9b": 64, "a405m": 8}


@functools.cache
def read(name, **changes):
  fixed = {"run_name": "x", "log_config": False, "skip_jax_distributed_system": True}
  return pyconfig.initialize(["", str(FOLDER / f"{name}.yml")], **(fixed | changes))


def size_of(name):
  """The row of SIZES that a configuration is of; ablations are of 405M."""
  stem = name.split("/")[-1]
  found = [size for size in SIZES if stem.endswith(size)]
  return max(found, key=len) if found else "405m"


_counted, _trained = {}, {}


def key_of(config) -> str:
  """Equal for configurations of the same model and training, but for the learning rate and what follows from it."""
  free = {"base_config", "learning_rate", "learning_rate_final_fraction", "learning_rate_schedule_steps", "steps"}
  return str(sorted((key, str(value)) for key, value in config.get_keys().items() if key not in free))


def abstract_parameters(config) -> int:
  """Counted on the model itself, built without memory."""
  key = key_of(config)
  if key in _counted:
    return _counted[key]
  mesh = maxtext_utils.get_mesh_from_config(config)

  def build():
    found = models.parameters(models.construct(config, mesh))
    return {path: value.get_value() for path, value in found.items()}

  _counted[key] = sum(math.prod(x.shape) for x in jax.eval_shape(build).values())
  return _counted[key]


def table():
  """Exact parameters by configuration, as yaml/README.md prints them."""
  rows = re.findall(r"^\| `([\w/]+)\.yml` \|.*\| ([\d,]+) \|", (FOLDER / "README.md").read_text(), re.M)
  return {name: int(count.replace(",", "")) for name, count in rows}


def test_the_table_lists_every_configuration():
  assert set(table()) == set(NAMES) - TINY


# Of each kind of model; the others are built, and trained when shrunk, with the slow tests.
FAST = ("muddpythia_1p4b", "transformer_pp_405m", "mudd_tiny", "transformer_tiny")


def marked(names):
  for name in sorted(names):
    yield pytest.param(name, marks=() if name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("name", marked(set(NAMES) - TINY))
def test_parameters_of_the_model_itself(name):
  config = read(name)
  assert abstract_parameters(config) == counts.parameters(config)


@pytest.mark.parametrize("name", sorted(set(NAMES) - TINY))
def test_size(name):
  config = read(name)
  assert counts.parameters(config) == table()[name]
  size = size_of(name)
  layers, width, heads, ffn, rate, rows, tokens = SIZES[size]
  if name.split("/")[-1].startswith("transformer_") and "_pp" not in name:
    ffn = 4 * width
  assert (config.num_decoder_layers, config.emb_dim, config.num_query_heads) == (layers, width, heads)
  assert (config.num_kv_heads, config.head_dim, config.mlp_dim) == (heads, width // heads, ffn)
  assert config.learning_rate == rate
  pod = 32 if size == "pythia_1p4b" else CHIPS[size.split("_")[-1]]
  assert config.per_device_batch_size * pod == rows
  assert config.steps == pytest.approx(tokens / (rows * 2048), rel=1e-3)  # rounded
  if "moe" in name:
    assert (config.num_experts, config.num_experts_per_tok, config.moe_mlp_dim) == (16, 2, 1408)
    assert config.capacity_factor == -1  # dropless
    assert counts.parameters(config) // 10**8 == 18
    dense = counts.plain_parameters(read("transformer_pp_405m"))  # what each token uses
    used = counts.plain_parameters(config) - 14 * 3 * 24 * 1024 * 1408
    assert used == pytest.approx(dense, rel=1e-3)  # the routers are 0.1%
    return
  named = 12 * layers * width**2 + 2 * config.vocab_size * width  # GPT-3's shape, which the names count
  assert named <= counts.plain_parameters(config) <= 1.03 * named
  most = 0.012 if config.depth_connection == "mhc" else 0.01  # mHC has 24·n·D parameters for each sublayer
  assert counts.connections_cost(config).parameters <= most * named
  if size != "1p3b":  # Pythia-1.4B's shape
    number, unit = re.search(r"([\dp]+)([mb])$", size).groups()
    # Names are rounded to two digits and more; the largest difference is 1.04%, of 1.4B.
    assert named == pytest.approx(float(number.replace("p", ".")) * {"m": 1e6, "b": 1e9}[unit], rel=0.012)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_are_counted(name):
  """Read without MaxText, they are those of its configuration."""
  config, counted = read(name), sizes.read(["", str(FOLDER / f"{name}.yml")])
  derived = [key for key, value in vars(sizes.Sizes).items() if isinstance(value, property)]
  # MaxText derives the first, and has other types for the others.
  others = {"eval_per_device_batch_size", "decoder_block", "shard_mode", "dtype", "lora"}
  for key in (*sizes.Sizes.model_fields.keys() - others, *derived):
    assert getattr(counted, key) == getattr(config, key)
  assert counted.decoder_block.value == config.decoder_block.value
  assert counted.shard_mode.value == config.shard_mode.value
  assert counted.dtype == config.dtype.name
  assert counted.lora.enable_lora == config.lora.enable_lora


@pytest.mark.parametrize("name", sorted(set(NAMES) - TINY))
def test_optimizer_and_data(name):
  config = read(name)
  assert (config.vocab_size, config.max_target_length, config.logits_via_embedding) == (50432, 2048, False)
  assert (config.opt_type.value, config.adam_b1, config.adam_b2, config.adam_eps) == ("adamw", 0.9, 0.95, 1e-8)
  assert (config.adam_weight_decay, config.gradient_clipping_threshold) == (0.1, 1.0)
  assert (config.lr_schedule_type.value, config.warmup_steps_fraction) == ("cosine", 0.01)
  assert config.learning_rate_final_fraction == (0.01 if name in ("mudd_2p8b", "transformer_pp_2p8b") else 0.1)
  assert (config.dropout_rate, config.dataset_type.value, config.grain_file_type) == (0.0, "grain", "mmap")
  as_pythia = "pythia" in name or name in ("mudd_2p8b", "transformer_pp_2p8b")  # Section 3.3
  assert config.mudd_init == ("pythia" if as_pythia else "xavier_normal")
  assert config.adamw_mask == ([".*norm.*", ".*bias.*"] if "pythia" in name else [])
  assert config.mudd_decay == ("not_static" if "dhc4" in name else "auto")


# The compiler is most of the time, and the last digits do not matter here.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def values(state) -> dict[str, np.ndarray]:
  found = nnx.to_flat_state(nnx.filter_state(state, nnx.Param))
  return {"/".join(map(str, path)): np.asarray(param.get_value()) for path, param in found}


def train_two_steps(config):
  """Loss of two steps on one batch, and the parameters that did not move. Once for configurations with one key."""
  key = key_of(config)
  if key not in _trained:
    step, state = steps.prepare(config, compiler_options=QUICK)
    before = values(state)
    losses = []
    for _ in range(2):
      state, metrics = step(state, models.batch(config))
      losses.append(float(metrics["scalar"]["learning/loss"]))
    after = values(state)
    _trained[key] = losses, [path for path in before if (before[path] == after[path]).all()]
  return _trained[key]


@pytest.mark.parametrize("name", marked(NAMES))
def test_trains_when_shrunk(name):
  config = read(name, **shrink.overrides(read(name)))
  losses, still = train_two_steps(config)
  assert losses[1] < losses[0]
  assert not still
