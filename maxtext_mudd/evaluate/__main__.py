"""Evaluates a checkpoint on tasks of EleutherAI's lm-evaluation-harness, and on texts.

    python3 -m maxtext_mudd.evaluate --checkpoint M --tasks lambada_openai,piqa --output results.json
    python3 -m maxtext_mudd.evaluate --checkpoint M --tasks paper --num-fewshot 5
    python3 -m maxtext_mudd.evaluate --checkpoint M --text book.txt dtype=bfloat16
    python3 -m maxtext_mudd.evaluate --checkpoint OUTPUT/RUN/checkpoints/STEP --tasks sciq CONFIG.yml key=value ...

M is a Hugging Face folder of MUDDFormer or MUDDPythia, a folder of the authors' JAX code, or what `convert` made of
one. A training run's checkpoint needs the configuration that it was started with. Everything is float32 if keys do not
say otherwise.
"""

import argparse
from collections.abc import Callable
import difflib
import os
import pathlib
import sys
from typing import Any

from maxtext_mudd import assets, plugin, versions
from maxtext_mudd.config.errors import ConfigError, brief, failed_in, reachable
from maxtext_mudd.evaluate import results_file
from maxtext_mudd.interrupts import Interrupts
from maxtext_mudd.runs import early_check, launch, library_warnings

