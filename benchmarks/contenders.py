"""Which models are compared: a configuration, the plain model that belongs to it, and variants of its keys."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax
from maxtext.configs import pyconfig
from maxtext.configs.types import MaxTextConfig

from maxtext_mudd.config import devices
from maxtext_mudd.config import files as config_files
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.config.mudd_config import MuddConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Keys, or a file of yaml/ablation whose own keys they are.
VARIANTS = {
  "xla": {"mudd_kernel": "xla"},
  "pallas": {"mudd_kernel": "pallas"},
  "scanned": {"scan_layers": True},
  "unscanned": {"scan_layers": False},
  "2x2": "sparse_2x2.yml",
  "trimmed": "trimmed.yml",
}
FORCED = {"dataset_type": "synthetic", "compile_topology": ""}  # what a measurement is
DEFAULTS = {
  "enable_checkpointing": False,
  "skip_jax_distributed_system": True,  # one host
  "enable_goodput_recording": False,
  "monitor_goodput": False,
  "log_config": False,
  "eval_interval": -1,
  "jax_cache_dir": "",  # every compilation is one
  "run_name": "throughput",
}
BATCH = ("per_device_batch_size", "max_target_length", "vocab_size", "gradient_accumulation_steps")
SIZES = (
  "decoder_block",
  "mudd_decoder_layer",
  "num_decoder_layers",
  "emb_dim",
  "num_query_heads",
  "num_kv_heads",
  "head_dim",
  "mlp_dim",
  "num_experts",
)
# Keys of this project that a plain model reads, too.
_OF_ALL_MODELS = {"mudd_decoder_layer", "mudd_rotary_fraction", "mudd_init", "mudd_init_std", "log_console"}
OF_CONNECTIONS = set(MuddConfig.model_fields) - set(MaxTextConfig.model_fields) - _OF_ALL_MODELS


def variant_keys(name: str) -> dict[str, Any]:
  """The keys that a variant sets.

  Raises:
    ConfigError: there is no such variant.
  """
  if name not in VARIANTS:
    raise ConfigError(f"--variants has {name!r}; use some of {', '.join(VARIANTS)}.")
  keys = VARIANTS[name]
  if isinstance(keys, str):
    keys = config_files.load(str(ROOT / "yaml" / "ablation" / keys))
  return {key: value for key, value in keys.items() if key != "base_config"}


def of_stock(keys: Mapping[str, Any]) -> dict[str, Any]:
  """Those that a model without connections reads: scan_layers, of a variant, so that like is compared with like."""
  return {key: value for key, value in keys.items() if key not in OF_CONNECTIONS}


def plain_model(name: str) -> str:
  """The nearest file that `name` builds on, by base_config, whose model has no connections.

  Raises:
    ConfigError: there is no such file, or it is one of those that give keys their defaults and describe no model.
  """
  chain = _chain(name)
  if not _connected(chain):
    raise ConfigError(f"{name} has no connections (mudd: false); name a model with them, or a plain one by --baseline.")
  for i in range(1, len(chain)):
    if not _connected(chain[i:]):
      return str(chain[i])
  raise ConfigError(f"{name} builds on no plain model; name one by --baseline, such as yaml/transformer_pp_1p4b.yml.")


def _chain(name: str) -> list[pathlib.Path]:
  """The files of a model, from its own to the last above MaxText's and this project's defaults."""
  config_files.check(["", name], {})
  files = [config_files.find(name)]
  while base := config_files.load(str(files[-1])).get("base_config"):
    path = files[-1].parent / base
    if path.name in ("base.yml", "mudd_base.yml") or not path.is_file():
      break
    files.append(pathlib.Path(path.parent.resolve(), path.name))
  return [_relative(path) for path in files]


def _relative(path: pathlib.Path) -> pathlib.Path:
  here = pathlib.Path.cwd()
  return path.relative_to(here) if path.is_relative_to(here) else path


def _connected(chain: Sequence[pathlib.Path]) -> bool:
  stated = (config_files.load(str(path)).get("mudd") for path in chain)
  return bool(next((value for value in stated if value is not None), False))


def read(name: str, overrides: Sequence[str], keys: Mapping[str, Any]):
  """A configuration to measure here. `keys` go before `overrides`, which go before the file; hardware is what JAX has.

  Raises:
    ConfigError: it cannot work, here or at all.
  """
  given = dict(x.split("=", 1) for x in overrides if "=" in x)
  for key, value in FORCED.items():
    if given.get(key, value) != value:
      raise ConfigError(f"{key}={given[key]}: a measurement has {key}={value!r}, on the devices here; leave it out.")
  config_files.load(name)
  kept = [x for x in overrides if x.split("=", 1)[0] not in keys]
  defaults = {x: value for x, value in {**DEFAULTS, "hardware": _hardware()}.items() if x not in given}
  # MaxText's own `initialize` ends the process where this raises.
  values = pyconfig._initialize_pydantic(["", name, *kept], **(defaults | FORCED | dict(keys)))
  config = pyconfig.HyperParameters(values)
  if config.hardware.removesuffix("_multiprocess") != _hardware():
    raise ConfigError(f"hardware={config.hardware}: JAX finds a {_hardware()} here; leave hardware out.")
  devices.check_mesh(config)
  devices.check_batch(config)
  return config


def _hardware() -> str:
  return {"cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend(), jax.default_backend())


def read_stock(name: str, overrides: Sequence[str], keys: Mapping[str, Any]):
  """The same for the model without connections: it must have none.

  Raises:
    ConfigError: it has connections, or cannot work.
  """
  config = read(name, [x for x in overrides if x.split("=", 1)[0] not in OF_CONNECTIONS], of_stock(keys))
  if config.mudd:
    raise ConfigError(f"--baseline {name} has connections (mudd: true); name a plain model.")
  return config


def check_pair(stock, config, names: tuple[str, str], derived: bool) -> None:
  """Raises ConfigError where batches differ, or a baseline that was found, not named, is a model of another size."""
  for key in (*BATCH, *(SIZES if derived else ())):
    ours, theirs = getattr(config, key), getattr(stock, key)
    if ours != theirs:
      remedy = "name another by --baseline" if derived else f"set {key}= for both"
      raise ConfigError(f"{names[1]} has {key}={ours}, and its baseline {names[0]} has {theirs}; {remedy}.")


def different_keys(stock, config) -> dict[str, list]:
  """Keys that the two configurations do not share, as [stock's, the other's]; but for dumps, whose paths are of a
  machine."""
  ours, theirs = config.get_keys(), stock.get_keys()
  differ = (key for key in ours if str(ours[key]) != str(theirs[key]) and not key.startswith("dump_"))
  return {key: [str(theirs[key]), str(ours[key])] for key in differ}
