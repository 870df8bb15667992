"""Images to train on: every source, their order, what augmentation does, and mistakes, each in one sentence."""

import gzip
import importlib.util
import struct

from array_record.python import array_record_module
from maxtext.input_pipeline.protos import example_pb2
import numpy as np
from PIL import Image
import pytest

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.vit import augmentation, data
from tests import vit_models

PHOTOS = {"channels": 3, "classes": 2, "batch_size": 4}
RNG = np.random.default_rng


def photo(seed, size=(20, 12)):
  return RNG(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)


def make_folder(root):
  """Three images of a class for training, and one for testing."""
  for split, number in (("train", 3), ("val", 1)):
    for label, name in enumerate(("cat", "dog")):
      (root / split / name).mkdir(parents=True)
      for k in range(number):
        Image.fromarray(photo(10 * label + k)).save(root / split / name / f"{k}.png")
      (root / split / name / "notes.txt").write_text("no image")
  return {"dataset": "folder", "data_dir": str(root), **PHOTOS}


def examples(number, label="label", first=0):
  import io

  for k in range(number):
    buffer = io.BytesIO()
    Image.fromarray(photo(k)).save(buffer, "png")
    example = example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(buffer.getvalue())
    example.features.feature[label].int64_list.value.append(first + k % 2)
    yield example.SerializeToString()


def write_tfrecord(path, records):
  """Checksums are left zero: nothing reads them."""
  path.write_bytes(b"".join(struct.pack("<QI", len(x), 0) + x + bytes(4) for x in records))


def make_tfrecord(root, **kwargs):
  records = list(examples(6, **kwargs))
  write_tfrecord(root / "x-train.tfrecord-00000-of-00002", records[:4])
  write_tfrecord(root / "x-train.tfrecord-00001-of-00002", records[4:])
  write_tfrecord(root / "x-validation.tfrecord-00000-of-00001", records[:2])
  (root / "dataset_info_train.json").write_text("{}")
  return {"dataset": "tfrecord", "data_dir": str(root), **PHOTOS}


def make_array_record(root):
  for name, number in (("train", 6), ("validation", 2)):
    writer = array_record_module.ArrayRecordWriter(str(root / f"x-{name}.array_record-00000"), "group_size:1")
    for record in examples(number):
      writer.write(record)
    writer.close()
  return {"dataset": "array_record", "data_dir": str(root), **PHOTOS}


MAKE = {"folder": make_folder, "tfrecord": make_tfrecord, "array_record": make_array_record}


@pytest.mark.parametrize("name", MAKE)
def test_sources(name, tmp_path):
  config = vit_models.config(**MAKE[name](tmp_path))
  train, val = data.check(config)
  assert (len(train), len(val)) == (6, 2)
  labels = [train[k]["label"] for k in range(6)]
  assert sorted(labels) == [0, 0, 0, 1, 1, 1]
  index = labels.index(1)
  image = train[index]["image"]
  assert image.size == (20, 12)
  np.testing.assert_array_equal(np.asarray(image), photo(10 if name == "folder" else 1))
  (batch,) = data.eval_batches(config, val, 4)
  assert batch["image"].shape == (4, 8, 8, 3)
  assert batch["image"].dtype == np.uint8
  np.testing.assert_array_equal(batch["mask"], [True, True, False, False])


def test_labels_may_count_from_one(tmp_path):
  config = vit_models.config(**make_tfrecord(tmp_path, label="class", first=1), label_feature="class", first_label=1)
  assert [data.source(config, "val")[k]["label"] for k in range(2)] == [0, 1]


def write_idx(path, array):
  header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
  path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def make_fashion_mnist(root):
  for name, number in (("train", 40), ("t10k", 20)):
    write_idx(root / f"{name}-images-idx3-ubyte.gz", RNG(number).integers(0, 256, (number, 28, 28)))
    write_idx(root / f"{name}-labels-idx1-ubyte.gz", np.arange(number) % 10)
  return {"dataset": "fashion_mnist", "data_dir": str(root), "image_size": 28}


def test_fashion_mnist(tmp_path):
  train, val = data.check(vit_models.config(**make_fashion_mnist(tmp_path)))
  assert (len(train), len(val)) == (40, 20)
  np.testing.assert_array_equal(train[3]["image"][..., 0], RNG(40).integers(0, 256, (40, 28, 28))[3])
  assert train[13]["label"] == 3


def test_digits():
  train, val = data.check(vit_models.config())
  assert (len(train), len(val)) == (1437, 360)
  assert train[0]["image"].shape == (8, 8, 1)
  assert train.images.max() == 255


