"""Meshes, batches and memory that do not fit the devices of a run, each refused in one sentence."""

import importlib.util
import re

import jax
from maxtext.utils import max_utils
import pytest

from maxtext_mudd import train_compile
from maxtext_mudd.config import devices, errors
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.config.mudd_config import MuddConfig
from tests import models

V5P_32 = {"compile_topology": "v5p-32", "compile_topology_num_slices": 1, "hardware": "tpu"}  # 16 chips
MESHES = {
  "too few": (
    {"ici_fsdp_parallelism": 4, "ici_tensor_parallelism": 2},
    "ici_fsdp_parallelism=4, ici_tensor_parallelism=2: the product 8 of the mesh is not the 16 devices of a slice; "
    "set one of them to -1, or change them to a product of 16.",
  ),
  "no divisor": (
    {"ici_tensor_parallelism": 3},
    "ici_tensor_parallelism=3: the product 3 of the mesh does not divide the 16 devices of a slice, for "
    "ici_fsdp_parallelism=-1 takes what is left; use divisors of 16.",
  ),
  "two that take what is left": (
    {"ici_tensor_parallelism": -1},
    "ici_fsdp_parallelism=-1 and ici_tensor_parallelism=-1: only one axis can take the devices of a slice that are "
    "left; set the other.",
  ),
  "slices": (
    {"compile_topology_num_slices": 4, "dcn_data_parallelism": 3},
    "dcn_data_parallelism=3: the product 3 of the mesh is not the 4 slices; set one of them to -1, or change them to a "
    "product of 4.",
  ),
}
THREE_HALVES = {"per_device_batch_size": 1.5}
SYNTHETIC = {"dataset_type": "synthetic"}
MOE = {"decoder_block": "mixtral", "num_experts": 6, "num_experts_per_tok": 2, "base_moe_mlp_dim": 64}
MESHES |= {
  "heads": (
    {"ici_tensor_parallelism": 8},
    "ici_tensor_parallelism=8: the 2 heads of keys and values (base_num_kv_heads) cannot be divided by 8; use a "
    "divisor of 2.",
  ),
  "heads of what is left": (
    {"ici_fsdp_parallelism": 4, "ici_tensor_parallelism": -1, "base_num_query_heads": 6},
    "ici_tensor_parallelism=-1: the 2 heads of keys and values (base_num_kv_heads) cannot be divided by 4; use a "
    "divisor of 2.",
  ),
  "experts": (
    MOE | {"ici_expert_parallelism": 4},
    "ici_expert_parallelism=4: num_experts=6 cannot be divided by 4; use a divisor of 6.",
  ),
}


@pytest.mark.parametrize("case", MESHES)
def test_a_mesh_that_does_not_fit(case):
  keys, sentence = MESHES[case]
  with pytest.raises(ConfigError) as error:
    devices.check_mesh(models.config(**V5P_32 | keys))
  assert str(error.value) == sentence


