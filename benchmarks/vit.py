"""Trains a small Vision Transformer with and without MUDD connections, three seeds each, and compares them: `make vit`.

    .venv/bin/python benchmarks/vit.py [--seeds N] [--dataset fashion_mnist|digits] [key=value ...]

Both models of a seed have the same initial values of shared parameters and read the same images in the same order.
Fashion-MNIST comes from Debian's package dataset-fashion-mnist, which is downloaded and unpacked without root; where
that is not possible, scikit-learn's digits take its place. A run that was interrupted is resumed.
"""

import argparse
import json
import math
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile

from maxtext_mudd.vit import config as vit_config
from maxtext_mudd.vit import train
from maxtext_mudd.vit.curve import draw
from maxtext_mudd.vit.data import FASHION_MNIST

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGE = "dataset-fashion-mnist"
MODELS = {"plain": "vit/vit_small.yml", "MUDD": "vit/mudd_vit_small.yml"}
DIGITS = ["dataset=digits", "image_size=8", "patch=2", "flip=false"]
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # Student's t by the number of seeds


def fetch() -> str:
  """The data set: fashion_mnist if it is there or can be downloaded, else digits."""
  if any(pathlib.Path(folder).is_dir() for folder in FASHION_MNIST):
    return "fashion_mnist"
  if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
    print("this is no Debian system, so scikit-learn's digits take the place of Fashion-MNIST")
    return "digits"
  with tempfile.TemporaryDirectory() as folder:
    done = subprocess.run(["apt-get", "download", "--quiet", PACKAGE], cwd=folder, capture_output=True, text=True)
    archives = list(pathlib.Path(folder).glob("*.deb"))
    if done.returncode or not archives:
      reason = (done.stderr.strip().splitlines() or ["apt-get gave no reason"])[-1].removeprefix("E: ")
      print(f"{PACKAGE} could not be downloaded ({reason}); scikit-learn's digits take its place")
      return "digits"
    subprocess.run(["dpkg-deb", "--extract", archives[0], f"{folder}/unpacked"], check=True)
    shutil.copytree(f"{folder}/unpacked{FASHION_MNIST[1]}", FASHION_MNIST[0], dirs_exist_ok=True)
  return "fashion_mnist"


def results(name: str, seeds: int, further: list[str]) -> dict[str, list[list[dict]]]:
  """The metrics of each run, by model and seed. Runs what was not run."""
  found = {model: [] for model in MODELS}
  variant = "".join(f"-{argument.replace('=', '').replace('/', '')}" for argument in further)
  for seed in range(seeds):
    for model, file in MODELS.items():
      run_name = f"{name}-{model.lower()}-{seed}{variant}"
      arguments = [file, *(DIGITS if name == "digits" else []), *further, f"seed={seed}", "output=runs/vit"]
      status = train.main([*arguments, f"run_name={run_name}"])
      if status:
        sys.exit(status)
      lines = pathlib.Path("runs/vit", run_name, "metrics.jsonl").read_text().splitlines()
      found[model].append([json.loads(line) for line in lines])
  return found


def last(records: list[dict], key: str) -> float:
  return [record[key] for record in records if key in record][-1]


def report(name: str, found: dict[str, list[list[dict]]], config: vit_config.VitConfig, further: str = "") -> str:
  """The table, in Markdown.

  Args:
    further: the keys that the command gave.
  """
  command = f"make vit ARGS={shlex.quote(further)}" if further else "make vit"
  columns = {"eval loss": ("eval_loss", 1, 4), "accuracy, %": ("accuracy", 100, 2)}
  lines = [
    f"# A small ViT on {name}, with and without MUDD connections",
    "",
    f"{config.depth} blocks of width {config.width}, {config.tokens} patches, {config.steps} steps of "
    f"{config.batch_size} images; `{command}`. Differences are to the plain model with the same seed, which has the "
    "same initial values and reads the same images in the same order; with 95 % intervals.",
    "",
    f"| model | {' | '.join(f'{x} | difference' for x in columns)} |",
    "|---|" + "---|" * (2 * len(columns)),
  ]
  for model, by_seed in found.items():
    cells = []
    for key, factor, digits in columns.values():
      values = [factor * last(x, key) for x in by_seed]
      pairs = [a - factor * last(x, key) for a, x in zip(values, found["plain"])]
      spread = T_975[len(pairs)] * statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) in T_975 else math.nan
      change = "" if model == "plain" else f"{statistics.mean(pairs):+.{digits}f} ± {spread:.{digits}f}"
      cells += [f"{statistics.mean(values):.{digits}f}", change]
    lines.append(f"| {model} | {' | '.join(cells)} |")
  lines += ["", "By seed:", "", "| seed | model | train loss | eval loss | accuracy, % |", "|---|---|---|---|---|"]
  for seed in range(len(found["plain"])):
    for model, by_seed in found.items():
      loss, of_eval, accuracy = (last(by_seed[seed], key) for key in ("loss", "eval_loss", "accuracy"))
      lines.append(f"| {seed} | {model} | {loss:.4f} | {of_eval:.4f} | {100 * accuracy:.2f} |")
  return "\n".join([*lines, "", f"![curves](vit-{name}.png)", ""])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--dataset", choices=("fashion_mnist", "digits"))
  parser.add_argument("keys", nargs="*", help="key=value, for all runs")
  given = parser.parse_args()
  name = given.dataset or fetch()
  found = results(name, given.seeds, given.keys)
  config = vit_config.read([MODELS["MUDD"], *(DIGITS if name == "digits" else []), *given.keys])
  text = report(name, found, config, " ".join(given.keys))
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / f"vit-{name}.md").write_text(text)
  (RESULTS / f"vit-{name}.json").write_text(json.dumps({"config": vit_config.values(config), "runs": found}) + "\n")
  draw({f"{model}, seed 0": by_seed[0] for model, by_seed in found.items()}, RESULTS / f"vit-{name}.png")
  print(text)


if __name__ == "__main__":
  main()
