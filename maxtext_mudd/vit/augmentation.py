"""What is done to images before the model reads them. Crops and RandAugment of photos are torchvision's.

MixUp, which mixes whole batches, is a part of the train step.
"""

from collections.abc import Callable
import importlib.util
from typing import Any

import numpy as np
from PIL import Image

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.vit.config import RANDAUGMENT_LEVELS, VitConfig

AREA = (0.05, 1.0)  # of an inception crop, as shares of the image
RATIO = (3 / 4, 4 / 3)  # width over height of an inception crop
SHIFT = 8  # a padded crop shifts by up to one of so many parts of the image
RESIZED = 256 / 224  # before the central crop of evaluation, the shorter side over that of the model's images
_GREY = 128  # what RandAugment fills with


def check(config: VitConfig) -> None:
  """Raises ConfigError where torchvision is needed and not installed."""
  if not needs_torchvision(config) or importlib.util.find_spec("torchvision"):
    return
  setting = "crop=inception" if config.crop == "inception" else f"randaugment_level={config.randaugment_level}"
  raise ConfigError(f"{setting} needs torchvision, which is not installed: python3 -m pip install torchvision.")


def needs_torchvision(config: VitConfig) -> bool:
  return config.crop == "inception" or config.randaugment_level > 0


def for_training(config: VitConfig) -> Callable[[dict[str, Any], np.random.Generator], dict[str, np.ndarray]]:
  """The function from an item of a source, and random numbers, to an item of a batch.

  Level and operations of RandAugment are those of TensorFlow's, which big_vision has: level 10 is the strongest.
  """
  transform = _of_torchvision(config) if needs_torchvision(config) else None

  def prepare(item: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    image = item["image"]
    if config.crop == "none":
      image = _central(image, config.image_size)
    elif config.crop == "pad":
      image = _shifted(np.asarray(_central(image, config.image_size)), config.image_size // SHIFT, rng)
    mirrors = config.flip and rng.random() < 0.5
    if transform is not None:
      image = transform(image, mirrors, int(rng.integers(2**31)))
    elif mirrors:
      image = np.asarray(image)[:, ::-1]
    return _item(image, item["label"])

  return prepare


def for_evaluation(config: VitConfig) -> Callable[[dict[str, Any]], dict[str, np.ndarray]]:
  """The function from an item of a source to an item of a batch."""
  return lambda item: _item(_central(item["image"], config.image_size), item["label"])


def _of_torchvision(config: VitConfig) -> Callable[[Any, bool, int], Image.Image]:
  import torch
  from torchvision.transforms import v2

  steps = []
  if config.crop == "inception":
    steps.append(v2.RandomResizedCrop(config.image_size, scale=AREA, ratio=RATIO))
  if config.randaugment_level:
    bins = RANDAUGMENT_LEVELS + 1
    steps.append(v2.RandAugment(config.randaugment_operations, config.randaugment_level, bins, fill=_GREY))

  def transform(image: Any, mirrors: bool, seed: int) -> Image.Image:
    torch.manual_seed(seed)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image = steps[0](image)
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrors else image
    return steps[1](image) if len(steps) > 1 else image

  return transform


def _central(image: Any, size: int) -> Any:
  """The central square of a photo, after its shorter side is resized; an array as it is."""
  if not isinstance(image, Image.Image):
    return image
  scale = round(RESIZED * size) / min(image.size)
  image = image.resize([max(round(scale * x), size) for x in image.size], Image.Resampling.BILINEAR)
  left, top = ((x - size) // 2 for x in image.size)
  return image.crop((left, top, left + size, top + size))


def _shifted(image: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
  """The image shifted by up to `most` pixels in both directions, and zeros."""
  rows, columns = rng.integers(0, 2 * most + 1, 2)
  padded = np.pad(image, ((most, most), (most, most), (0, 0)))
  return padded[rows : rows + image.shape[0], columns : columns + image.shape[1]]


def _item(image: Any, label: int) -> dict[str, np.ndarray]:
  return {"image": np.ascontiguousarray(image, np.uint8), "label": np.int32(label)}
