"""Reads and checks the arguments of the command, before JAX or MaxText is imported."""

import argparse
import dataclasses
import os
import pathlib
from typing import Any

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs.model_arguments import check_model, number, read_text, split

OF_TEXT = {
  "similarity": "cosine of the inputs of adjacent blocks, by stream (Fig. 6)",
  "heads": "share of attention heads whose largest weight is on no sink (Fig. 8)",
  "attention": "attention weights of all heads of one block (Figs. 10 and 11)",
  "weights": "depth weights of each aggregate, times the norm of the source (Figs. 12 and 13)",
  "lens": "loss of the output head on the input of each block, by stream",
  "ablate": "loss with parts of the dynamic depth weights replaced",
}
FIGURES = OF_TEXT | {"speed": "loss against speed (Fig. 9); needs --study and --speed in place of a model"}
# By argument, the figures that read it; all read the others.
FIGURES_OF = dict.fromkeys(("checkpoint", "against", "text", "length", "tokenizer", "arguments"), tuple(OF_TEXT))
FIGURES_OF |= dict.fromkeys(("sequences", "batch_size"), tuple(x for x in OF_TEXT if x != "attention"))
FIGURES_OF |= {"block": ("attention",), "sink": ("heads",), "to": ("ablate",), "study": ("speed",), "speed": ("speed",)}


@dataclasses.dataclass(frozen=True)
class ModelRequest:
  """A model to look into.

  Attributes:
    checkpoint: the folder of the model, or the checkpoint of a run.
    config_file: the configuration that the run was started with; empty for other models.
    overrides: MaxText's keys.
    tokenizer: the path of a tokenizer that overrides the configuration's; empty for the configuration's.
  """

  checkpoint: str
  config_file: str
  overrides: dict[str, Any]
  tokenizer: str


@dataclasses.dataclass(frozen=True)
class AnalysisRequest:
  """What to measure and draw.

  Attributes:
    figure: one of `FIGURES`.
    models: the model, and those to compare it with.
    text: what they read.
    sequences: the largest number of sequences of the text, all of the same number of tokens; of `attention` one.
    length: tokens in a sequence; None: 256, or 64 for `attention`, or the context of the model if it is shorter.
    batch_size: sequences in a batch.
    block: the block of `attention`; None for the middle one.
    sinks: tokens that `heads` counts as sinks, beside the first two positions and BOS, as text; None: "." and newline,
      if the tokenizer has them.
    to: what `ablate` replaces weights by, "static", "mean" or "zero".
    study: the results of a study, for `speed`.
    speed: files of speeds, with the names that models of the study have there; later ones override earlier ones.
    output: the folder to write to.
  """

  figure: str
  models: tuple[ModelRequest, ...]
  text: str
  sequences: int
  length: int | None
  batch_size: int
  block: int | None
  sinks: tuple[str, ...] | None
  to: str
  study: pathlib.Path | None
  speed: tuple[tuple[pathlib.Path, dict[str, str]], ...]
  output: pathlib.Path


