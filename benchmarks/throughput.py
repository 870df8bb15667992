"""Measures training speed with MUDD connections and without, in turn in one run, on the devices of this machine.

    .venv/bin/python benchmarks/throughput.py --config yaml/mudd_tiny.yml --variants 2x2,trimmed per_device_batch_size=4

All models train on the same synthetic batch. Each variant is measured together with the baseline, so that at most two
models are on the device at a time. The tool writes NAME.md, NAME.json and NAME.png to benchmarks/results/.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import pathlib
import sys
import time
import traceback

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # share of a GPU's memory; JAX's default is 0.75

import chips
import paired
import record
import table_4

from maxtext_mudd import plugin
from maxtext_mudd.config import versions
from maxtext_mudd.config.errors import ConfigError

COLUMNS = ["model", "step, ms", "tokens/s/device", "TFLOP/s", "MFU", "arguments GB", "temporaries GB", "peak GB"]
COLUMNS += ["compile, s", "speed ratio", "quartiles", "extremes", "rounds"]
NOTES = """
The two models of each pair of rows were measured in turn, {steps} step(s) of each in a round. Every other round the
order was reversed. {warmup} step(s) of each model ran before the first round and are not counted. Speed ratio: tokens/s
of the second model over that of the first in each round, as the median over rounds with quartiles and extremes. Step:
time of a step, as the median over rounds. Tokens/s, TFLOP/s and MFU follow from it. TFLOP/s counts the operations that
the model needs, by MaxText's formula, with connections and without rematerialisation. MFU is the share of the device's
dense bfloat16 peak; n/a if the peak is unknown or the model computes in another dtype. Arguments (state and batch) and
temporaries are those of one device, as the compiler states them. Peak: the most memory that this process had held on
the device until then, as the device reports it, so it never falls from one pair to the next; n/a if the device reports
none. Compile: time to trace and compile, without a cache.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True, help="a model with connections")
  parser.add_argument("--baseline", help="a plain model; default: the one that --config builds on")
  parser.add_argument("--variants", default="", help="some of xla,pallas,scanned,unscanned,2x2,trimmed")
  parser.add_argument("--rounds", type=int, default=10, help="rounds of each pair; default: %(default)s")
  parser.add_argument("--steps", type=int, default=5, help="steps of each model in a round; default: %(default)s")
  parser.add_argument("--warmup", type=int, default=3, help="steps before those that count; default: %(default)s")
  parser.add_argument(
    "--time-limit",
    type=float,
    default=540,
    help="seconds for everything (default: %(default)s); later rounds and pairs are left out",
  )
  parser.add_argument("--output", help="name of the results; default: date, model and device")
  parser.add_argument("--note", help="a sentence to keep with the results")
  parser.add_argument("overrides", nargs="*", metavar="key=value", help="MaxText's keys, for all models")
  return parser.parse_intermixed_args(arguments)


def check_options(options) -> None:
  """Checks the options. Raises ConfigError for one that cannot work."""
  for name, least in (("rounds", paired.MIN_ROUNDS), ("steps", 1), ("warmup", 1)):
    if getattr(options, name) < least:
      raise ConfigError(f"--{name} is {getattr(options, name)}; at least {least} is needed.")
  if not options.time_limit > 0:
    raise ConfigError(f"--time-limit is {options.time_limit:g}; seconds above 0 are needed.")


# ---------------------------------------------------------------- measuring


