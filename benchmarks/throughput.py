"""Training speed with MUDD connections and without, measured in turn in one run, on whatever devices are here.

    python benchmarks/throughput.py --config yaml/mudd_tiny.yml --variants 2x2,trimmed per_device_batch_size=4

Both models train on the same synthetic batch. Each variant is paired with the baseline anew; two models at most are on
the device at a time. Writes NAME.md, NAME.json and NAME.png to benchmarks/results/.
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

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of a GPU; JAX takes three quarters by itself

import chips
import paired
import record
import table_4

from maxtext_mudd import plugin, versions
from maxtext_mudd.config.errors import ConfigError

COLUMNS = ["model", "step, ms", "tokens/s/device", "TFLOP/s", "MFU", "arguments GB", "temporaries GB", "peak GB"]
COLUMNS += ["compile, s", "speed ratio", "quartiles", "extremes", "rounds"]
NOTES = """
Each pair of rows was measured in turn, {steps} step(s) at a time, the order reversed every other round, after {warmup}
step(s) of each that do not count. Speed ratio: tokens/s of the second over the first, by round; the median over rounds,
its quartiles and extremes. Step: the median over rounds; tokens/s, TFLOP/s and MFU follow from it. TFLOP/s counts what
the model needs, as MaxText does, with the connections; nothing that is computed again. MFU is of the device's dense
bfloat16 peak, n/a where that is unknown or the model computes in another type. Arguments (state and batch) and
temporaries of one device are the compiler's account. Peak is the device's own, of this process until then: with both
models held, and never falling from one pair to the next; n/a where it gives none. Compile: tracing and compiling,
nothing cached.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True, help="a model with connections")
  parser.add_argument("--baseline", help="a plain model; by default the one that --config builds on")
  parser.add_argument("--variants", default="", help="some of xla,pallas,scanned,unscanned,2x2,trimmed")
  parser.add_argument("--rounds", type=int, default=10, help="of each pair; default: %(default)s")
  parser.add_argument("--steps", type=int, default=5, help="of each model in a round; default: %(default)s")
  parser.add_argument("--warmup", type=int, default=3, help="steps that do not count; default: %(default)s")
  parser.add_argument(
    "--time-limit",
    type=float,
    default=540,
    help="seconds for all: fewer rounds, and no pair begun after it; no compilation is cut short; default: %(default)s",
  )
  parser.add_argument("--output", help="name of the results; by default made of date, model and device")
  parser.add_argument("--note", help="a sentence to keep with the results")
  parser.add_argument("overrides", nargs="*", metavar="key=value", help="MaxText's, for all models alike")
  return parser.parse_intermixed_args(arguments)


def check_options(options) -> None:
  """Raises ConfigError for an option that cannot work."""
  for name, least in (("rounds", paired.MIN_ROUNDS), ("steps", 1), ("warmup", 1)):
    if getattr(options, name) < least:
      raise ConfigError(f"--{name} is {getattr(options, name)}; at least {least} is needed.")
  if not options.time_limit > 0:
    raise ConfigError(f"--time-limit is {options.time_limit:g}; seconds above 0 are needed.")


# ---------------------------------------------------------------- measuring


class Comparison:
  """One run of this tool: a baseline, kept while pairs share it, and one model beside it at a time."""

  def __init__(self, options, names: tuple[str, str]):
    import jax

    self.options, self.stock_yaml, self.yaml = options, *names
    self.device = jax.devices()[0]
    self.stock = self.batch = None

  def configurations(self, keys: dict):
    """(stock, the other) with the keys of a variant."""
    import contenders

    overrides = self.options.overrides
    config = contenders.read(self.yaml, overrides, keys)
    stock = contenders.read_stock(self.stock_yaml, overrides, keys)
    contenders.check_pair(stock, config, (self.stock_yaml, self.yaml), derived=not self.options.baseline)
    return stock, config

  def measure(self, name: str, keys: dict, deadline: float) -> dict:
    """One row of the results, with the keys of a variant.

    Raises:
      ConfigError: one of the two cannot work, or does not fit the device.
    """
    import contenders
    import train_steps

    stock_config, config = self.configurations(keys)
    limit = chips.memory_bytes(self.device)
    train_steps.set_up(config)
    if self.stock is None or self.stock.config.get_keys() != stock_config.get_keys():
      self.free()
      shared = [f"{key}={value}" for key, value in contenders.of_stock(keys).items()]
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
        "differs_from_stock": contenders.different_keys(stock_config, config),
        "steps_per_round": steps,
        "stock": measured(self.stock, [x for x, _ in seconds], self.device),
        "mudd": measured(model, [x for _, x in seconds], self.device),
        "device_peak_bytes": chips.peak_bytes(self.device),
        "ratio": {"by_round": ratios, **dataclasses.asdict(paired.Spread.of(ratios))},
      }
    except ConfigError:
      self.free()  # a step that failed has taken its state
      raise
    finally:
      model.free()

  def compile(self, name: str, config):
    import train_steps

    record.say(f"{name}: compiling")
    step = train_steps.TrainStep(name, config)
    record.say(f"{name}: compiled in {step.compile_seconds:.0f} s")
    return step

  def free(self) -> None:
    if self.stock is not None:
      self.stock.free()
    self.stock = None


