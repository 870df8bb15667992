"""Images to train on and to evaluate on: where they come from, and the order in which a run reads them.

An item is {"image": uint8 [H,W,C] of the model's size, "label": int}. All sources can be read at any index, so that
Grain shuffles whole epochs, and resumes at any step by its number.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import gzip
import importlib.util
import io
import pathlib
import struct
from typing import Any, Protocol

from absl import flags
import grain
import numpy as np
from PIL import Image

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.vit import augmentation
from maxtext_mudd.vit.config import VitConfig

SPLITS = {"train": ("train",), "val": ("validation", "val")}  # names of folders, and parts of the names of files
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FASHION_MNIST = ("data/fashion_mnist", "/usr/share/datasets/fashion-mnist")  # the second is Debian's


class Source(Protocol):
  """Images with labels from 0 on."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """ "image": uint8 [H,W,C] or a PIL image of any size; "label"."""


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Images in memory, of one size."""

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self.images[index], "label": int(self.labels[index])}


@dataclasses.dataclass(frozen=True)
class Files:
  """Image files, each with its label."""

  paths: Sequence[pathlib.Path]
  labels: Sequence[int]

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": _decoded(self.paths[index].read_bytes(), self.paths[index]), "label": self.labels[index]}


class TfRecords:
  """The records of TFRecord files, at any index. Construction reads the length of every record, 12 bytes of each."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    self.paths = tuple(paths)
    found = [(number, start, size) for number, path in enumerate(paths) for start, size in _positions(path)]
    self.positions = np.array(found, np.int64).reshape(-1, 3)

  def __len__(self) -> int:
    return len(self.positions)

  def __getitem__(self, index: int) -> bytes:
    number, start, size = map(int, self.positions[index])
    with open(self.paths[number], "rb") as file:
      file.seek(start)
      return file.read(size)


@dataclasses.dataclass(frozen=True)
class Examples:
  """Records of tf.train.Examples with an encoded image and a label."""

  records: Any
  config: VitConfig

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    from maxtext.input_pipeline.protos import example_pb2

    config = self.config
    feature = example_pb2.Example.FromString(self.records[index]).features.feature
    image, label = feature[config.image_feature].bytes_list.value, feature[config.label_feature].int64_list.value
    for name, value in (("image_feature", image), ("label_feature", label)):
      if not value:
        there = ", ".join(sorted(x for x in feature if x != getattr(config, name)))
        raise ConfigError(
          f"{name}={getattr(config, name)}: record {index} in {config.data_dir} has no such feature; it has {there}."
        )
    where = f"record {index} in {config.data_dir}"
    number = int(label[0]) - config.first_label
    if not 0 <= number < config.classes:
      raise ConfigError(
        f"{where} has the label {label[0]}, which is none of classes={config.classes} from first_label="
        f"{config.first_label} on; change one of these keys."
      )
    return {"image": _decoded(image[0], where), "label": number}


def source(config: VitConfig, split: str) -> Source:
  """The images of a split.

  Args:
    split: "train" or "val".

  Raises:
    ConfigError: there are no such images, or their classes are not those of the configuration.
  """
  found = _SOURCES[config.dataset](config, split)
  if len(found) == 0:
    raise ConfigError(
      f"data_dir={config.data_dir}: there are no images to {'train' if split == 'train' else 'test'} on."
    )
  return found


def check(config: VitConfig) -> tuple[Source, Source]:
  """The sources of both splits, after their first images are read.

  Raises:
    ConfigError: as `source`; or a module is missing; or there are fewer images than a batch has.
  """
  augmentation.check(config)
  sources = source(config, "train"), source(config, "val")
  for of_split in sources:
    image = of_split[0]["image"]
    channels = 3 if isinstance(image, Image.Image) else image.shape[-1]
    if channels != config.channels:
      raise ConfigError(f"dataset={config.dataset} has images of {channels} channels; set channels={channels}.")
  if len(sources[0]) < config.batch_size:
    raise ConfigError(
      f"batch_size={config.batch_size} is more than the {len(sources[0])} images to train on; use at most that."
    )
  return sources


def train_iterator(config: VitConfig, images: Source) -> grain.DatasetIterator:
  """Batches without end: uint8 [batch,H,W,C] and int32 [batch]. Each epoch has its own order. The order, and what
  augmentation does to each image, follow from the seed."""
  dataset = grain.MapDataset.source(images).seed(config.seed).shuffle().repeat()
  dataset = dataset.random_map(augmentation.for_training(config))
  # One thread: torchvision draws from a generator that all threads share.
  dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * config.batch_size))
  dataset = dataset.batch(config.batch_size, drop_remainder=True)
  if config.workers:
    flags.FLAGS.mark_as_parsed()  # Grain reads a flag of Abseil, and this command has none
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
  return iter(dataset)


def eval_batches(config: VitConfig, images: Source, size: int) -> Iterator[dict[str, np.ndarray]]:
  """All images once, in batches with a mask; the last one is padded with its first image."""
  dataset = grain.MapDataset.source(images).map(augmentation.for_evaluation(config)).to_iter_dataset()
  for batch in dataset.batch(size, drop_remainder=False):
    missing = size - len(batch["label"])
    padded = {name: np.concatenate([x, np.repeat(x[:1], missing, 0)]) for name, x in batch.items()}
    yield padded | {"mask": np.arange(size) < size - missing}


def _fashion_mnist(config: VitConfig, split: str) -> Arrays:
  places = [pathlib.Path(x) for x in ([config.data_dir] if config.data_dir else FASHION_MNIST)]
  folder = next((place for place in places if place.is_dir()), None)
  if folder is None:
    raise ConfigError(
      f"{' and '.join(map(str, places))}: there is no such folder with Fashion-MNIST; `apt-get install "
      "dataset-fashion-mnist` brings it on Debian, or set data_dir to the folder of its four .gz files, or dataset="
      "digits."
    )
  name = "train" if split == "train" else "t10k"
  images, labels = (_idx(folder / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
  return _arrays(config, images[..., None], labels)


def _digits(config: VitConfig, split: str) -> Arrays:
  """Every fifth of scikit-learn's digits is for testing. Their pixels go up to 16."""
  if importlib.util.find_spec("sklearn") is None:
    raise ConfigError("dataset=digits needs scikit-learn, which is not installed: python3 -m pip install scikit-learn.")
  from sklearn import datasets

  digits = datasets.load_digits()
  is_chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "val")
  images = np.minimum(digits.images[is_chosen] * 16, 255).astype(np.uint8)
  return _arrays(config, images[..., None], digits.target[is_chosen])


