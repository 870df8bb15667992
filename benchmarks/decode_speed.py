"""Measures decoding speed with MUDD connections and without, in turn in one run, on the devices of this machine.

    .venv/bin/python benchmarks/decode_speed.py --config yaml/mudd_2p8b.yml --batch 1,8 --prompt 128 --new 64

Both models have random weights, in bfloat16 unless `weight_dtype` is given. They continue the same random prompts, as
`maxtext_mudd.generate` does. The tool writes NAME.md and NAME.json to benchmarks/results/.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import pathlib
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # share of a GPU's memory; JAX's default is 0.75

import chips
import paired
import record

from maxtext_mudd import plugin
from maxtext_mudd.config import versions
from maxtext_mudd.config.errors import ConfigError

SERVING_KEYS = {"weight_dtype": "bfloat16"}  # the dtype in which models are served; training has float32
PHASES = ("prefill", "step")
COLUMNS = [
  "model",
  "batch",
  "prefill, ms",
  "step, ms",
  "tokens/s",
  "parameters GB",
  "cache GB",
  "peak GB",
  "compile, s",
]
COLUMNS += ["prefill ratio", "quartiles", "step ratio", "quartiles", "extremes", "rounds"]
NOTES = """
The two models of each pair of rows were measured in turn. Every other round the order was reversed. In a round each
model continued a batch of prompts. A prompt had {prompt} tokens and got {new} new tokens. {warmup} round(s) of each
model ran before the first round and are not counted. Prefill: time of one prompt and its first token. Step: time of one
more token for the whole batch, decoded greedily: the mean over the {steps} steps after the first token, {how}.
Tokens/s follows from the time of a step. Times are medians over rounds. Ratios: the speed of the second model over that
of the first in each round, as the median over rounds with quartiles and, for steps, extremes. The goal for steps is
{goal:.0f}%. The paper reports 88 to 94%. Rows named "again" compare the plain model with itself, which shows how far
the ratio of equal models is from 100% on this machine. Parameters and KV cache: those of all devices. The dtype of the
parameters is {weight_dtype}, and the model computes in {dtype}. Peak: the most memory that this process had held on the
first device until then, with both models on it, as the device reports it; n/a if it reports none. Compile: time to
build the engine and to run the first round.
"""
GOAL = 95.0


def parse(arguments: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True, help="a model with connections")
  parser.add_argument("--baseline", help="a plain model; default: the one that --config builds on")
  parser.add_argument("--batch", default="1,8", help="prompts at a time, a pair for each; default: %(default)s")
  parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt; default: %(default)s")
  parser.add_argument("--new", type=int, default=64, help="new tokens for each prompt; default: %(default)s")
  parser.add_argument("--calls", action="store_true", help="call the engine for each step, as servers do")
  parser.add_argument("--rounds", type=int, default=10, help="rounds of each pair; default: %(default)s")
  parser.add_argument("--warmup", type=int, default=2, help="rounds before those that count; default: %(default)s")
  parser.add_argument(
    "--time-limit",
    type=float,
    default=540,
    help="seconds for everything (default: %(default)s); later rounds and pairs are left out",
  )
  parser.add_argument("--output", help="name of the results; default: date, model and device")
  parser.add_argument("--note", help="a sentence to keep with the results")
  parser.add_argument("overrides", nargs="*", metavar="key=value", help="MaxText's keys, for both models")
  return parser.parse_intermixed_args(arguments)


def check_options(options) -> list[int]:
  """Checks the options; returns the batch sizes.

  Raises:
    ConfigError: an option cannot work.
  """
  for name, least in (("rounds", paired.MIN_ROUNDS), ("prompt", 1), ("new", 2), ("warmup", 1)):
    if getattr(options, name) < least:
      raise ConfigError(f"--{name} is {getattr(options, name)}; at least {least} is needed.")
  if not options.time_limit > 0:
    raise ConfigError(f"--time-limit is {options.time_limit:g}; seconds above 0 are needed.")
  batches = options.batch.split(",")
  if not all(x.isdecimal() and int(x) for x in batches):
    raise ConfigError(f"--batch is {options.batch!r}; give numbers above 0, as in 1,8.")
  for key in ("per_device_batch_size", "load_parameters_path"):
    if any(x.startswith(f"{key}=") for x in options.overrides):
      instead = "--batch gives the number of prompts" if "batch" in key else "weights are random here"
      raise ConfigError(f"{key}: {instead}; leave it out.")
  return [int(x) for x in batches]


# ---------------------------------------------------------------- measuring


def configurations(options) -> tuple:
  """The configurations of the plain model and of the one with connections.

  Raises:
    ConfigError: one of them cannot work, or they cannot be compared.
  """
  import compared_models

  baseline = options.baseline or compared_models.plain_model(options.config)
  given = {x.split("=", 1)[0] for x in options.overrides}
  serving = [f"{key}={value}" for key, value in SERVING_KEYS.items() if key not in given]
  overrides = [*serving, "per_device_batch_size=1", *options.overrides]
  config = compared_models.read(options.config, overrides, {})
  stock = compared_models.read_stock(baseline, overrides, {})
  compared_models.check_pair(stock, config, (baseline, options.config), derived=not options.baseline)
  return stock, config


def measure_all(options, batches: list[int], decoders: tuple, device) -> list[dict]:
  """Measures, for each batch size, the pair of models, and the plain model against itself; returns a row for each.

  Args:
    decoders: the plain model and the one with connections.

  Raises:
    ConfigError: a model does not fit.
  """
  end, rows = time.monotonic() + options.time_limit, []
  stock, other = decoders
  pending = [(batch, second) for batch in batches for second in (other, stock)]
  for i, (batch, second) in enumerate(pending):
    now = time.monotonic()
    if rows and now > end:
      record.say(f"batch {batch} is left out: --time-limit {options.time_limit:g} s has been reached.")
      break
    if second is other:
      for decoder in decoders:
        record.say(f"{decoder.name}: compiling for batch {batch}")
        decoder.prepare(batch, options.prompt, options.new, options.warmup, options.calls)
    now = time.monotonic()
    deadline = now + max(end - now, 0) / (len(pending) - i)
    record.say(f"{second.name}: rounds of batch {batch}")
    rows.append(
      measured(stock, second, batch, paired.alternate(stock.run, second.run, options.rounds, deadline), device)
    )
  return rows


def measured(first, second, batch: int, seconds: list[tuple], device) -> dict:
  """One row of the results, from the seconds of both models in each round."""
  ratio = {}
  for phase in PHASES:
    ratios = paired.speed_ratios([(getattr(a, phase), getattr(b, phase)) for a, b in seconds])
    ratio[phase] = {"by_round": ratios, **dataclasses.asdict(paired.Spread.of(ratios))}
  names = (first.name, f"{second.name}, again" if second is first else second.name)
  return {
    "batch": batch,
    "is_control": second is first,
    "stock": figures(first, names[0], batch, [a for a, _ in seconds]),
    "other": figures(second, names[1], batch, [b for _, b in seconds]),
    "device_peak_bytes": chips.peak_bytes(device),
    "ratio": ratio,
  }


def figures(decoder, name: str, batch: int, seconds: list) -> dict:
  """The figures of one model, from its seconds in each round."""
  times = {}
  for phase in PHASES:
    by_round = [getattr(x, phase) for x in seconds]
    times |= {f"{phase}_seconds_by_round": by_round, f"{phase}_seconds": paired.Spread.of(by_round).median}
  return {
    "name": name,
    **times,
    "tokens_per_second": batch / times["step_seconds"],
    "parameter_bytes": decoder.parameter_bytes,
    "cache_bytes": decoder.cache_bytes,
    "compile_seconds": decoder.compile_seconds,
  }


# ---------------------------------------------------------------- results


def cells(row: dict) -> list[list[str]]:
  """The lines of a pair in the table; one line where the plain model is compared with itself."""
  spread = []
  for phase in PHASES:
    ratio = row["ratio"][phase]
    quartiles = f"{100 * ratio['lower_quartile']:.1f}..{100 * ratio['upper_quartile']:.1f}"
    spread += [f"{100 * ratio['median']:.1f}%", quartiles]
  steps = row["ratio"]["step"]
  spread += [f"{100 * steps['min']:.1f}..{100 * steps['max']:.1f}", str(len(steps["by_round"]))]
  peak = record.gigabytes(row["device_peak_bytes"])
  lines = [_line(row["stock"], row["batch"], "", [""] * 6), _line(row["other"], row["batch"], peak, spread)]
  return lines[1:] if row["is_control"] else lines


def _line(model: dict, batch: int, peak: str, spread: list[str]) -> list[str]:
  return [
    model["name"],
    str(batch),
    f"{1000 * model['prefill_seconds']:.2f}",
    f"{1000 * model['step_seconds']:.3f}",
    f"{model['tokens_per_second']:,.1f}",
    record.gigabytes(model["parameter_bytes"]),
    record.gigabytes(model["cache_bytes"]),
    peak,
    f"{model['compile_seconds']:.1f}",
    *spread,
  ]


def text(rows: list[dict], options, config, device: str) -> str:
  """The body of the .md file."""
  lines = record.table(COLUMNS, [line for row in rows for line in cells(row)])
  dtypes = {key: str(getattr(config, key).name) for key in ("weight_dtype", "dtype")}
  how = "each of which is a call of the engine from Python" if options.calls else "which run as one program"
  notes = NOTES.format(**vars(options), **dtypes, steps=options.new - 1, how=how, goal=GOAL)
  return record.caution(device) + lines + notes


def run(options) -> None:
  """Measures, and writes the results.

  Raises:
    ConfigError: an option or a configuration cannot work, or a model does not fit.
  """
  batches = check_options(options)
  with contextlib.redirect_stdout(sys.stderr):  # MaxText prints to stdout, which is for results
    plugin.install()
    import compared_models
    import decoders
    import jax

    device = chips.describe(jax.devices())
    about = record.facts(device, label="device", packages=("jax", "jaxlib", "maxtext"))
    if options.note:
      about["note"] = options.note
    stock_config, config = configurations(options)
    if options.prompt + options.new > config.max_target_length:
      raise ConfigError(
        f"--prompt {options.prompt} and --new {options.new} are longer than the context, "
        f"max_target_length={config.max_target_length}; lower one of them."
      )
    for batch in batches:
      if batch % jax.device_count():
        raise ConfigError(f"--batch {batch} is not a multiple of the {jax.device_count()} devices here; use one.")
    about["baseline"] = options.baseline or compared_models.plain_model(options.config)
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as MaxText's decode does
    different_keys = compared_models.different_keys(stock_config, config)
    names = [pathlib.Path(name).stem for name in (about["baseline"], options.config)]
    pair = []
    try:
      for name, model_config in zip(names, (stock_config, config)):
        record.say(f"{name}: creating random weights")
        pair.append(decoders.Decoder(name, model_config))
      rows = measure_all(options, batches, tuple(pair), jax.devices()[0])
    finally:
      for decoder in pair:
        decoder.free()
    rows = [row | {"differs_from_stock": different_keys} for row in rows]
  body = text(rows, options, config, device)
  print(body)
  place = record.write(options.output or record.default_name("decode", options.config, device), about, body, rows)
  record.say(f"written: {place}.md and .json")


def main(arguments: list[str]) -> int:
  try:
    run(parse(arguments))
  except (ConfigError, versions.UnknownMaxText) as error:
    print(f"decode_speed: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  logging.disable(logging.WARNING)  # MaxText's logs
  sys.exit(main(sys.argv[1:]))