def measured(step, seconds: list[float], device) -> dict:
  """The figures of one model from its seconds per step, by round."""
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
  """A row for the configuration and for each variant; a variant that is refused has its reason in its row.

  Raises:
    ConfigError: the configuration itself, or its baseline, cannot work here.
  """
  import contenders

  start = time.monotonic()
  comparison = Comparison(options, (options.baseline or contenders.plain_model(options.config), options.config))
  record.say(f"baseline: {comparison.stock_yaml}")
  # Those that share a baseline in a row, so that it is compiled once.
  alike = sorted(variants.items(), key=lambda item: sorted(contenders.of_stock(item[1]).items()))
  rows, pending = [], {"": {}} | dict(alike)
  try:
    for i, (variant, keys) in enumerate(pending.items()):
      name = f"{_stem(options.config)} {variant}".strip()
      now, end = time.monotonic(), start + options.time_limit
      try:
        if now > end:
          raise ConfigError(f"--time-limit {options.time_limit:g} s was reached before it.")
        rows.append(comparison.measure(name, keys, deadline=now + (end - now) / (len(pending) - i)))
      except Exception as error:
        if not variant:
          raise
        if not isinstance(error, ConfigError):  # what has been measured is kept
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
    [*_figures(row["stock"]), "", *_compiled(row["stock"]), "", "", "", ""],
    [*_figures(row["mudd"]), peak, *_compiled(row["mudd"]), *spread],
  ]


def _figures(one: dict) -> list[str]:
  return [
    one["name"],
    f"{1000 * one['step_seconds']:.1f}",
    f"{one['tokens_per_second']:,.0f}",
    f"{one['tflops_per_second']:.3g}",
    f"{100 * one['mfu']:.1f}%" if one["mfu"] else "n/a",
    record.gigabytes(one["argument_bytes"]),
    record.gigabytes(one["temporary_bytes"]),
  ]


def _compiled(one: dict) -> list[str]:
  return [f"{one['compile_seconds']:.1f}"]


def text(rows: list[dict], options, device: str) -> str:
  """The body of the markdown."""
  lines = record.table(COLUMNS, [line for row in rows for line in cells(row)])
  refused = "".join(f"- {row['model']}: {row['refused']}\n" for row in rows if row["refused"])
  return (
    record.caution(device) + lines + (f"\nNot measured:\n{refused}" if refused else "") + NOTES.format(**vars(options))
  )


def _reason(error: Exception) -> str:
  if isinstance(error, ConfigError):
    return str(error)
  return f"it failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _stem(name: str) -> str:
  return pathlib.Path(name).stem


def run(options) -> None:
  """Measures, prints and saves."""
  check_options(options)
  with contextlib.redirect_stdout(sys.stderr):  # MaxText prints
    plugin.install()
    import contenders
    import jax

    variants = {x: contenders.variant_keys(x) for x in options.variants.split(",") if x}
    device = chips.describe(jax.devices())
    about = record.facts(device, label="device", packages=("jax", "jaxlib", "maxtext"))
    if options.note:
      about["note"] = options.note
    rows = measure_all(options, variants)
    about["baseline"] = options.baseline or contenders.plain_model(options.config)
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
  logging.disable(logging.WARNING)  # MaxText's
  sys.exit(main(sys.argv[1:]))
