"""Configurations of image classifiers: the packaged files, and mistakes, each refused in one sentence before JAX."""

import pathlib
import subprocess
import sys

import pytest

from maxtext_mudd import connections
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.vit import config as vit_config
from maxtext_mudd.vit import train
from tests import runs, vit_models

NAMES = sorted(f"vit/{path.name}" for path in (runs.ROOT / "yaml" / "vit").glob("*.yml"))

MISTAKES = [
  ({"image_size": 10}, "image_size=10 is not a multiple of patch=4; use image_size=8, or another patch."),
  ({"heads": 3}, "heads=3 does not divide width=16; use a divisor of it."),
  (
    {"width": 18, "heads": 2},
    "width=18 is not a multiple of 4, as sines and cosines of two coordinates need; use 16.",
  ),
  ({"warmup_steps": 6}, "warmup_steps=6 leaves nothing of steps=6; use fewer warmup_steps."),
  ({"widht": 8}, "widht is not a configuration key; the nearest is width."),
  ({"depth": 0}, "depth=0 is not valid: input should be greater than or equal to 1."),
  (
    {"mudd": True, "depth_connection": "resnet"},
    "depth_connection='resnet' is not valid: there is no such family of depth connections; use {families} "
    "(MUDD, DenseFormer and DDFormer are dense).",
  ),
  (
    {"depth_connection": "mhc"},
    "depth_connection=mhc does nothing with mudd=False; leave it at dense, or set mudd=True.",
  ),
  ({"crop": "inception"}, "crop=inception is for photos, and dataset=digits has none; use crop=pad or crop=none."),
  ({"randaugment_level": 5}, "randaugment_level=5 needs channels=3; set randaugment_level=0."),
  (
    {"mudd": True, "mudd_extra_embeddings": 2},
    "mudd_extra_embeddings=2 needs tokens, and images have none; leave it at 0.",
  ),
  (
    {"mudd": True, "mudd_mtp": "connected"},
    "mudd_mtp=connected needs tokens to predict, and images have none; leave it at head.",
  ),
  (
    {**vit_models.NORMS, "mudd_static": False, "aggregate_coefficient": True},
    "aggregate_coefficient=True does nothing with mudd_post_norm=True; leave it at False, or set mudd_post_norm=False.",
  ),
  ({"run_name": "a/b"}, "run_name='a/b' is not valid: it is the name of a folder in output; write it without /."),
  (
    {"mudd": True, "depth_connection": "attnres", "mudd_attnres_heads": 3},
    "mudd_attnres_heads=3 does not divide emb_dim=16; use a divisor of it.",
  ),
]


@pytest.mark.parametrize(("keys", "sentence"), MISTAKES)
def test_mistakes_are_refused_in_one_sentence(keys, sentence):
  with pytest.raises(ConfigError) as error:
    vit_models.config(**keys)
  assert str(error.value) == sentence.format(families=", ".join(connections.FAMILIES))  # other tests add some


@pytest.mark.parametrize("name", NAMES)
def test_packaged_files(name):
  read = vit_config.read([name, "run_name=x", "steps=20000"])
  assert (read.run_name, read.steps) == ("x", 20000)
  assert vit_config.values(vit_config.build(vit_config.values(read))) == vit_config.values(read)
  assert read.mudd == ("mudd" in name)


def test_the_recipe_is_the_papers():
  """App. F."""
  recipe = {
    "learning_rate": 0.003,
    "adam_b1": 0.9,
    "adam_b2": 0.999,
    "weight_decay": 0.3,
    "gradient_clip": 1.0,
    "warmup_steps": 10000,
    "batch_size": 4096,
    "randaugment_level": 10,
    "mixup": 0.2,
    "dropout": 0.1,
  }
  for name in (x for x in NAMES if "i1k" in x):
    read = vit_config.read([name])
    assert {key: getattr(read, key) for key in recipe} == recipe
    assert round(vit_config.epochs(read, 1_281_167)) == 300
    assert round(vit_config.epochs(vit_config.read([name, "steps=28150"]), 1_281_167)) == 90


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ([], "no argument: name a configuration first, such as vit/mudd_vit_s16_i1k.yml, and then key=value."),
    (
      ["vit/vit_s15_i1k.yml"],
      "vit/vit_s15_i1k.yml: no such configuration file; the nearest of this package is vit/vit_s16_i1k.yml.",
    ),
    (["vit/vit_small.yml", "--steps=3"], "--steps=3 is not key=value; write it like steps=1000."),
    (["vit/vit_small.yml", "stepz=3"], "stepz is not a configuration key; the nearest is steps."),
    (["vit/vit_small.yml"], "run_name is not set; give the run a name: run_name=first."),
  ],
)
def test_command_lines(arguments, sentence, capsys):
  assert train.main(arguments) == 2
  assert capsys.readouterr().err == f"maxtext-mudd: {sentence}\n"


def test_help_lists_every_key(capsys):
  assert train.main(["--help"]) == 0
  text = capsys.readouterr().out
  assert all(f"  {name}=" in text for name in vit_config.VitConfig.model_fields if not name.startswith("mudd_"))


def test_files_build_on_files_beside_them(tmp_path):
  (tmp_path / "a.yml").write_text("base_config: b.yml\nseed: 5\n")
  (tmp_path / "b.yml").write_text("base_config: vit/vit_small.yml\nseed: 4\nmlp_dim: 96\n")
  read = vit_config.read([str(tmp_path / "a.yml")])
  assert (read.seed, read.mlp_dim, read.image_size) == (5, 96, 28)
  (tmp_path / "b.yml").write_text("base_config: a.yml\n")
  with pytest.raises(ConfigError, match="leads back to itself"):
    vit_config.read([str(tmp_path / "a.yml")])


def test_mistakes_are_found_without_jax():
  code = (
    "import sys; from maxtext_mudd.vit import train; status = train.main(['vit/vit_small.yml', 'patch=5']); "
    "print(status, 'jax' in sys.modules, 'maxtext' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=runs.ROOT)
  assert done.stdout == "2 False False\n"
  assert (
    done.stderr == "maxtext-mudd: image_size=28 is not a multiple of patch=5; use image_size=25, or another patch.\n"
  )


def test_no_file_of_maxtext_is_an_image_classifier():
  from maxtext_mudd.config import files

  assert not [name for name in files.packaged() if pathlib.PurePath(name).parts[0] == "vit"]
