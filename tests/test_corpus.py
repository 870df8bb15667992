"""The default corpus: deterministic, split by file, and one byte per target token."""

import numpy as np
import pyarrow.parquet
import pytest

from maxtext_mudd import corpus
from tests import runs


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  folder = tmp_path_factory.mktemp("library")
  for i in range(60):
    (folder / f"m{i}.py").write_text(f"NUMBER = {i}\n" + "text = 'naïve — ümlaut'\n" * i * 3)
  (folder / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n\xe9\n")
  packages = folder / "site-packages"
  packages.mkdir()
  (packages / "other.py").write_text("SECRET = 1\n")
  return folder


def rows(folder, split):
  return pyarrow.parquet.read_table(folder / f"{split}.parquet")["text"].to_pylist()


def test_same_library_same_corpus(library, tmp_path):
  for name in ("first", "second"):
    corpus.build(library, tmp_path / name)
  for split in ("train", "eval"):
    first = (tmp_path / "first" / f"{split}.parquet").read_bytes()
    assert first == (tmp_path / "second" / f"{split}.parquet").read_bytes()
  assert not list(tmp_path.rglob("*.part"))


def test_every_byte_is_there_once_and_splits_share_no_file(library, tmp_path):
  sizes = corpus.build(library, tmp_path)
  texts = {path: corpus.read(library / path) for path in corpus.source_files(library)}
  assert {path.name for path, text in texts.items() if text is None} == {"latin.py"}
  assert not any("SECRET" in text for text in texts.values() if text)
  for split in ("train", "eval"):
    found = rows(tmp_path, split)
    files = [text for path, text in texts.items() if text and corpus.is_eval(path) == (split == "eval")]
    assert sizes[split] == sum(len(text.encode()) for text in files) == sum(len(row.encode()) for row in found)
    assert sorted(found) == sorted(piece for text in files for piece in corpus.pieces(text))
    assert all(0 < len(row.encode()) <= corpus.PIECE_BYTES for row in found)


def test_pieces_put_together_are_the_text():
  text = "é" * 1000 + "a" + "—" * 700
  found = list(corpus.pieces(text))
  assert "".join(found) == text
  assert min(len(piece.encode()) for piece in found[:-1]) >= corpus.PIECE_BYTES - 3


def test_a_library_without_sources_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no Python sources for the train split"):
    corpus.build(tmp_path, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_target_is_a_byte(tmp_path):
  """Through MaxText's own pipeline: targets of a batch are the bytes of its rows, and nothing else is counted."""
  from maxtext.configs import pyconfig
  from maxtext.input_pipeline.input_pipeline_interface import create_data_iterator
  from maxtext.utils import maxtext_utils

  overrides = runs.build_corpus(tmp_path)
  argv = ["", runs.RUN_YML, "run_name=x", *overrides, "max_target_length=256", f"base_output_directory={tmp_path}"]
  cfg = pyconfig.initialize(argv)
  iterator, _ = create_data_iterator(cfg, maxtext_utils.get_mesh_from_config(cfg))
  batch = {key: np.asarray(value) for key, value in next(iterator).items()}
  texts = rows(tmp_path / "corpus", "train")[: len(batch["targets"])]
  for i, text in enumerate(texts):
    counted = batch["targets"][i][batch["targets_segmentation"][i] != 0]
    assert len(counted) == len(text.encode())
    assert batch["inputs"][i][0] == 1  # <bos>
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(cfg.tokenizer_path).decode(counted) == text


def test_byte_tokenizer_takes_special_tokens_in_text_for_text():
  from transformers import AutoTokenizer

  from maxtext_mudd.assets import BYTE_TOKENIZER_FOLDER

  tokenizer = AutoTokenizer.from_pretrained(BYTE_TOKENIZER_FOLDER, add_bos_token=True, add_eos_token=False)
  text = "<pad><bos>" + bytes(range(128)).decode() + "é"
  ids = tokenizer.encode(text)
  assert ids[0] == 1 and len(ids) == 1 + len(text.encode())
  assert tokenizer.decode(ids[1:]) == text
