"""Files that a run cannot use, each refused in one sentence: configurations, corpora, checkpoints, outputs."""

import pathlib
import re
import subprocess

from maxtext.configs import pyconfig
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet
import pytest

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import preflight
from tests import data_files, models, runs
from tests.refusals import refuse


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return runs.build_corpus(tmp_path_factory.mktemp("corpus"))


UNREADABLE = {
  "no rows": (pa.table({"text": pa.array([], pa.string())}), "{key}: the file holds no text; write it again."),
  "no bytes": (b"", "{key}: the file holds no text; write it again."),
  "half a file": (b"PAR1 and then nothing", "{key} is not a complete parquet file; write it again."),
  "another column": (pa.table({"content": ["x"]}), "{key}: the file has no column 'text'; it has content."),
  "numbers": (pa.table({"text": [1, 2]}), "{key}: column 'text' holds int64; text or lists of tokens are needed."),
  "a folder": (None, "{key} is not a file; name files, or a pattern that matches files."),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_corpus_that_cannot_be_read(kind, tmp_path, monkeypatch, capsys):
  content, message = UNREADABLE[kind]
  file = tmp_path / "corpus.parquet"
  if content is None:
    file.mkdir()
  elif isinstance(content, bytes):
    file.write_bytes(content)
  else:
    pa.parquet.write_table(content, file)
  key = f"grain_train_files={file}"
  argv = [runs.RUN_YML, key, f"base_output_directory={tmp_path / 'out'}", "run_name=x"]
  assert refuse(argv, monkeypatch, capsys) == message.format(key=key)
  assert not (tmp_path / "out").exists()


def test_files_that_maxtext_finds_are_not_refused(tmp_path, monkeypatch):
  """A hub's own paths, remote files, folders of mmap_npy, Megatron pairs, and the home folder."""
  data_files.write_pair(tmp_path / "pair", [np.arange(5)])
  (tmp_path / "home.parquet").write_bytes(pathlib.Path(corpus_file(tmp_path)).read_bytes())
  monkeypatch.setenv("HOME", str(tmp_path))
  output = f"base_output_directory={tmp_path / 'out'}"
  for overrides in (
    ["dataset_type=hf", "hf_path=allenai/c4", "hf_train_files=en/*.json.gz"],
    ["dataset_type=hf", "hf_path=json", "hf_train_files=https://example.org/a.json"],
    ["grain_train_files=gs://bucket/*.parquet"],
    ["grain_file_type=mmap_npy", f"grain_train_files={tmp_path}"],
    ["grain_file_type=mmap", f"grain_train_files={tmp_path / 'pair'}"],
    ["grain_train_files=~/home.parquet"],
  ):
    cfg = pyconfig.initialize_pydantic(["", runs.RUN_YML, "run_name=x", output, *overrides])
    preflight.check_files(cfg)


def corpus_file(folder) -> str:
  return runs.build_corpus(folder)[0].split("=")[1]


def test_checkpoints_to_start_from(corpus, tmp_path, monkeypatch, capsys):
  """Are looked at before the folders of the run are made."""
  nowhere, other = tmp_path / "nowhere", tmp_path / "other"
  embedding = {"embedding": np.zeros((320, 16), np.float32)}
  ocp.PyTreeCheckpointer().save(other / "items", {"params": {"params": {"token_embedder": embedding}}})
  argv = [runs.RUN_YML, *corpus, f"base_output_directory={tmp_path / 'out'}", "run_name=x"]
  advice = "there is no such folder; name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP."
  for key in ("load_parameters_path", "load_full_state_path"):
    assert refuse([*argv, f"{key}={nowhere}"], monkeypatch, capsys) == f"{key}={nowhere}: {advice}"
  said = refuse([*argv, f"load_parameters_path={other}"], monkeypatch, capsys)
  assert re.fullmatch(rf"{other}/items has no \S+, which this configuration needs; name the keys that .*", said)
  assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(corpus, tmp_path, monkeypatch, capsys):
  occupied = tmp_path / "file"
  occupied.touch()
  output = occupied / "out"
  argv = [runs.RUN_YML, *corpus, f"base_output_directory={output}", "run_name=x"]
  expected = (
    f"base_output_directory={output}: {occupied} is not a folder that files can be written to; name another folder."
  )
  assert refuse(argv, monkeypatch, capsys) == expected
  assert list(tmp_path.iterdir()) == [occupied]


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("model.yaml", "mudd: true", "{file}: a configuration file must end in .yml; rename it or put the file first."),
    ("absent.yml", None, "{file}: no such configuration file; the nearest of this package is "),
    ("broken.yml", "mudd: [", "An argument or a configuration file is not valid YAML: while parsing a flow node"),
    (
      "orphan.yml",
      "base_config: nowhere.yml",
      "{file}: base_config=nowhere.yml: no such configuration file beside it, in MaxText or in this package.",
    ),
    (
      "rootless.yml",
      "mudd: true",
      "{file} has no base_config; write base_config: mudd_base.yml (or base.yml, MaxText's own).",
    ),
    ("list.yml", "- mudd", "{file}: a configuration file maps keys to values, as in `mudd: true`."),
    ("latin.yml", b"run_name: \xe9", "'utf-8' codec can't decode byte 0xe9"),
    (
      "circle.yml",
      "base_config: circle.yml",
      "{file}: its base_config leads back to itself; end the chain in base.yml.",
    ),
  ],
)
def test_configuration_files(name, text, message, tmp_path, monkeypatch, capsys):
  file = tmp_path / name
  if text is not None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
  expected = message.format(file=file)
  output = f"base_output_directory={tmp_path / 'out'}"
  assert refuse([str(file), "run_name=x", output], monkeypatch, capsys).startswith(expected)
  assert not (tmp_path / "out").exists()


