"""Shows where the time of a train step on one CPU core goes, for a plain model and MUDD.

    taskset -c 0 .venv/bin/python benchmarks/cpu_profile.py yaml/study/narrow.yml [KEY=VALUE ...]

JAX's profiler records the time of each operation of the compiled step. Operations are summed by kind. The steps that
are traced are others than those that are timed, so the sum of kinds differs from the time of a step.
"""

import argparse
import collections
import pathlib
import re
import sys
import tempfile

import record

from maxtext_mudd.config.errors import ConfigError

STEPS = 4
# By kind, what the names of its operations contain; an operation is of the first kind that fits.
KINDS = {
  "matrix products": re.compile("dot|gemm|ynn"),
  "copies and transposes": re.compile("copy|transpose"),
  "element-wise operations and sums": re.compile(""),
}
# Events that contain others, or that are no operations (`SlinkyThreadPool::Await` is a wait inside a matrix product).
NO_OPERATIONS = re.compile("ThunkExecutor|^while|^call|^conditional|^end: |Client|Listener|ThreadPool::")


def operations(folder: pathlib.Path) -> dict[str, float]:
  """The seconds of each operation in a trace of JAX's profiler, summed over its calls."""
  from jax import profiler

  (file,) = folder.rglob("*.xplane.pb")
  seconds = collections.Counter()
  for plane in profiler.ProfileData.from_file(str(file)).planes:
    for line in plane.lines:
      if line.name.startswith("tf_XLA"):  # threads that run compiled code
        for event in line.events:
          if not NO_OPERATIONS.search(event.name):
            seconds[event.name] += event.duration_ns / 1e9
  return seconds


def by_kind(seconds: dict[str, float]) -> dict[str, float]:
  """The seconds of each kind of operation."""
  sums = dict.fromkeys(KINDS, 0.0)
  for name, time in seconds.items():
    sums[next(kind for kind, pattern in KINDS.items() if pattern.search(name))] += time
  return sums


def profile(config_file: str, keys: list[str], label: str) -> dict:
  """Traces some train steps of a model, on random tokens; returns a row of the results."""
  import jax
  from maxtext.configs import pyconfig
  from maxtext.utils import maxtext_utils
  import train_steps

  fixed = {"run_name": "profile", "dataset_type": "synthetic", "enable_checkpointing": False}
  config = pyconfig.initialize(["", config_file, *keys], **fixed)
  train_steps.set_up(config)
  step = train_steps.TrainStep(label, config)
  step.load()
  batch = train_steps.make_batch(config)
  step.run(batch, 1)
  seconds = step.run(batch, STEPS)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      step.run(batch, STEPS)
    traced = {name: time / STEPS for name, time in operations(pathlib.Path(folder)).items()}
  tflops = maxtext_utils.calculate_tflops_training_per_device(config, log=False)[0]
  step.free()
  longest = dict(sorted(traced.items(), key=lambda x: -x[1])[:20])
  return {
    "model": label,
    "compile_seconds": step.compile_seconds,
    "step_seconds": seconds,
    "gflops": 1000 * tflops,
    "kinds": by_kind(traced),
    "longest": longest,
  }


def report(rows: list[dict]) -> str:
  """A table of the rows."""
  lines = []
  for row in rows:
    total = sum(row["kinds"].values())
    shares = [f"{x:.2f} ({x / total:.0%})" for x in row["kinds"].values()]
    speed = row["gflops"] / row["step_seconds"]
    lines.append([row["model"], f"{row['step_seconds']:.2f}", f"{row['compile_seconds']:.0f}", f"{speed:.0f}", *shares])
  return record.table(["model", "step, s", "compilation, s", "GFLOP/s", *(f"{kind}, s" for kind in KINDS)], lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("config", help="configuration file")
  parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="configuration keys of both models")
  parser.add_argument("--output", help="name of the result files; default: DATE-cpu-profile-MODEL-cpu")
  options = parser.parse_args()

  from maxtext_mudd import plugin

  plugin.install()
  cpu = _cpu()
  about, rows = record.facts(cpu, "cpu", ("jax", "jaxlib", "maxtext")), []
  for label, keys in {"plain": ["mudd=false"], "MUDD": ["mudd=true"]}.items():
    record.say(f"profiling {label} on {cpu}")
    try:
      rows.append(profile(options.config, [*options.keys, *keys], label))
    except ConfigError as error:
      sys.exit(f"maxtext-mudd: {label}: {error}")
  text = report(rows)
  record.write(options.output or record.default_name("cpu-profile", options.config, "CPU"), about, text, rows)
  print(text)


def _cpu() -> str:
  import study

  machine = study.machine()
  return f"{machine['cpu']}, {machine['cores']} core(s)"


if __name__ == "__main__":
  main()
