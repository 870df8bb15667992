"""The comparison of `make vit`: its table by hand, and where its data come from."""

import subprocess
import sys

import pytest
import scipy.stats

from maxtext_mudd.vit import config as vit_config
from tests import runs

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import vit


def records(loss, accuracy):
  return [
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 1.5},
    {"step": 2, "eval_loss": loss, "accuracy": accuracy},
  ]


def test_the_table():
  """Differences of eval loss are -0.1, -0.2 and -0.3: a mean of -0.2, and 4.303 · 0.1 / √3 = 0.2484."""
  found = {
    "plain": [records(1.0 + k, 0.5) for k in range(3)],
    "MUDD": [records(0.9 + 0.9 * k, 0.5 + 0.01 * k) for k in range(3)],
  }
  text = vit.report("digits", found, vit_config.read(["vit/mudd_vit_small.yml", *vit.DIGITS]))
  assert "| plain | 2.0000 |  | 50.00 |  |\n" in text
  assert "| MUDD | 1.8000 | -0.2000 ± 0.2484 | 51.00 | +1.00 ± 2.48 |\n" in text
  assert "| 2 | MUDD | 1.5000 | 2.7000 | 52.00 |\n" in text
  assert "6 blocks of width 64, 16 patches" in text


def test_quantiles_are_students():
  for number, quantile in vit.T_975.items():
    assert quantile == pytest.approx(scipy.stats.t.ppf(0.975, number - 1), abs=5e-4)


@pytest.mark.parametrize("has_apt", [True, False])
def test_without_debians_package_digits_take_the_place(has_apt, monkeypatch, tmp_path, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(vit, "FASHION_MNIST", ("data/none", str(tmp_path / "none")))
  monkeypatch.setattr(vit.shutil, "which", lambda name: name if has_apt else None)
  failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package dataset-fashion-mnist\n")
  monkeypatch.setattr(vit.subprocess, "run", lambda *_, **__: failed)
  assert vit.fetch() == "digits"
  assert ("Unable to locate package" if has_apt else "no Debian system") in capsys.readouterr().out


def test_both_models_of_a_seed_train_alike():
  """All keys but those of connections are the same."""
  plain, mudd = (vit_config.values(vit_config.read([vit.MODELS[name]])) for name in ("plain", "MUDD"))
  assert {key for key in plain if plain[key] != mudd[key]} <= {key for key in plain if key.startswith("mudd")}
