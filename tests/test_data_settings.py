"""Which local files a pattern of a configuration names."""

import types

import pytest

from maxtext_mudd.runs import data_settings


@pytest.mark.parametrize(
  ("key", "dataset_type", "file_type", "names"),
  [
    ("grain_train_files", "grain", "parquet", ["a/x"]),
    ("hf_train_files", "grain", "parquet", ["a/x"]),  # Grain reads these by the same pattern
    ("hf_train_files", "grain", "text", ["a/b/x", "a/x", "x"]),  # converted by this package
    ("hf_train_files", "hf", "parquet", ["a/b/x", "a/x", "x"]),
  ],
)
def test_two_stars_match_as_in_what_reads_the_files(key, dataset_type, file_type, names, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "a" / "b").mkdir(parents=True)
  for name in ("x", "a/x", "a/b/x"):
    (tmp_path / name).touch()
  config = types.SimpleNamespace(dataset_type=dataset_type, grain_file_type=file_type, hf_path=file_type)
  assert [str(file.relative_to(tmp_path)) for file in data_settings.matches(key, "~/**/x", config)] == names