HARNESS = "lm_eval==0.4.13"
# The columns of the paper's Table 3, zero-shot and five-shot by the harness. That these were the tasks is not written:
# LAMBADA is Pythia's here, and RACE-M, which the harness lacks, is asked as it asks RACE-H.
PAPER = (
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
PRESETS = {"paper": PAPER}
# For standard errors of means of no closed form: a hundredth of the harness's default, which would take minutes.
BOOTSTRAPS = 1000


def main(argv: list[str]) -> None:
  args = _parser().parse_intermixed_args(argv)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # warnings; else XLA announces its devices
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it says that PyTorch is not there
  try:
    with Interrupts() as interrupts, reachable(), library_warnings.hidden():
      wanted = _Request(args)
      plugin.install()
      wanted.load_tasks()
      lm = wanted.load_model(interrupts.check)
      wanted.check_generations(lm)
      results = wanted.evaluate(lm)
      interrupts.check()
      try:
        _show(results)
      finally:  # one is there where the other fails
        wanted.write(results, interrupts.ignore_further)
  except (ConfigError, versions.UnknownMaxText) as error:
    launch.exit_with(str(error))
  except KeyboardInterrupt:
    launch.exit_with("interrupted; no results were written.")


def _show(results: dict[str, Any]) -> None:
  from lm_eval.utils import make_table

  print(make_table(results))
  if "groups" in results:
    print(make_table(results, "groups"))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python3 -m maxtext_mudd.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--checkpoint", required=True, metavar="M", help="folder with a model")
  parser.add_argument(
    "--tasks", default="", metavar="A,B", help="names of tasks and groups; `paper`: the paper's eleven"
  )
  parser.add_argument("--num-fewshot", metavar="N", help="solved examples before each question; as the task says")
  parser.add_argument("--text", metavar="FILE", help="perplexity per token and bits per byte of this text, too")
  parser.add_argument("--output", metavar="FILE.json", help="where the harness's results go; only printed if not told")
  parser.add_argument("--include-dir", metavar="DIR", help="folder with task files (YAML) beside the harness's own")
  parser.add_argument("--limit", metavar="N", help="the first N documents of each task; below 1: this share")
  parser.add_argument("--batch-size", default="8", metavar="N", help="8 if not told")
  parser.add_argument("--tokenizer", default="", metavar="PATH", help="instead of the configuration's tokenizer_path")
  parser.add_argument("arguments", nargs="*", metavar="CONFIG.yml key=value", help="of a run; MaxText's keys")
  return parser


class _Request:
  """What is to be evaluated, on what. Each step refuses what the next ones could not do."""

  def __init__(self, args: argparse.Namespace):
    self.checkpoint, self.tokenizer, self.include = args.checkpoint, args.tokenizer, args.include_dir
    self.config_file, self.overrides = _split(args.arguments)
    self.names = _task_names(args.tasks)
    self.num_fewshot = None if args.num_fewshot is None else _number("--num-fewshot", args.num_fewshot, int, 0)
    self.batch_size = _number("--batch-size", args.batch_size, int, 1)
    self.limit = None if args.limit is None else _number("--limit", args.limit, float, 0)
    if self.limit and self.limit > 1 and self.limit != int(self.limit):
      raise ConfigError(f"--limit={args.limit} is neither a whole number of documents, nor a share below 1.")
    if self.limit == 0:
      raise ConfigError("--limit=0 leaves nothing; set it to a number of documents, or a share below 1.")
    if not self.names and not args.text:
      raise ConfigError("there is nothing to evaluate; name --tasks, as lambada_openai,piqa or paper, or a --text.")
    self.text = _text(args.text) if args.text else ""
    self.output = pathlib.Path(args.output).absolute() if args.output else None
    if self.output and os.path.lexists(self.output):
      raise ConfigError(f"--output={args.output} exists already; name a file that does not.")
    if self.output and not self.output.parent.is_dir():
      raise ConfigError(f"--output={args.output}: there is no folder {self.output.parent}; make it first.")
    if self.output:
      results_file.check(self.output)
    if self.include and not pathlib.Path(self.include).is_dir():
      raise ConfigError(f"--include-dir={self.include} is not a folder; name one with task files.")
    self._check_checkpoint()
    self._check_keys([x for x in args.arguments if "=" in x])
    self.tasks, self.manager, self.tracker = [], None, None

  def _check_checkpoint(self) -> None:
    path = pathlib.Path(self.checkpoint).expanduser()
    if "://" in self.checkpoint:
      if not self.config_file:
        raise ConfigError(f"{self.checkpoint} is not a local folder; copy it first.")
    elif not path.is_dir():
      raise ConfigError(f"--checkpoint={self.checkpoint} is not a folder; name one that holds a model.")
    elif self.config_file and (path / "model.yml").exists():
      raise ConfigError(
        f"{self.config_file}: --checkpoint={self.checkpoint} has a model.yml, which describes its model; leave "
        f"{self.config_file} out."
      )
    elif not self.config_file and (path / "_CHECKPOINT_METADATA").exists() and not (path / "model.yml").exists():
      raise ConfigError(
        f"--checkpoint={self.checkpoint} is a checkpoint of a run; name the CONFIG.yml that it was started with, too."
      )

  def _check_keys(self, overrides: list[str]) -> None:
    """Before MaxText is imported. Raises ConfigError."""
    if self.config_file:
      early_check.check(["", self.config_file, *overrides])
    else:
      early_check.check_keys(self.overrides)

  def load_tasks(self) -> None:
    """Reads tasks, with their data sets. Raises ConfigError."""
    try:
      import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
      raise ConfigError(f"lm_eval is not installed; install it by `pip install {HARNESS}`.") from error
    manager = self.manager = _task_manager(self.names, self.include)
    for name in self.names:
      if name not in manager.all_tasks:
        nearest = ", ".join(difflib.get_close_matches(name, [*manager.all_tasks, *PRESETS], n=3, cutoff=0.0))
        raise ConfigError(f"--tasks: {name} is not a task; the nearest are {nearest}.")
    for name in self.names:
      try:
        loaded = manager.load(name)
      except Exception as error:  # data sets and task files raise all kinds
        offline = "unset HF_HUB_OFFLINE, or " if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ConfigError(
          f"--tasks: {name} cannot be loaded; where its data set cannot be downloaded, {offline}bring it to the cache "
          f"of Hugging Face ({brief(error)})."
        ) from error
      groups = loaded.get("groups", {})
      self.tasks += [groups[name]] if name in groups else loaded["tasks"].values()
    try:
      manager.load(self.tasks)
    except ValueError as error:  # of groups that share a task
      raise ConfigError(f"--tasks: these cannot be evaluated together ({brief(error)}).") from error

  def load_model(self, before_batch: Callable[[], None]):
    """The model as the harness sees one. Raises ConfigError."""
    from maxtext_mudd.evaluate import harness as evaluation
    from maxtext_mudd.inference import pretrained, tokens

    if self.config_file:
      model, config = pretrained.from_run(self.checkpoint, self.config_file, **self.overrides)
    else:
      model, config = pretrained.from_pretrained(self.checkpoint, **self.overrides)
    if not (self.tokenizer or self.overrides.get("tokenizer_path") or tokens.is_named(config)):
      self._check_default_tokenizer(config.tokenizer_path)
    return evaluation.MaxTextLM(model, config, tokens.Tokenizer(config, self.tokenizer), self.batch_size, before_batch)

  def _check_default_tokenizer(self, path: str) -> None:
    """MaxText's own, which a run may have been trained with, and no other model was. Raises ConfigError."""
    if not self.config_file:
      raise ConfigError(
        f"--checkpoint={self.checkpoint} has no tokenizer; name the one that the model was trained with by "
        "--tokenizer=PATH."
      )
    if not os.path.exists(path):
      raise ConfigError(
        f"{self.config_file} names no tokenizer_path; name the tokenizer that the model was trained with by "
        "--tokenizer=PATH."
      )

  def check_generations(self, lm) -> None:
    """Raises ConfigError for what a task asks for and the model cannot do, before hours of the other tasks."""
    for name, task in self.manager.load(self.tasks)["tasks"].items():
      if task.OUTPUT_TYPE == "generate_until" and task.config.generation_kwargs is not None:
        try:
          lm.check_generation(task.config.generation_kwargs)
        except ConfigError as error:
          raise ConfigError(f"--tasks: {name}: {error}") from error

  def evaluate(self, lm) -> dict[str, Any]:
    """The harness's results. Raises ConfigError."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    from maxtext_mudd.evaluate import harness as evaluation

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness's bootstraps would fork beside JAX's threads
    self.tracker = EvaluationTracker()
    texts = [evaluation.TextTask(self.text, lm)] if self.text else []
    described = {"pretrained": self.checkpoint, "config": self.config_file, "tokenizer": lm.words.path}
    try:
      return simple_evaluate(
        model=lm,
        model_args=described | self.overrides,
        tasks=[*self.tasks, *texts],
        num_fewshot=self.num_fewshot,
        batch_size=lm.batch_size,
        limit=self.limit,
        bootstrap_iters=BOOTSTRAPS,
        evaluation_tracker=self.tracker,
        task_manager=self.manager,
      )
    except ConfigError:
      raise
    except Exception as error:
      if failed_in(error, "build_all_requests"):
        raise ConfigError(f"--tasks: the questions of a task cannot be made ({brief(error)}).") from error
      if "RESOURCE_EXHAUSTED" in str(error):
        raise ConfigError(
          f"--batch-size={self.batch_size} does not fit the device; use a smaller one ({brief(error)})."
        ) from error
      raise

  def write(self, results: dict[str, Any], last_check: Callable[[], None]) -> None:
    """`results_file.write`, if a file is wanted. Raises ConfigError."""
    samples = results.pop("samples")
    if self.output:
      results_file.write(self.output, self.tracker, results, samples, last_check)


def _split(arguments: list[str]) -> tuple[str, dict[str, Any]]:
  """The configuration file, if there is one, and the keys."""
  files = [x for x in arguments if "=" not in x]
  wrong = [x for x in files if not x.endswith(".yml")]
  if wrong:
    raise ConfigError(f"{wrong[0]} is not key=value, nor a configuration file, which ends in .yml.")
  if len(files) > 1:
    raise ConfigError(f"{files[1]} is a second configuration file; one, {files[0]}, describes the checkpoint.")
  return (files or [""])[0], launch.read_overrides([x for x in arguments if "=" in x])


def _task_names(text: str) -> list[str]:
  names = [name for part in text.split(",") for name in PRESETS.get(part.strip(), (part.strip(),)) if name]
  return list(dict.fromkeys(names))


def _number(flag: str, text: str, kind: type, least: int):
  try:
    value = kind(text)
  except ValueError:
    value = -1
  if not least <= value < float("inf"):
    raise ConfigError(f"{flag}={text} is not a {'whole ' if kind is int else ''}number from {least} on.")
  return int(value) if value == int(value) else value


def _text(name: str) -> str:
  try:
    text = pathlib.Path(name).read_bytes().decode()
  except OSError as error:
    raise ConfigError(f"--text={name} cannot be read ({error.strerror}); name a text file.") from error
  except UnicodeDecodeError as error:
    raise ConfigError(f"--text={name} is not UTF-8 at byte {error.start}; convert it.") from error
  if not text:
    raise ConfigError(f"--text={name} is empty; name a file with a text.")
  return text


def _task_manager(names: list[str], include: str | None):
  """Knows this package's tasks and those of a folder; the harness's fifteen thousand where names are among them."""
  from lm_eval.tasks import TaskManager

  folders = [str(assets.TASKS), *([include] if include else [])]
  own = TaskManager(include_path=folders, include_defaults=False)
  return own if set(names) <= set(own.all_subtasks) else TaskManager(include_path=folders)


if __name__ == "__main__":
  main(sys.argv[1:])
