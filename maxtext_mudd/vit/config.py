"""The configuration of an image classifier: its keys, their checks, and the files that set them.

Imports neither JAX nor MaxText, so that a command line is checked before these are imported.
"""

from collections.abc import Sequence
import enum
import os
import pathlib
import types
from typing import Any, ClassVar, Literal

import omegaconf
from pydantic import ConfigDict, field_validator, model_validator

from maxtext_mudd import assets, connections
from maxtext_mudd.blocks import BlockSpec
from maxtext_mudd.config import errors
from maxtext_mudd.config.depth_connection import DepthConnectionKeys
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.connections.keys import key, raise_first

FOLDER = "vit"  # the folder of these configurations among those of the package
RANDAUGMENT_LEVELS = 10
_BASE = "base_config"
_IMAGE_NET = {"dataset": ("folder", "array_record", "tfrecord")}
_RECORDS = {"dataset": ("array_record", "tfrecord")}


class Dtype(enum.StrEnum):
  """What activations are computed in. NumPy takes its members for dtypes."""

  FLOAT32 = "float32"
  BFLOAT16 = "bfloat16"


class VitConfig(DepthConnectionKeys, *connections.key_groups()):
  """Every key of an image classifier. Those of depth connections are the keys of `mudd_base.yml`.

  Connections read some further settings by MaxText's names. The properties below have them.
  """

  # Modules hold a configuration as static data, which JAX hashes and compares: by identity.
  model_config = ConfigDict(extra="forbid", frozen=True)
  __hash__ = object.__hash__

  def __eq__(self, other):
    return self is other

  mudd: bool = key(False, "Whether the model has depth connections; without them it is a plain Vision Transformer.")

  image_size: int = key(224, "Height and width of the images that the model reads, in pixels.", ge=1)
  channels: Literal[1, 3] = key(3, "Channels of the images: 3 for RGB, 1 for grey.")
  patch: int = key(16, "Height and width of a patch, in pixels.", ge=1)
  width: int = key(384, "D, the width of the model.", ge=4)
  depth: int = key(12, "L, the number of blocks.", ge=1)
  heads: int = key(6, "Attention heads.", ge=1)
  mlp_dim: int = key(1536, "Hidden width of the MLP of each block.", ge=1)
  classes: int = key(1000, "Number of classes.", ge=2)
  dropout: float = key(0.1, "Rate of dropout of embeddings, in MLPs, and of what sublayers add.", ge=0, lt=1)
  dtype: Dtype = key(Dtype.FLOAT32, "What activations are computed in. Parameters are float32.")
  remat: bool = key(False, "Whether the backward pass recomputes each block, which needs less memory.")
  aggregate_coefficient: bool = key(
    False,
    "A learned coefficient of each DA multiplies its aggregates, before X_i is added. The authors' unpublished run had "
    "one, and no static weights.",
    needs={"mudd": (True,), "depth_connection": ("dense",), "mudd_static": (False,), "mudd_post_norm": (False,)},
  )

  dataset: Literal["folder", "array_record", "tfrecord", "fashion_mnist", "digits"] = key(
    "folder",
    "folder: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg; array_record, tfrecord: files of tf.train.Examples, whose "
    "names contain train, val or validation; fashion_mnist: the files of Fashion-MNIST; digits: those of scikit-learn.",
  )
  data_dir: str = key("", "DIR: the folder of the data.")
  image_feature: str = key("image", "Feature of records that has the encoded image.", needs=_RECORDS)
  label_feature: str = key("label", "Feature of records that has the label.", needs=_RECORDS)
  first_label: int = key(0, "The lowest label in the records: 0, or 1 as in image/class/label.", needs=_RECORDS)
  crop: Literal["inception", "pad", "none"] = key(
    "inception",
    "Crop of training images; inception: a part of 5 to 100 % of the area, needs torchvision; pad: a shift by up to an "
    "eighth of the image.",
  )
  flip: bool = key(True, "Whether half of the training images are mirrored.")
  randaugment_level: int = key(
    RANDAUGMENT_LEVELS, "Level of RandAugment, of 10; 0: none. Needs torchvision.", ge=0, le=RANDAUGMENT_LEVELS
  )
  randaugment_operations: int = key(2, "Operations of RandAugment for each image.", ge=1)
  mixup: float = key(0.2, "p of MixUp, whose shares are drawn from Beta(p, p); 0: none.", ge=0)
  workers: int = key(0, "Processes that read training data beside the main one.", ge=0)

  batch_size: int = key(4096, "Images in a train step.", ge=1)
  steps: int = key(93835, "Train steps: 93835 are 300 epochs of ImageNet-1k, 28150 are 90.", ge=1)
  warmup_steps: int = key(10000, "Steps in which the learning rate rises from 0.", ge=0)
  learning_rate: float = key(0.003, "Highest learning rate; a cosine takes it to 0 at the last step.", gt=0)
  weight_decay: float = key(0.3, "Weight decay of kernels, times the learning rate.", ge=0)
  adam_b1: float = key(0.9, "β₁ of AdamW.", ge=0, lt=1)
  adam_b2: float = key(0.999, "β₂ of AdamW.", ge=0, lt=1)
  gradient_clip: float = key(1.0, "The largest norm of gradients; 0: any.", ge=0)
  seed: int = key(0, "Seed of initial values, of the order of images, of augmentation and of dropout.", ge=0)

  run_name: str = key("", "Name of the run's folder; a run of this name is resumed.")
  output: str = key("runs", "Folder of all runs.")
  log_interval: int = key(100, "Steps from one line of metrics to the next.", ge=1)
  eval_interval: int = key(5000, "Steps from one evaluation to the next. The last step is evaluated, too.", ge=1)
  checkpoint_interval: int = key(1000, "Steps from one checkpoint to the next. The last step has one, too.", ge=1)
  checkpoints_kept: int = key(2, "How many of the newest checkpoints are kept.", ge=1)
  data_parallelism: int = key(-1, "Devices along the data axis of the mesh; -1: all that fsdp leaves.", ge=-1)
  fsdp: int = key(1, "Devices over which each parameter is sharded.", ge=1)

  # How a run is observed: what may change when it is resumed.
  FREE_ON_RESUME: ClassVar = (
    *("output", "run_name", "data_dir", "workers", "log_interval", "eval_interval", "checkpoint_interval"),
    *("checkpoints_kept", "data_parallelism", "fsdp", "remat"),
  )

  # What connections read, by MaxText's names.
  block_spec: ClassVar = BlockSpec("attention_norm", "mlp_norm", attention="attention", has_biases=True)
  weight_dtype: ClassVar = "float32"
  normalization_layer_epsilon: ClassVar = 1e-6
  matmul_precision: ClassVar = types.SimpleNamespace(value="default")
  logical_axis_rules: ClassVar = (("activation_batch", ("data", "fsdp")),)
  scan_layers: ClassVar = False
  ici_pipeline_parallelism: ClassVar = 1
  dcn_pipeline_parallelism: ClassVar = 1
  record_internal_nn_metrics: ClassVar = False
  enable_dropout: ClassVar = False  # MaxText's, of whole layers; the dropout of this model works with all families
  dropout_rate: ClassVar = 0.0
  mtp_num_layers: ClassVar = 0
  vocab_size: ClassVar = 0

  @property
  def emb_dim(self) -> int:
    return self.width

  @property
  def num_decoder_layers(self) -> int:
    return self.depth

  @property
  def remat_policy(self) -> str:
    return "full" if self.remat else "none"

  @property
  def shard_mode(self):
    from maxtext.common.common_types import ShardMode

    return ShardMode.AUTO

  @property
  def hardware(self) -> str:
    import jax

    return jax.default_backend()

  @property
  def checkpoint_dir(self) -> str:
    return str(self.folder / "checkpoints")

  @property
  def folder(self) -> pathlib.Path:
    """The folder of the run."""
    return pathlib.Path(self.output, self.run_name)

  @property
  def connection(self) -> str:
    """The name of the family of connections."""
    return self.depth_connection if self.mudd else "residual"

  @property
  def tokens(self) -> int:
    """T, the number of patches of an image."""
    return (self.image_size // self.patch) ** 2

  @field_validator("run_name")
  @classmethod
  def _check_run_name(cls, name: str) -> str:
    if name in (".", "..") or os.sep in name:
      raise ValueError("it is the name of a folder in output; write it without /")
    return name

  @model_validator(mode="after")
  def _check_model(self):
    if self.image_size % self.patch:
      near = max(self.image_size // self.patch, 1) * self.patch
      raise ValueError(
        f"image_size={self.image_size} is not a multiple of patch={self.patch}; use image_size={near}, or another "
        "patch."
      )
    if self.width % self.heads:
      raise ValueError(f"heads={self.heads} does not divide width={self.width}; use a divisor of it.")
    if self.width % 4:
      raise ValueError(
        f"width={self.width} is not a multiple of 4, as sines and cosines of two coordinates need; use "
        f"{self.width // 4 * 4}."
      )
    if self.warmup_steps >= self.steps:
      raise ValueError(
        f"warmup_steps={self.warmup_steps} leaves nothing of steps={self.steps}; use fewer warmup_steps."
      )
    return self

  @model_validator(mode="after")
  def _check_augmentation(self):
    if self.channels == 1 and self.randaugment_level:
      raise ValueError(f"randaugment_level={self.randaugment_level} needs channels=3; set randaugment_level=0.")
    if self.dataset not in _IMAGE_NET["dataset"] and self.crop == "inception":
      raise ValueError(f"crop=inception is for photos, and dataset={self.dataset} has none; use crop=pad or crop=none.")
    return self

  @model_validator(mode="after")
  def _check_connections(self):
    if self.mudd_extra_embeddings:
      raise ValueError(
        f"mudd_extra_embeddings={self.mudd_extra_embeddings} needs tokens, and images have none; leave it at 0."
      )
    if self.mudd_mtp != "head":
      raise ValueError(f"mudd_mtp={self.mudd_mtp} needs tokens to predict, and images have none; leave it at head.")
    if self.mudd:
      connections.family(self).check_sizes(self)
      raise_first(connections.family(self).refusals(self))
    return self


def read(arguments: Sequence[str]) -> VitConfig:
  """The configuration of a command line: FILE.yml and any key=value.

  Raises:
    ConfigError: a file does not exist, or a key or value cannot work.
  """
  if not arguments or not arguments[0].endswith(".yml"):
    first = arguments[0] if arguments else "no argument"
    raise ConfigError(f"{first}: name a configuration first, such as vit/mudd_vit_s16_i1k.yml, and then key=value.")
  with errors.one_sentence(VitConfig):
    values = omegaconf.OmegaConf.merge(*_files(arguments[0]))
    for argument in arguments[1:]:
      if "=" not in argument[1:] or argument.startswith("-"):
        raise ConfigError(f"{argument} is not key=value; write it like steps=1000.")
    values = omegaconf.OmegaConf.merge(values, omegaconf.OmegaConf.from_dotlist(list(arguments[1:])))
    return build(omegaconf.OmegaConf.to_container(values))


def build(values: dict[str, Any]) -> VitConfig:
  """The configuration with these values.

  Raises:
    ConfigError: a key or value cannot work.
  """
  for name in values:
    if name not in VitConfig.model_fields:
      raise ConfigError(errors.unknown_key(name, VitConfig.model_fields))
  with errors.one_sentence(VitConfig):
    return VitConfig(**values)


def values(config: VitConfig) -> dict[str, Any]:
  """All keys and values, as `build` takes them and YAML has them."""
  return config.model_dump(mode="json")


def epochs(config: VitConfig, images: int) -> float:
  """How often a run reads this many images."""
  return config.steps * config.batch_size / images


def _files(name: str) -> list[omegaconf.DictConfig]:
  """What the file of this name and its bases set, the first base first."""
  path, found, seen = _find(name), [], []
  while True:
    if path.resolve() in seen:
      raise ConfigError(f"{path}: its base_config leads back to itself; remove it.")
    seen.append(path.resolve())
    of_file = omegaconf.OmegaConf.load(path)
    if not isinstance(of_file, omegaconf.DictConfig):
      raise ConfigError(f"{path}: a configuration file maps keys to values, as in `mudd: true`.")
    base = of_file.pop(_BASE, None)
    found.append(of_file)
    if base is None:
      return found[::-1]
    beside = path.parent / base
    path = beside if beside.is_file() else _find(base)


def _find(name: str) -> pathlib.Path:
  """The file of a name: a path, or a file of the package, with or without yaml/ before it."""
  of_package = assets.CONFIGURATIONS / name.removeprefix("yaml/")
  for path in (pathlib.Path(name), of_package, assets.CONFIGURATIONS / FOLDER / name):
    if path.is_file():
      return path
  there = sorted(f"{FOLDER}/{path.name}" for path in (assets.CONFIGURATIONS / FOLDER).glob("*.yml"))
  raise ConfigError(
    f"{name}: no such configuration file; the nearest of this package is {errors.nearest(name, there)}."
  )