class Comparison:
  """Measures models against their baseline. The baseline stays on the device while models share it.

  Attributes:
    options: the command's options.
    stock_yaml: configuration file of the baseline.
    yaml: configuration file of the model with connections.
    device: the first device.
    stock: the train step of the present baseline; None: there is none.
    batch: the batch of all steps.
  """

  def __init__(self, options, names: tuple[str, str]):
    import jax

    self.options, self.stock_yaml, self.yaml = options, *names
    self.device = jax.devices()[0]
    self.stock = self.batch = None

  def configurations(self, keys: dict):
    """The configurations of the baseline and of the other model, with the keys of a variant."""
    import compared_models

    overrides = self.options.overrides
    config = compared_models.read(self.yaml, overrides, keys)
    stock = compared_models.read_stock(self.stock_yaml, overrides, keys)
    compared_models.check_pair(stock, config, (self.stock_yaml, self.yaml), derived=not self.options.baseline)
    return stock, config

  def measure(self, name: str, keys: dict, deadline: float) -> dict:
    """Measures one variant against the baseline; returns a row of the results.

    Args:
      name: name of the variant, for tables and messages.
      keys: keys of the variant.
      deadline: when the last round should end.

    Raises:
      ConfigError: one of the two models cannot work, or does not fit the device.
    """
    import compared_models
    import train_steps

    stock_config, config = self.configurations(keys)
    limit = chips.memory_bytes(self.device)
    train_steps.set_up(config)
    if self.stock is None or self.stock.config.get_keys() != stock_config.get_keys():
      self.free()
      shared = [f"{key}={value}" for key, value in compared_models.stock_keys(keys).items()]
      stock = self.compile(" ".join([_stem(self.stock_yaml), *shared]), stock_config)
      train_steps.check_fit(stock, 0, limit)
      stock.load()
      self.stock = stock
      self.batch = train_steps.make_batch(stock_config)
    model = self.compile(name, config)
    train_steps.check_fit(model, self.stock.argument_bytes, limit)
    try:
      model.load()
      steps = self.options.steps
      for step in (self.stock, model):
        step.run(self.batch, self.options.warmup)
      record.say(f"{name}: rounds of {steps} step(s)")
      seconds = paired.alternate(
        lambda: self.stock.run(self.batch, steps), lambda: model.run(self.batch, steps), self.options.rounds, deadline
      )
      ratios = paired.speed_ratios(seconds)
      return {
        "model": name,
        "refused": None,
        "differs_from_stock": compared_models.different_keys(stock_config, config),
        "steps_per_round": steps,
        "stock": measured(self.stock, [x for x, _ in seconds], self.device),
        "mudd": measured(model, [x for _, x in seconds], self.device),
        "device_peak_bytes": chips.peak_bytes(self.device),
        "ratio": {"by_round": ratios, **dataclasses.asdict(paired.Spread.of(ratios))},
      }
    except ConfigError:
      self.free()  # a step that fails has consumed its state
      raise
    finally:
      model.free()

  def compile(self, name: str, config):
    """Compiles the train step of a model."""
    import train_steps

    record.say(f"{name}: compiling")
    step = train_steps.TrainStep(name, config)
    record.say(f"{name}: compiled in {step.compile_seconds:.0f} s")
    return step

  def free(self) -> None:
    """Frees the memory of the baseline."""
    if self.stock is not None:
      self.stock.free()
    self.stock = None


def measured(step, seconds: list[float], device) -> dict:
  """The figures of one model, from its seconds per step in each round."""
  from maxtext.utils import maxtext_utils

  spread = paired.Spread.of(seconds)
  tokens = maxtext_utils.calculate_tokens_training_per_device(step.config)
  tflops, *_ = maxtext_utils.calculate_tflops_training_per_device(step.config, log=False)
  peak = chips.peak_tflops(device.device_kind, step.config.dtype.name)
  return {
    "name": step.name,
    "step_seconds_by_round": seconds,
    "step_seconds": spread.median,
    "tokens_per_step": tokens,
    "tokens_per_second": tokens / spread.median,
    "tflops_per_step": tflops,
    "tflops_per_second": tflops / spread.median,
    "mfu": tflops / spread.median / peak if peak else None,
    "argument_bytes": step.argument_bytes,
    "temporary_bytes": step.temporary_bytes,
    "compile_seconds": step.compile_seconds,
    "last_loss": step.loss(),
  }


