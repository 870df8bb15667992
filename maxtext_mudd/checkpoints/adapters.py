"""Merges adapters (LoRA) that `maxtext_mudd.post_train` trained into their models, and writes them in PEFT's format."""

from collections.abc import Mapping
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from maxtext_mudd.checkpoints import orbax_folder, parameters
from maxtext_mudd.checkpoints.hugging_face import native
from maxtext_mudd.checkpoints.staging import staged
from maxtext_mudd.checkpoints.tensors import Tensor
from maxtext_mudd.config.errors import ConfigError

_A, _B = "_lora_a", "_lora_b"
Adapter = Mapping[str, tuple[Tensor, Tensor]]  # A [in, rank] and B [rank, out] by the path of the kernel


def of(saved: Mapping[str, Tensor]) -> Adapter:
  """The adapter among saved parameters; empty if they are those of a model."""
  return {
    name.removesuffix(_A): (x, saved[name.removesuffix(_A) + _B]) for name, x in saved.items() if name.endswith(_A)
  }


def scale(adapter: Adapter, config, path: pathlib.Path) -> float:
  """The factor alpha / rank of an adapter.

  Args:
    path: the folder of the adapter, for messages.

  Raises:
    ConfigError: `lora.lora_alpha` is not set, `lora.lora_rank` is another rank, or layers are scanned.
  """
  ranks = {a.shape[-1] for a, _ in adapter.values()}
  rank = max(ranks)
  if any(len(a.shape) != 2 for a, _ in adapter.values()):
    raise ConfigError(f"{path} has an adapter of scanned layers; train it with scan_layers=False.")
  if config.lora.lora_alpha <= 0:
    raise ConfigError(f"{path} has an adapter, whose alpha is not saved; add lora.lora_alpha=..., as in training.")
  if ranks != {rank} or config.lora.lora_rank not in (0, rank):
    raise ConfigError(f"lora.lora_rank={config.lora.lora_rank}: {path} has an adapter of rank {rank}; set that.")
  return config.lora.lora_alpha / rank


def merged(adapter: Adapter, config, path: pathlib.Path) -> dict[str, Tensor]:
  """The parameters of the model of `load_parameters_path`, with W + alpha / rank · A·B in place of each W.

  Sums are made in float64. Values are read when a tensor is read.

  Args:
    path: the folder of the adapter, for messages.

  Raises:
    ConfigError: as `scale`, or there is no model, or it has no such kernel.
  """
  factor = scale(adapter, config, path)
  if not config.load_parameters_path:
    raise ConfigError(f"{path} has an adapter alone; add load_parameters_path=..., the model that it was trained on.")
  base_path = pathlib.Path(str(parameters.items_folder(config.load_parameters_path))).absolute()
  base = orbax_folder.parameters(base_path)

  def with_adapter(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    def read() -> np.ndarray:
      update = factor * (a.read().astype(np.float64) @ b.read().astype(np.float64))
      value = weight.read()
      return (value.astype(np.float64) + update.reshape(weight.shape)).astype(value.dtype)

    return Tensor(weight.file, weight.shape, weight.dtype, read)

  for name, (a, b) in adapter.items():
    if name not in base or np.prod(base[name].shape) != a.shape[0] * b.shape[1]:
      raise ConfigError(f"{path} has an adapter of {name}, and {base_path} has no such parameter; name its model.")
  return base | {name: with_adapter(base[name], a, b) for name, (a, b) in adapter.items()}


def to_peft(checkpoint: pathlib.Path, target: pathlib.Path, config, base_model: str) -> None:
  """Writes an adapter as a folder that PEFT loads onto this project's PyTorch model.

  Args:
    checkpoint: OUTPUT/RUN/checkpoints/STEP of a run that trained an adapter.
    config: the configuration of the run.
    base_model: the folder or name of the model that `to-hf` made, for PEFT.

  Raises:
    ConfigError: there is no adapter, the PyTorch model does not have its layers, or the target exists or cannot be
      written. Then nothing is left behind.
  """
  path = pathlib.Path(str(parameters.items_folder(str(checkpoint))))
  adapter = of(orbax_folder.parameters(path))
  if not adapter:
    raise ConfigError(f"{path} has no adapter; name a checkpoint of a run with lora.enable_lora=True.")
  factor = scale(adapter, config, path)
  modules = {
    name.path: name.tensor.removesuffix(".weight")
    for name in native.names(config)
    # In PyTorch, a router is no linear layer, and an array of experts is many.
    if name.transposed and name.expert is None and not name.tensor.endswith(".mlp.gate.weight")
  }
  if missing := adapter.keys() - modules.keys():
    raise ConfigError(f"{path} has an adapter of {min(missing)}, which the PyTorch model does not have.")
  arrays, rank = {}, next(iter(adapter.values()))[0].shape[-1]
  for name, (a, b) in adapter.items():
    for letter, x in (("A", a), ("B", b)):
      arrays[f"base_model.model.{modules[name]}.lora_{letter}.weight"] = np.ascontiguousarray(x.read().T)
  fields = {
    "base_model_name_or_path": base_model,
    "bias": "none",
    "inference_mode": True,
    "lora_alpha": factor * rank,
    "lora_dropout": 0.0,
    "peft_type": "LORA",
    "r": rank,
    "target_modules": _targets({modules[name] for name in adapter}, set(modules.values())),
    "task_type": "CAUSAL_LM",
  }
  with staged(target) as stage:
    save_file(arrays, stage / "adapter_model.safetensors")
    (stage / "adapter_config.json").write_text(json.dumps(fields, indent=2))


def _targets(adapted: set[str], modules: set[str]) -> list[str]:
  """The modules for PEFT: their last names, such as q_proj, or whole names if not all modules of a name are adapted."""
  last = {name.rpartition(".")[2] for name in adapted}
  whole = {name for name in modules if name.rpartition(".")[2] in last}
  return sorted(last if whole == adapted else adapted)