def test_each_epoch_has_all_images_in_another_order():
  """17 does not divide 1437, so that an epoch ends within a batch."""
  config = vit_models.config(batch_size=17)
  images = data.source(config, "train")
  indices = data.Arrays(images.images, np.arange(len(images)))
  batches = data.train_iterator(config, indices)
  read = np.concatenate([next(batches)["label"] for _ in range(2 * 1437 // 17 + 1)])
  first, second = read[:1437], read[1437 : 2 * 1437]
  np.testing.assert_array_equal(np.sort(first), np.arange(1437))
  np.testing.assert_array_equal(np.sort(second), np.arange(1437))
  assert (first != second).mean() > 0.99
  assert (first != np.arange(1437)).mean() > 0.99


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_continue_where_a_state_was_taken(workers):
  config = vit_models.config(crop="pad", flip=True, workers=workers, seed=7)
  images = data.source(config, "train")
  batches = data.train_iterator(config, images)
  for _ in range(3):
    next(batches)
  state = batches.get_state()
  expected = [next(batches) for _ in range(3)]
  other = data.train_iterator(config, images)
  other.set_state(state)
  for batch in expected:
    found = next(other)
    for name in batch:
      np.testing.assert_array_equal(found[name], batch[name])


def test_padded_crops_and_mirrors():
  config = vit_models.config(crop="pad", flip=True)
  prepare, image = augmentation.for_training(config), photo(0, (8, 8))[..., :1]
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
  possible = [
    crop[:, ::step].tobytes()
    for step in (1, -1)
    for crop in (padded[r : r + 8, c : c + 8] for r in range(3) for c in range(3))
  ]
  rng = RNG(0)
  found = [possible.index(prepare({"image": image, "label": 0}, rng)["image"].tobytes()) for _ in range(400)]
  assert len(set(found)) == len(possible) == 18


def test_evaluation_reads_the_middle():
  """Of 1792 × 896, resized to 512 × 256, the columns 144 to 367; a gradient tells where."""
  config = vit_models.config(image_size=224, patch=16, channels=3, dataset="folder", classes=2)
  ramp = np.broadcast_to(np.linspace(0, 255, 1792)[None, :, None], (896, 1792, 3)).astype(np.uint8)
  image = augmentation.for_evaluation(config)({"image": Image.fromarray(ramp), "label": 1})["image"]
  assert image.shape == (224, 224, 3)
  expected = (144 + np.arange(224) + 0.5) / 512 * 255
  assert np.abs(image[100, :, 0] - expected).max() <= 1.5


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_crops_and_randaugment_of_torchvision():
  config = vit_models.config(
    image_size=16, channels=3, dataset="folder", classes=2, crop="inception", flip=True, randaugment_level=10
  )
  prepare, item = augmentation.for_training(config), {"image": Image.fromarray(photo(0, (40, 30))), "label": 1}
  first, again, other = (prepare(item, RNG(seed))["image"] for seed in (0, 0, 1))
  assert first.shape == (16, 16, 3)
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


MISTAKES = [
  ({"image_size": 28}, "dataset=digits has images of 8 pixels; set image_size=8."),
  ({"classes": 9}, "dataset=digits has 10 classes; set classes=10."),
  ({"channels": 3}, "dataset=digits has images of 1 channels; set channels=1."),
  ({"batch_size": 2000}, "batch_size=2000 is more than the 1437 images to train on; use at most that."),
  ({"dataset": "folder", **PHOTOS}, "dataset=folder needs data_dir, the folder of the images; set it."),
  (
    {"dataset": "tfrecord", "data_dir": "nowhere", **PHOTOS},
    "data_dir=nowhere: there is no such folder; name the one with the images.",
  ),
  (
    {"dataset": "fashion_mnist", "data_dir": "nowhere", "image_size": 28},
    "nowhere: there is no such folder with Fashion-MNIST; `apt-get install dataset-fashion-mnist` brings it on Debian, "
    "or set data_dir to the folder of its four .gz files, or dataset=digits.",
  ),
]


@pytest.mark.parametrize(("keys", "sentence"), MISTAKES)
def test_mistakes_are_refused_in_one_sentence(keys, sentence):
  with pytest.raises(ConfigError) as error:
    data.check(vit_models.config(**keys))
  assert str(error.value) == sentence


def refused(match, **keys):
  with pytest.raises(ConfigError, match=match):
    data.check(vit_models.config(**keys))


def test_mistakes_of_folders(tmp_path):
  keys = make_folder(tmp_path)
  refused(r"train has 2 folders of classes; set classes=2, or complete them\.$", **keys | {"classes": 3})
  (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
  refused(r"0\.png cannot be read as an image \(.*\); repair it, or remove it\.$", **keys)
  (tmp_path / "val").rename(tmp_path / "other")
  refused(r" has no folder val; make it, with a folder for each class\.$", **keys)


def test_mistakes_of_records(tmp_path):
  keys = make_tfrecord(tmp_path, first=5)
  refused("record 0 in .* has the label 5, which is none of classes=2 from first_label=0 on; change one", **keys)
  refused("image_feature=photo: record 0 in .* has no such feature; it has image, label", image_feature="photo", **keys)
  (tmp_path / "x-train.tfrecord-00001-of-00002").write_bytes(b"no TFRecord file at all")
  refused("00001-of-00002: this is no TFRecord file, or it is incomplete; copy it again", **keys)
  for path in tmp_path.glob("*train*"):
    path.unlink()
  refused("has no files of records with train in their names; name another folder", **keys)


def test_mistakes_of_idx_files(tmp_path):
  keys = make_fashion_mnist(tmp_path)
  (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"")
  refused("t10k-images-idx3-ubyte.gz cannot be read .*; copy the four files of Fashion-MNIST again", **keys)


@pytest.mark.parametrize("module", ["torchvision", "sklearn"])
def test_missing_modules_are_named_with_their_command(module, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
  if module == "sklearn":
    refused("dataset=digits needs scikit-learn, which is not installed: python3 -m pip install scikit-learn")
  else:
    sentence = "crop=inception needs torchvision, which is not installed: python3 -m pip install torchvision"
    refused(sentence, dataset="folder", crop="inception", **PHOTOS)