def measure_all(options, variants: dict[str, dict]) -> list[dict]:
  """Measures the configuration and each variant; returns a row for each.

  The row of a variant that could not be measured has the reason in it.

  Args:
    variants: keys of each variant, by name.

  Raises:
    ConfigError: the configuration itself or its baseline cannot work here.
  """
  import compared_models

  start = time.monotonic()
  comparison = Comparison(options, (options.baseline or compared_models.plain_model(options.config), options.config))
  record.say(f"baseline: {comparison.stock_yaml}")
  # Variants with the same baseline follow each other, so that it is compiled once.
  by_baseline = sorted(variants.items(), key=lambda item: sorted(compared_models.stock_keys(item[1]).items()))
  rows, pending = [], {"": {}} | dict(by_baseline)
  try:
    for i, (variant, keys) in enumerate(pending.items()):
      name = f"{_stem(options.config)} {variant}".strip()
      now, end = time.monotonic(), start + options.time_limit
      try:
        if now > end:
          raise ConfigError(f"it is left out: --time-limit {options.time_limit:g} s has been reached.")
        rows.append(comparison.measure(name, keys, deadline=now + (end - now) / (len(pending) - i)))
      except Exception as error:
        if not variant:
          raise
        if not isinstance(error, ConfigError):  # go on, to keep what has been measured
          traceback.print_exc()
          comparison.free()
        record.say(f"{name}: {error}")
        rows.append({"model": name, "refused": _reason(error)})
  finally:
    comparison.free()
  return rows


# ---------------------------------------------------------------- results


def cells(row: dict) -> list[list[str]]:
  """The lines of a pair in the table."""
  if row["refused"]:
    return [[row["model"], "not measured", *["-"] * (len(COLUMNS) - 2)]]
  ratio = row["ratio"]
  spread = [
    f"{100 * ratio['median']:.1f}%",
    f"{100 * ratio['lower_quartile']:.1f}..{100 * ratio['upper_quartile']:.1f}",
    f"{100 * ratio['min']:.1f}..{100 * ratio['max']:.1f}",
    str(len(ratio["by_round"])),
  ]
  peak = record.gigabytes(row["device_peak_bytes"])
  return [
    [*_figures(row["stock"]), "", _compile_seconds(row["stock"]), "", "", "", ""],
    [*_figures(row["mudd"]), peak, _compile_seconds(row["mudd"]), *spread],
  ]


def _figures(model: dict) -> list[str]:
  return [
    model["name"],
    f"{1000 * model['step_seconds']:.1f}",
    f"{model['tokens_per_second']:,.0f}",
    f"{model['tflops_per_second']:.3g}",
    f"{100 * model['mfu']:.1f}%" if model["mfu"] else "n/a",
    record.gigabytes(model["argument_bytes"]),
    record.gigabytes(model["temporary_bytes"]),
  ]


def _compile_seconds(model: dict) -> str:
  return f"{model['compile_seconds']:.1f}"


def text(rows: list[dict], options, device: str) -> str:
  """The body of the .md file."""
  lines = record.table(COLUMNS, [line for row in rows for line in cells(row)])
  refused = "".join(f"- {row['model']}: {row['refused']}\n" for row in rows if row["refused"])
  return (
    record.caution(device) + lines + (f"\nNot measured:\n{refused}" if refused else "") + NOTES.format(**vars(options))
  )


def _reason(error: Exception) -> str:
  """Why a variant could not be measured."""
  if isinstance(error, ConfigError):
    return str(error)
  return f"it failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _stem(name: str) -> str:
  return pathlib.Path(name).stem


def run(options) -> None:
  """Measures, and writes the results.

  Raises:
    ConfigError: an option or a configuration cannot work.
  """
  check_options(options)
  with contextlib.redirect_stdout(sys.stderr):  # MaxText prints to stdout, which is for results
    plugin.install()
    import compared_models
    import jax

    variants = {x: compared_models.variant_keys(x) for x in options.variants.split(",") if x}
    device = chips.describe(jax.devices())
    about = record.facts(device, label="device", packages=("jax", "jaxlib", "maxtext"))
    if options.note:
      about["note"] = options.note
    rows = measure_all(options, variants)
    about["baseline"] = options.baseline or compared_models.plain_model(options.config)
  body = text(rows, options, device)
  print(body)
  place = record.write(options.output or record.default_name("throughput", options.config, device), about, body, rows)
  table_4.draw([about | {"rows": rows}], place.with_name(place.name + ".png"))
  record.say(f"written: {place}.md, .json and .png")


def main(arguments: list[str]) -> int:
  try:
    run(parse(arguments))
  except (ConfigError, versions.UnknownMaxText) as error:
    print(f"throughput: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  logging.disable(logging.WARNING)  # MaxText's logs
  sys.exit(main(sys.argv[1:]))