BATCHES = {
  "length": (
    {"ici_context_parallelism": 4, "max_target_length": 18},
    "ici_context_parallelism=4: max_target_length=18 cannot be divided by 4; use a multiple of 4 for it.",
  ),
  "less than one sequence": (
    {"per_device_batch_size": 0.05, "max_target_length": 20},
    "per_device_batch_size=0.05 makes less than one sequence for 16 device(s); use 1, or a larger share.",
  ),
  "sequences that the devices cannot share": (
    THREE_HALVES | {"dataset_type": "tfds"},
    "per_device_batch_size=1.5: the 24 sequences of a step cannot be divided by the 16 devices, as dataset_type=tfds "
    "divides them; use a whole number.",
  ),
  "sequences that the mesh cannot share": (
    THREE_HALVES,
    "ici_fsdp_parallelism=-1: the 24 sequences of per_device_batch_size=1.5 cannot be divided by 16; use a whole "
    "number for per_device_batch_size.",
  ),
  "sequences of an evaluation": (
    {"eval_per_device_batch_size": 1.5, "eval_interval": 2},
    "ici_fsdp_parallelism=-1: the 24 sequences of eval_per_device_batch_size=1.5 cannot be divided by 16; use a whole "
    "number for eval_per_device_batch_size.",
  ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_that_the_mesh_cannot_divide(case):
  keys, sentence = BATCHES[case]
  with pytest.raises(ConfigError) as error:
    devices.check_batch(models.config(**V5P_32 | SYNTHETIC | keys))
  assert str(error.value) == sentence


def test_a_mesh_and_a_batch_that_fit():
  """Fractions, too, where MaxText loads a sequence for each device, or the devices have fewer to divide."""
  for keys in (
    {"ici_tensor_parallelism": 2, "per_device_batch_size": 0.5},
    {"compile_topology_num_slices": 4, "dcn_fsdp_parallelism": 2, "gradient_accumulation_steps": 2} | THREE_HALVES,
    MOE
    | {"ici_expert_parallelism": 2, "ici_context_parallelism": 4, "max_target_length": 20}
    | THREE_HALVES
    | SYNTHETIC,
  ):
    cfg = models.config(**V5P_32 | keys)
    devices.check_mesh(cfg)
    devices.check_batch(cfg)


def test_compiling_without_a_compiler(monkeypatch):
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  expected = (
    "libtpu, which compiles for TPUs, is not installed; on Linux: python3 -m pip install -r requirements/tpu.txt."
  )
  with pytest.raises(ConfigError) as error:
    train_compile.check_compiling(models.config(**V5P_32))
  assert str(error.value) == expected
  with pytest.raises(ConfigError, match="names nothing to compile for; add, for example, compile_topology=v5p-8"):
    train_compile.check_compiling(models.config())


TOO_LARGE = {
  "by a compiler": (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 19.03G of 15.75G "
    "hbm. Exceeded hbm capacity by 3.28G.\n\nTotal hbm usage >= 19.28G",
    "needs 19.03G of the chip's 15.75G, 3.28G too much",
  ),
  "by libtpu 0.0.52": (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (345.27G) exceeds available HBM (95.73G). HLO module: jit_train_step.",
    "needs 345.27G of the chip's 95.73G, 249.54G too much",
  ),
  "by a compiler that says less": (
    "RESOURCE_EXHAUSTED: Exceeded memory capacity by 4.5GiB",
    "needs 4.5GiB more than the device has",
  ),
  "by a GPU": (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5368709120 bytes.",
    "asks for 5.00GiB more than are free",
  ),
  "by a TPU": (
    "RESOURCE_EXHAUSTED: Attempting to allocate 5.25G. That was not possible. There are 3.13G free.",
    "asks for 5.25G more, and 3.13G are free",
  ),
  "by one that says nothing": ("RESOURCE_EXHAUSTED", "needs more memory than the device has (RESOURCE_EXHAUSTED)"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_a_batch_that_does_not_fit(case):
  message, needs = TOO_LARGE[case]
  cfg = models.config(per_device_batch_size=512, remat_policy="minimal")
  found = devices.out_of_memory(jax.errors.JaxRuntimeError(message), cfg)
  assert found == (
    f"per_device_batch_size=512 with max_target_length=16 does not fit: the step {needs}; use a smaller batch "
    "(gradient_accumulation_steps makes up for it), remat_policy=full (here minimal), or more devices to shard over."
  )
  assert devices.out_of_memory(ValueError(message), cfg) is None
  assert devices.out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: x"), cfg) is None


def test_a_cpu_that_would_join_other_hosts(monkeypatch):
  for name in ("JAX_COORDINATOR_ADDRESS", "JOB_INDEX"):
    monkeypatch.delenv(name, raising=False)
  expected = "hardware=cpu: MaxText finds no other hosts to join; on one, set skip_jax_distributed_system=true."
  with pytest.raises(ConfigError, match=re.escape(expected)), errors.one_sentence(MuddConfig):
    max_utils.initialize_jax_for_cpu({})