def test_a_data_file_before_the_model(tmp_path, monkeypatch, capsys):
  data, model = (str(runs.ROOT / "yaml" / name) for name in ("data/synthetic.yml", "mudd_405m.yml"))
  found = refuse([data, model, "run_name=x"], monkeypatch, capsys)
  assert found.startswith(f"{model} builds on transformer_pp_405m.yml, so it is a model")
  found = refuse(["steps=2", data], monkeypatch, capsys)
  assert found == f"{data} comes after steps=2; name the model's file before all else."


def test_files_that_override_a_model():
  """What a later file sets itself goes before an earlier one, and key=value before both."""
  pile, synthetic = (str(runs.ROOT / "yaml" / "data" / f"{name}.yml") for name in ("pile", "synthetic"))
  argv = ["", runs.RUN_YML, pile, synthetic, "run_name=x", "mmap_eod_id=7"]
  cfg = pyconfig.initialize_pydantic(argv)
  assert (cfg.dataset_type.value, cfg.grain_file_type, cfg.mmap_eod_id) == ("synthetic", "mmap", 7)
  assert (cfg.mudd, cfg.base_emb_dim) == (True, 32)  # the model's
  text = str(runs.ROOT / "yaml" / "data" / "local_text.yml")
  cfg = pyconfig.initialize_pydantic(["", runs.RUN_YML, text, "run_name=x", "hf_train_files=a.txt"])
  assert (cfg.dataset_type.value, cfg.hf_path, cfg.hf_train_files, cfg.packing) == ("grain", "text", "a.txt", True)


def test_a_pair_without_its_index(tmp_path, monkeypatch, capsys):
  (tmp_path / "pair.bin").write_bytes(b"1")
  overrides = ["grain_file_type=mmap", f"grain_train_files={tmp_path / 'pair'}", f"base_output_directory={tmp_path}"]
  expected = (
    f"grain_train_files={tmp_path}/pair: {tmp_path}/pair.idx is missing; a .bin file is read with its .idx file."
  )
  assert refuse([runs.RUN_YML, "run_name=x", *overrides], monkeypatch, capsys) == expected


def test_no_arguments(monkeypatch, capsys):
  assert refuse([], monkeypatch, capsys).startswith("name a configuration file first, as in:")


def test_stock_paths_of_configuration_files_still_work():
  pyconfig.initialize(["", "src/maxtext/configs/base.yml", "run_name=x", "log_config=false"])


def test_status_of_the_process(tmp_path):
  finished = subprocess.run(
    runs.command(runs.LAUNCHER, runs.RUN_YML, tmp_path / "out", "x", "mudd_way=4"),
    cwd=runs.ROOT,
    env=runs.environment(),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 2
  assert "Traceback" not in finished.stderr
  assert finished.stderr.splitlines()[-1] == (
    "maxtext-mudd: mudd_way is not a configuration key; the nearest is mudd_ways."
  )
  assert not (tmp_path / "out").exists()


def test_as_a_library_the_same_sentence_is_raised():
  with pytest.raises(ConfigError) as error:
    models.config(mudd=True, depth_connection="hyper_connections", enable_dropout=True, dropout_rate=0.1)
  assert str(error.value).startswith("dropout_rate=0.1 does not work with depth_connection=hyper_connections")
