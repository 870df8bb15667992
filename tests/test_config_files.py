"""Where configuration files are looked up: a user's, MaxText's, and those of this package from any folder."""

import pathlib

from maxtext.configs import pyconfig
import pytest

from maxtext_mudd import assets
from maxtext_mudd.config import files as config_files
from maxtext_mudd.config.errors import ConfigError

TINY = """
mudd: true
mudd_ffn_reallocation: true
scan_layers: false
decoder_block: llama2
base_num_decoder_layers: 4
base_emb_dim: 32
base_num_query_heads: 2
base_num_kv_heads: 2
head_dim: 16
base_mlp_dim: 256
log_config: false
skip_jax_distributed_system: true
"""


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
  """The working folder; it holds nothing."""
  folder = tmp_path / "empty"
  folder.mkdir()
  monkeypatch.chdir(folder)
  return folder


def read(*arguments) -> dict:
  """Values of all keys, but for the name of the file, and for flags that MaxText sets once for a process."""
  config = pyconfig.initialize_pydantic(["", *arguments, "run_name=x", "base_output_directory=out"])
  return {key: x for key, x in config.model_dump().items() if key not in ("base_config", "dump_hlo_xla_flags")}


def test_a_model_on_a_file_of_the_package(empty_folder):
  model = empty_folder / "my.yml"
  model.write_text(f"base_config: mudd_base.yml\n{TINY}")
  values = read("my.yml")
  assert (values["mudd"], values["num_decoder_layers"], values["emb_dim"]) == (True, 4, 32)
  model.write_text(f"base_config: {assets.CONFIGURATIONS / 'mudd_base.yml'}\n{TINY}")
  assert values == read("my.yml")
  assert list(empty_folder.iterdir()) == [model]


def test_no_folder_for_the_copy_of_a_model(empty_folder, monkeypatch):
  (empty_folder / "my.yml").write_text(f"base_config: mudd_base.yml\n{TINY}")
  monkeypatch.setattr("tempfile.tempdir", str(empty_folder / "nowhere"))
  with pytest.raises(ConfigError) as error:
    read("my.yml")
  assert str(error.value) == (
    "my.yml is copied to a folder for temporary files, and none can be written; set the environment variable TMPDIR to "
    "one that can."
  )


def test_a_chain_of_several_files(empty_folder):
  (empty_folder / "shape.yml").write_text(f"base_config: yaml/data/synthetic.yml\n{TINY}")
  (empty_folder / "my.yml").write_text("base_config: shape.yml\nmudd_window: 2\nlearning_rate: 1.e-6\n")
  values = read("my.yml", "mudd_ways=1")
  assert (values["mudd_window"], values["mudd_ways"], values["learning_rate"]) == (2, 1, 1e-6)
  assert (values["dataset_type"].value, values["base_num_decoder_layers"]) == ("synthetic", 4)


def test_values_of_a_chain_stay_values_of_files(empty_folder, monkeypatch):
  """`model_name` goes before files, and so do variables of the environment; before overrides neither may."""
  named = "\nmodel_name: llama2-7b\noverride_model_config: false\n"
  for base in ("mudd_base.yml", assets.CONFIGURATIONS / "mudd_base.yml"):
    (empty_folder / "my.yml").write_text(f"base_config: {base}\n{TINY}{named}")
    (empty_folder / "models").mkdir(exist_ok=True)
    (empty_folder / "models" / "llama2-7b.yml").write_text("base_num_decoder_layers: 6\n")
    monkeypatch.setenv("M_MUDD_WINDOW", "3")
    values = read("my.yml")
    assert (values["num_decoder_layers"], values["mudd_window"]) == (6, 3)


@pytest.mark.parametrize("name", ["mudd_2p8b.yml", "yaml/mudd_2p8b.yml"])
def test_a_model_of_the_package_by_its_name(name, empty_folder):
  values = read(name)
  assert values == read(str(assets.CONFIGURATIONS / "mudd_2p8b.yml"))
  assert (values["mudd"], values["emb_dim"]) == (True, 2560)


@pytest.mark.parametrize("folder", ["", "yaml/"])
def test_further_files_of_the_package(folder, empty_folder):
  values = read("mudd_405m.yml", f"{folder}data/synthetic.yml")
  assert values["dataset_type"].value == "synthetic"


def test_a_users_file_goes_before_the_packages(empty_folder):
  (empty_folder / "mudd_tiny.yml").write_text("base_config: base.yml\nlog_config: false\n")
  assert config_files.find("mudd_tiny.yml") == pathlib.Path("mudd_tiny.yml")
  (empty_folder / "mudd_base.yml").write_text("base_config: base.yml\nmudd_window: 5\n")
  (empty_folder / "my.yml").write_text("base_config: mudd_base.yml\n")
  assert config_files.chain("my.yml") == [empty_folder / "my.yml", empty_folder / "mudd_base.yml"]


@pytest.mark.parametrize("name", ["../mudd_2p8b.yml", "/mudd_2p8b.yml", "yaml/../yaml/mudd_2p8b.yml", "mudd_2p8.yml"])
def test_names_that_are_not_of_the_package(name, empty_folder):
  with pytest.raises(ConfigError, match=r"no such configuration file; the nearest of this package is mudd_2p8b\.yml"):
    config_files.find(name)


def test_names_that_the_system_does_not_take(empty_folder):
  name = "m" * 300 + ".yml"
  with pytest.raises(ConfigError, match=f"^{name}: no such configuration file"):
    config_files.find(name)
  (empty_folder / "my.yml").write_text(f"base_config: {name}\n")
  with pytest.raises(ConfigError, match=f"^my.yml: base_config={name}: no such configuration file beside it"):
    config_files.chain("my.yml")


def test_every_file_of_the_package_is_found(empty_folder):
  names = config_files.packaged()
  assert {"mudd_tiny.yml", "data/pile.yml", "ablation/static.yml"} <= set(names)
  assert all(config_files.chain(name) for name in names)