def parser(description: str) -> argparse.ArgumentParser:
  """The parser of the command line."""
  figures = "\n".join(f"  {name:<11} {what}" for name, what in FIGURES.items())
  result = argparse.ArgumentParser(
    prog="python3 -m maxtext_mudd.analyze",
    description=f"{description}\nfigures:\n{figures}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  result.add_argument("figure", metavar="FIGURE", help="one of those above")
  result.add_argument("--checkpoint", default="", metavar="C", help="folder with a model, or a checkpoint of a run")
  result.add_argument(
    "--against",
    action="append",
    nargs="+",
    default=[],
    metavar=("C", "CONFIG.yml key=value"),
    help="another model with its configuration and keys, in the same figure; may be repeated",
  )
  result.add_argument("--text", default="", metavar="FILE", help="the text that the models read")
  result.add_argument("--output", required=True, metavar="DIR", help="folder for FIGURE.json and FIGURE.png")
  result.add_argument("--sequences", metavar="N", help="the most sequences of the text; default: 64")
  result.add_argument("--length", metavar="N", help="tokens in a sequence; default: 256; attention: 64")
  result.add_argument("--batch-size", metavar="N", help="sequences in a batch; default: 8")
  result.add_argument("--block", metavar="N", help="attention: the block; default: the middle one")
  result.add_argument(
    "--sink",
    action="append",
    metavar="TEXT",
    help=r"heads: a token that is a sink, in place of . and \n; may be repeated; BOS always is one",
  )
  result.add_argument(
    "--to", choices=["static", "mean", "zero"], help="ablate: what weights are set to; default: static"
  )
  result.add_argument("--study", metavar="FILE.jsonl", help="speed: results of benchmarks/study.py")
  result.add_argument(
    "--speed",
    action="append",
    nargs="+",
    default=[],
    metavar=("FILE.json", "MODEL=MODEL_OF_FILE"),
    help="speed: results of benchmarks/throughput.py, besides the step times that the study has measured; "
    "mudd=mudd_405m says that the model mudd of the study is mudd_405m there",
  )
  result.add_argument("--tokenizer", default="", metavar="PATH", help="overrides the configurations' tokenizer_path")
  result.add_argument(
    "arguments", nargs="*", metavar="CONFIG.yml key=value", help="configuration of a run; MaxText's keys"
  )
  return result


def read(args: argparse.Namespace) -> AnalysisRequest:
  """Reads the parsed arguments.

  Raises:
    ConfigError: an argument cannot work.
    versions.UnknownMaxText: MaxText is missing, or its version is not a known one.
  """
  figure, output = args.figure, pathlib.Path(args.output).absolute()
  if figure not in FIGURES:
    raise ConfigError(f"{figure} is not a figure; choose one of {', '.join(FIGURES)}.")
  for name, figures in FIGURES_OF.items():
    if getattr(args, name) and figure not in figures:
      flag = "CONFIG.yml and key=value" if name == "arguments" else f"--{name.replace('_', '-')}"
      raise ConfigError(f"{flag} does nothing with {figure}; leave it out.")
  for file in (output / f"{figure}.json", output / f"{figure}.png"):
    if os.path.lexists(file):
      raise ConfigError(f"--output={args.output} has a {file.name} already; name another folder.")
  if output.exists() and not output.is_dir():
    raise ConfigError(f"--output={args.output} is a file; name a folder.")
  models, text = (), ""
  if figure == "speed":
    _check_files_of_speed(args)
  else:
    for flag, value in (("--checkpoint", args.checkpoint), ("--text", args.text)):
      if not value:
        raise ConfigError(f"{figure} needs {flag}; name {'a model' if flag == '--checkpoint' else 'a text file'}.")
    text = read_text(args.text)
    given = [("--checkpoint", args.checkpoint, args.arguments)]
    given += [("--against", first, rest) for first, *rest in args.against]
    models = tuple(_model(*each, args.tokenizer) for each in given)
  return AnalysisRequest(
    figure=figure,
    models=models,
    text=text,
    sequences=1 if figure == "attention" else number("--sequences", args.sequences or "64", int, 1),
    length=number("--length", args.length, int, 2) if args.length else None,
    batch_size=number("--batch-size", args.batch_size or "8", int, 1),
    block=number("--block", args.block, int, 1) if args.block else None,
    sinks=None if args.sink is None else tuple(x.replace("\\n", "\n") for x in args.sink),
    to=args.to or "static",
    study=pathlib.Path(args.study) if args.study else None,
    speed=tuple((pathlib.Path(file), _renamed(file, names)) for file, *names in args.speed),
    output=output,
  )


def _model(flag: str, checkpoint: str, arguments: list[str], tokenizer: str) -> ModelRequest:
  config_file, overrides = split(arguments)
  check_model(checkpoint, config_file, arguments, overrides, flag)
  return ModelRequest(checkpoint, config_file, overrides, tokenizer)


def _renamed(file: str, names: list[str]) -> dict[str, str]:
  """The names that models of the study have in a file of speeds, from MODEL=MODEL_OF_FILE. Raises ConfigError."""
  for text in names:
    if not all(text.partition("=")):
      raise ConfigError(f"--speed {file} {text}: {text} is not MODEL=MODEL_OF_FILE, such as mudd=mudd_405m.")
  return {name: of_file for name, _, of_file in (text.partition("=") for text in names)}


def _check_files_of_speed(args: argparse.Namespace) -> None:
  if not args.study:
    raise ConfigError("speed needs --study=FILE.jsonl; name results of benchmarks/study.py.")
  for flag, name in (("--study", args.study), *(("--speed", name) for name, *_ in args.speed)):
    if not pathlib.Path(name).is_file():
      raise ConfigError(f"{flag}={name} is not a file; name one that a benchmark wrote.")
