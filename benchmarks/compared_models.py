"""Reads the configurations of the models that a benchmark compares.

These are a model with connections, its baseline (the plain model of the same size, also called stock), and variants of
the model with connections.
"""

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
# What each variant sets: keys, or a file in yaml/ablation whose keys it sets.
VARIANTS = {
  "xla": {"mudd_kernel": "xla"},
  "pallas": {"mudd_kernel": "pallas"},
  "scanned": {"scan_layers": True},
  "unscanned": {"scan_layers": False},
  "2x2": "sparse_2x2.yml",
  "trimmed": "trimmed.yml",
}
FORCED = {"dataset_type": "synthetic", "compile_topology": ""}  # keys that no override may change
DEFAULTS = {
  "enable_checkpointing": False,
  "skip_jax_distributed_system": True,  # a benchmark runs on one host
  "enable_goodput_recording": False,
  "monitor_goodput": False,
  "log_config": False,
  "eval_interval": -1,
  "jax_cache_dir": "",  # so that compilations are timed, not read from a cache
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
_SHARED_KEYS = {"mudd_decoder_layer", "mudd_rotary_fraction", "mudd_init", "mudd_init_std", "log_console"}
CONNECTION_KEYS = set(MuddConfig.model_fields) - set(MaxTextConfig.model_fields) - _SHARED_KEYS


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


def stock_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
  """The keys that a plain model reads. A variant's scan_layers is one, so both models have the same layout."""
  return {key: value for key, value in keys.items() if key not in CONNECTION_KEYS}


def plain_model(name: str) -> str:
  """The baseline of a model: the nearest file that `name` builds on (base_config) whose model has no connections.

  Raises:
    ConfigError: the model itself has no connections, or builds only on files of defaults.
  """
  chain = _chain(name)
  if not _connected(chain):
    raise ConfigError(f"{name} has no connections (mudd: false); name a model with them, or a plain one by --baseline.")
  for i in range(1, len(chain)):
    if not _connected(chain[i:]):
      return str(chain[i])
  raise ConfigError(f"{name} builds on no plain model; name one by --baseline, such as yaml/transformer_pp_1p4b.yml.")


def _chain(name: str) -> list[pathlib.Path]:
  """The configuration files of a model, from its own to the last before the files of defaults."""
  config_files.check(["", name], {})
  files = [config_files.find(name)]
  while base := config_files.load(str(files[-1])).get("base_config"):
    path = files[-1].parent / base
    if path.name in ("base.yml", "mudd_base.yml") or not path.is_file():
      break
    files.append(pathlib.Path(path.parent.resolve(), path.name))
  return [_relative(path) for path in files]


def _relative(path: pathlib.Path) -> pathlib.Path:
  current = pathlib.Path.cwd()
  return path.relative_to(current) if path.is_relative_to(current) else path


def _connected(chain: Sequence[pathlib.Path]) -> bool:
  """Whether the model of these files, nearest first, has connections."""
  stated = (config_files.load(str(path)).get("mudd") for path in chain)
  return bool(next((value for value in stated if value is not None), False))


def read(name: str, overrides: Sequence[str], keys: Mapping[str, Any]):
  """The configuration of a model to measure on the devices of this machine.

  Args:
    name: configuration file.
    overrides: arguments key=value, which take precedence over the file.
    keys: keys that take precedence over both.

  Raises:
    ConfigError: the configuration cannot work, on this machine or at all.
  """
  given = dict(x.split("=", 1) for x in overrides if "=" in x)
  for key, value in FORCED.items():
    if given.get(key, value) != value:
      raise ConfigError(f"{key}={given[key]}: a measurement needs {key}={value!r}, on the devices here; leave it out.")
  config_files.load(name)
  kept = [x for x in overrides if x.split("=", 1)[0] not in keys]
  defaults = {x: value for x, value in {**DEFAULTS, "hardware": _hardware()}.items() if x not in given}
  # MaxText's public `initialize` ends the process in case of an error; this function raises it.
  values = pyconfig._initialize_pydantic(["", name, *kept], **(defaults | FORCED | dict(keys)))
  config = pyconfig.HyperParameters(values)
  if config.hardware.removesuffix("_multiprocess") != _hardware():
    raise ConfigError(f"hardware={config.hardware}: JAX finds a {_hardware()} here; leave hardware out.")
  devices.check_mesh(config)
  devices.check_batch(config)
  return config


def _hardware() -> str:
  """The value of `hardware` for the devices that JAX finds."""
  return {"cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend(), jax.default_backend())


def read_stock(name: str, overrides: Sequence[str], keys: Mapping[str, Any]):
  """The configuration of the baseline, from the same arguments as in `read`.

  Raises:
    ConfigError: as `read`, or the model has connections.
  """
  config = read(name, [x for x in overrides if x.split("=", 1)[0] not in CONNECTION_KEYS], stock_keys(keys))
  if config.mudd:
    raise ConfigError(f"--baseline {name} has connections (mudd: true); name a plain model.")
  return config


def check_pair(stock, config, names: tuple[str, str], derived: bool) -> None:
  """Checks that a model and its baseline can be compared.

  Args:
    names: names of the baseline and of the model, for messages.
    derived: whether the baseline is the result of `plain_model`, not of --baseline; then sizes have to be equal.

  Raises:
    ConfigError: the batches differ, or the sizes do.
  """
  for key in (*BATCH, *(SIZES if derived else ())):
    value, stock_value = getattr(config, key), getattr(stock, key)
    if value != stock_value:
      remedy = "name another by --baseline" if derived else f"set {key}= for both"
      raise ConfigError(f"{names[1]} has {key}={value}, and its baseline {names[0]} has {stock_value}; {remedy}.")


def different_keys(stock, config) -> dict[str, list]:
  """The keys in which two configurations differ, as [stock's value, the other's value].

  The keys of dump folders are left out, because their paths depend on the machine.
  """
  values, stock_values = config.get_keys(), stock.get_keys()
  different = (key for key in values if str(values[key]) != str(stock_values[key]) and not key.startswith("dump_"))
  return {key: [str(stock_values[key]), str(values[key])] for key in different}