def _arrays(config: VitConfig, images: np.ndarray, labels: np.ndarray) -> Arrays:
  size, classes = images.shape[1], int(labels.max()) + 1
  if config.image_size != size:
    raise ConfigError(f"dataset={config.dataset} has images of {size} pixels; set image_size={size}.")
  if config.classes != classes:
    raise ConfigError(f"dataset={config.dataset} has {classes} classes; set classes={classes}.")
  return Arrays(images, labels)


def _folder(config: VitConfig, split: str) -> Files:
  root = _root(config)
  folder = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
  if folder is None:
    raise ConfigError(f"data_dir={root} has no folder {SPLITS[split][-1]}; make it, with a folder for each class.")
  names = sorted(path.name for path in folder.iterdir() if path.is_dir())
  if len(names) != config.classes:
    raise ConfigError(f"{folder} has {len(names)} folders of classes; set classes={len(names)}, or complete them.")
  found = [
    (path, label)
    for label, name in enumerate(names)
    for path in sorted((folder / name).iterdir())
    if path.suffix.lower() in IMAGES
  ]
  return Files([path for path, _ in found], [label for _, label in found])


def _array_record(config: VitConfig, split: str) -> Examples:
  return Examples(grain.sources.ArrayRecordDataSource([str(path) for path in _record_files(config, split)]), config)


def _tfrecord(config: VitConfig, split: str) -> Examples:
  return Examples(TfRecords(_record_files(config, split)), config)


_SOURCES = {
  "folder": _folder,
  "array_record": _array_record,
  "tfrecord": _tfrecord,
  "fashion_mnist": _fashion_mnist,
  "digits": _digits,
}


def _record_files(config: VitConfig, split: str) -> list[pathlib.Path]:
  root = _root(config)
  files = sorted(path for path in root.iterdir() if path.is_file() and any(x in path.name for x in SPLITS[split]))
  files = [path for path in files if not path.name.endswith((".json", ".txt", ".gz"))]
  if not files:
    names = " or ".join(SPLITS[split])
    raise ConfigError(f"data_dir={root} has no files of records with {names} in their names; name another folder.")
  return files


def _root(config: VitConfig) -> pathlib.Path:
  if not config.data_dir:
    raise ConfigError(f"dataset={config.dataset} needs data_dir, the folder of the images; set it.")
  root = pathlib.Path(config.data_dir)
  if not root.is_dir():
    raise ConfigError(f"data_dir={root}: there is no such folder; name the one with the images.")
  return root


def _positions(path: pathlib.Path) -> Iterator[tuple[int, int]]:
  """Start and size of each record of a TFRecord file: length and checksum (12 bytes), payload, checksum (4 bytes)."""
  end = path.stat().st_size
  with open(path, "rb") as file:
    start = 0
    while start < end:
      header = file.read(12)
      size = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else end
      if start + 16 + size > end:
        raise ConfigError(f"{path}: this is no TFRecord file, or it is incomplete; copy it again.")
      yield start + 12, size
      start += 16 + size
      file.seek(start)


def _idx(path: pathlib.Path) -> np.ndarray:
  """An array of bytes in the IDX format of MNIST."""
  try:
    data = gzip.decompress(path.read_bytes())
    (magic,) = struct.unpack_from(">I", data)
    shape = struct.unpack_from(f">{magic & 255}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
  except (OSError, EOFError, ValueError, struct.error) as error:
    raise ConfigError(f"{path} cannot be read ({error}); copy the four files of Fashion-MNIST again.") from error


def _decoded(data: bytes, where: Any) -> Image.Image:
  with contextlib.ExitStack() as stack:
    try:
      return stack.enter_context(Image.open(io.BytesIO(data))).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
      raise ConfigError(f"{where} cannot be read as an image ({error}); repair it, or remove it.") from error
