"""Training runs in processes of their own, on a corpus of a few files."""

import os
import pathlib
import subprocess
import sys

from maxtext_mudd import corpus, report

ROOT = pathlib.Path(__file__).parents[1]
RUN_YML = str(ROOT / "tests" / "run.yml")
LAUNCHER = ("MaxText/train.py",)
STOCK = ("-m", "maxtext.trainers.pre_train.train")


def build_corpus(folder: pathlib.Path) -> list[str]:
  """A small corpus in `folder`, cut from this project's own sources; the overrides that name it."""
  library = folder / "library"
  for i in range(40):  # enough that both splits get some
    library.mkdir(exist_ok=True)
    source = (ROOT / "maxtext_mudd" / "config" / "devices.py").read_text()
    (library / f"module_{i}.py").write_text(f"NUMBER = {i}\n{source}")
  corpus.build(library, folder / "corpus")
  return [f"grain_{split}_files={folder / 'corpus' / split}.parquet" for split in ("train", "eval")]


def environment(**changes: str) -> dict[str, str]:
  return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | changes


def command(entry: tuple[str, ...], config: str, output: pathlib.Path, run_name: str, *overrides: str) -> list[str]:
  fixed = [f"base_output_directory={output}", f"run_name={run_name}", f"jax_cache_dir={ROOT / '.cache' / 'jax'}"]
  return [sys.executable, *entry, config, *fixed, *overrides]


def train(entry, config, output, run_name, *overrides, **env) -> dict[int, float]:
  """Trains to the end; the loss of every step, as float32."""
  finished = subprocess.run(
    command(entry, config, output, run_name, *overrides),
    cwd=ROOT,
    env=environment(**env),
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr[-4000:]
  return losses(output / run_name)


def losses(folder: pathlib.Path) -> dict[int, float]:
  """Loss by step, from the TensorBoard events of a run."""
  return dict(sorted(report.read_scalars(folder)[report.TRAIN_LOSS].items()))
