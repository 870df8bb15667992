"""Reads and checks the arguments of the evaluation command, before JAX, MaxText or the harness is imported."""

import argparse
import dataclasses
import os
import pathlib
from typing import Any

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.evaluate import results_file
from maxtext_mudd.runs.model_arguments import check_model, number, read_text, split

# The tasks of the harness for the columns of the paper's Table 3, which has zero-shot and five-shot results. The paper
# names the data sets only. The version of LAMBADA is the one that Pythia uses. The harness does not have RACE-M; this
# package's task asks its questions as the harness asks those of RACE-H.
PAPER_TASKS = (
  "lambada_openai",
  "piqa",
  "winogrande",
  "arc_easy",
  "arc_challenge",
  "sciq",
  "logiqa",
  "boolq",
  "hellaswag",
  "race_middle",
  "race",
)
PRESETS = {"paper": PAPER_TASKS}


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
  """The model to evaluate, and the tasks and texts to evaluate it on.

  Attributes:
    checkpoint: the folder of the model, or the remote checkpoint of a run.
    config_file: the configuration that the run was started with; empty for other models.
    overrides: MaxText's keys.
    tokenizer: the path of a tokenizer that overrides the configuration's; empty for the configuration's.
    task_names: names of tasks and groups of the harness.
    include_dir: a folder with further task files, or None.
    text: a text to evaluate on; may be empty.
    num_fewshot: the number of solved examples before each question; None for the task's number.
    limit: the number of documents of each task or, if it is below 1, their share; None for all.
    batch_size: the number of rows of a batch.
    output: the file to write the results to, or None.
  """

  checkpoint: str
  config_file: str
  overrides: dict[str, Any]
  tokenizer: str
  task_names: list[str]
  include_dir: str | None
  text: str
  num_fewshot: int | None
  limit: int | float | None
  batch_size: int
  output: pathlib.Path | None


def parser(description: str) -> argparse.ArgumentParser:
  """The parser of the command line."""
  result = argparse.ArgumentParser(
    prog="python3 -m maxtext_mudd.evaluate",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  result.add_argument("--checkpoint", required=True, metavar="M", help="folder with a model")
  result.add_argument(
    "--tasks", default="", metavar="A,B", help="names of tasks and groups; paper: the eleven tasks of the paper"
  )
  result.add_argument("--num-fewshot", metavar="N", help="solved examples before each question; default: the task's")
  result.add_argument("--text", metavar="FILE", help="also give perplexity per token and bits per byte of this text")
  result.add_argument("--output", metavar="FILE.json", help="file for the harness's results; default: only print them")
  result.add_argument("--include-dir", metavar="DIR", help="folder with task files (YAML) besides the harness's own")
  result.add_argument("--limit", metavar="N", help="the first N documents of each task; below 1: this share of them")
  result.add_argument("--batch-size", default="8", metavar="N", help="rows of a batch; default: 8")
  result.add_argument("--tokenizer", default="", metavar="PATH", help="overrides the configuration's tokenizer_path")
  result.add_argument(
    "arguments", nargs="*", metavar="CONFIG.yml key=value", help="configuration of a run; MaxText's keys"
  )
  return result


def read(args: argparse.Namespace) -> EvaluationRequest:
  """Reads the parsed arguments.

  Raises:
    ConfigError: an argument cannot work.
    versions.UnknownMaxText: MaxText is missing, or its version is not a known one.
  """
  config_file, overrides = split(args.arguments)
  task_names = read_task_names(args.tasks)
  num_fewshot = None if args.num_fewshot is None else number("--num-fewshot", args.num_fewshot, int, 0)
  batch_size = number("--batch-size", args.batch_size, int, 1)
  limit = _limit(args.limit)
  if not task_names and not args.text:
    raise ConfigError(
      "there is nothing to evaluate on; name tasks, such as --tasks lambada_openai,piqa or --tasks paper, or a --text."
    )
  text = read_text(args.text) if args.text else ""
  output = pathlib.Path(args.output).absolute() if args.output else None
  if output:
    _check_output(args.output, output)
  if args.include_dir and not pathlib.Path(args.include_dir).is_dir():
    raise ConfigError(f"--include-dir={args.include_dir} is not a folder; name one with task files.")
  check_model(args.checkpoint, config_file, args.arguments, overrides)
  return EvaluationRequest(
    checkpoint=args.checkpoint,
    config_file=config_file,
    overrides=overrides,
    tokenizer=args.tokenizer,
    task_names=task_names,
    include_dir=args.include_dir,
    text=text,
    num_fewshot=num_fewshot,
    limit=limit,
    batch_size=batch_size,
    output=output,
  )


def read_task_names(names: str) -> list[str]:
  """Splits names at commas, replaces presets by their tasks, and drops repetitions."""
  parts = [part.strip() for part in names.split(",")]
  return list(dict.fromkeys(name for part in parts for name in PRESETS.get(part, (part,)) if name))


def _limit(text: str | None) -> int | float | None:
  if text is None:
    return None
  limit = number("--limit", text, float, 0)
  if limit > 1 and limit != int(limit):
    raise ConfigError(f"--limit={text} is neither a whole number of documents, nor a share below 1.")
  if limit == 0:
    raise ConfigError("--limit=0 leaves no documents; set it to a number of documents, or a share below 1.")
  return limit


def _check_output(name: str, output: pathlib.Path) -> None:
  if os.path.lexists(output):
    raise ConfigError(f"--output={name} exists already; name a file that does not.")
  if not output.parent.is_dir():
    raise ConfigError(f"--output={name}: there is no folder {output.parent}; make it first.")
  results_file.check(output)
