"""Evaluates a model on tasks of EleutherAI's lm-evaluation-harness, and on texts.

    python3 -m maxtext_mudd.evaluate --checkpoint M --tasks lambada_openai,piqa --output results.json
    python3 -m maxtext_mudd.evaluate --checkpoint M --tasks paper --num-fewshot 5
    python3 -m maxtext_mudd.evaluate --checkpoint M --text book.txt dtype=bfloat16
    python3 -m maxtext_mudd.evaluate --checkpoint OUTPUT/RUN/checkpoints/STEP --tasks sciq CONFIG.yml key=value ...

M is a Hugging Face folder of MUDDFormer or MUDDPythia, a folder of the authors' JAX code, or a folder that
`maxtext_mudd.convert` wrote. A checkpoint of a training run needs the configuration that the run was started with.
Everything is float32 unless keys say otherwise.
"""

from collections.abc import Callable
import difflib
import os
import sys
from typing import Any

from maxtext_mudd import assets, plugin
from maxtext_mudd.checkpoints.interrupts import Interrupts
from maxtext_mudd.config import versions
from maxtext_mudd.config.errors import ConfigError, brief, failed_in, reachable
from maxtext_mudd.evaluate import request as requests
from maxtext_mudd.evaluate import results_file
from maxtext_mudd.evaluate.request import EvaluationRequest
from maxtext_mudd.runs import launch, library_warnings

HARNESS = "lm_eval==0.4.13"
# The number of bootstrap samples for standard errors that have no closed form. The harness's default is a hundred times
# as many, which would take minutes.
BOOTSTRAP_ITERATIONS = 1000


def main(argv: list[str]) -> None:
  """Runs the command. Mistakes of the user end the process with one sentence and status 2."""
  args = requests.parser(__doc__).parse_intermixed_args(argv)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # warnings only: XLA would print its devices
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would print that PyTorch is missing
  try:
    with Interrupts() as interrupts, reachable(), library_warnings.hidden():
      request = requests.read(args)
      plugin.install()
      manager, tasks = load_tasks(request)
      lm = load_model(request, interrupts.check)
      _check_generations(manager, tasks, lm)
      results, tracker = evaluate(request, manager, tasks, lm)
      interrupts.check()
      samples = results.pop("samples")
      try:
        _print_results(results)
      finally:  # the file is written even if printing fails
        if request.output:
          results_file.write(request.output, tracker, results, samples, interrupts.ignore_further)
  except (ConfigError, versions.UnknownMaxText) as error:
    launch.exit_with(str(error))
  except KeyboardInterrupt:
    launch.exit_with("interrupted; no results were written.")


def load_tasks(request: EvaluationRequest) -> tuple[Any, list]:
  """Loads the tasks of a request with their data sets.

  Returns:
    The harness's `TaskManager`, and the tasks and groups.

  Raises:
    ConfigError: the harness is not installed, there is no such task, or a task cannot be loaded.
  """
  try:
    import lm_eval  # noqa: F401
  except ModuleNotFoundError as error:
    raise ConfigError(f"lm_eval is not installed; install it by `pip install {HARNESS}`.") from error
  manager = task_manager(request.task_names, request.include_dir)
  for name in request.task_names:
    if name not in manager.all_tasks:
      known = [*manager.all_tasks, *requests.PRESETS]
      nearest = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
      raise ConfigError(f"--tasks: {name} is not a task; the nearest are {nearest}.")
  tasks = []
  for name in request.task_names:
    try:
      loaded = manager.load(name)
    except Exception as error:  # data sets and task files raise their own
      offline = "unset HF_HUB_OFFLINE, or " if os.environ.get("HF_HUB_OFFLINE") else ""
      raise ConfigError(
        f"--tasks: {name} cannot be loaded; if its data set cannot be downloaded, {offline}copy it to the cache of "
        f"Hugging Face ({brief(error)})."
      ) from error
    groups = loaded.get("groups", {})
    tasks += [groups[name]] if name in groups else loaded["tasks"].values()
  try:
    manager.load(tasks)
  except ValueError as error:  # groups that share a task
    raise ConfigError(f"--tasks: these cannot be evaluated together ({brief(error)}).") from error
  return manager, tasks


def task_manager(names: list[str], include_dir: str | None):
  """The harness's `TaskManager` of this package's tasks and those in a folder.

  It reads the harness's own tasks, about fifteen thousand, only if one of `names` is among them.
  """
  from lm_eval.tasks import TaskManager

  folders = [str(assets.TASKS), *([include_dir] if include_dir else [])]
  manager = TaskManager(include_path=folders, include_defaults=False)
  return manager if set(names) <= set(manager.all_subtasks) else TaskManager(include_path=folders)


def load_model(request: EvaluationRequest, before_batch: Callable[[], None]):
  """Loads the model of a request as a `MaxTextLM`, which is what the harness evaluates.

  Args:
    before_batch: called before each batch; what it raises ends the evaluation.

  Raises:
    ConfigError: the model or its tokenizer cannot be loaded.
  """
  from maxtext_mudd.evaluate import harness
  from maxtext_mudd.inference import checkpoint

  loaded = checkpoint.load(request.checkpoint, request.config_file, request.overrides, request.tokenizer)
  return harness.MaxTextLM(*loaded, request.batch_size, before_batch)


def _check_generations(manager, tasks: list, lm) -> None:
  """Raises ConfigError for tasks whose generation the model cannot do, before the other tasks take hours."""
  for name, task in manager.load(tasks)["tasks"].items():
    if task.OUTPUT_TYPE == "generate_until" and task.config.generation_kwargs is not None:
      try:
        lm.check_generation(task.config.generation_kwargs)
      except ConfigError as error:
        raise ConfigError(f"--tasks: {name}: {error}") from error


def evaluate(request: EvaluationRequest, manager, tasks: list, lm) -> tuple[dict[str, Any], Any]:
  """Evaluates a model on tasks and the text of a request.

  Returns:
    The harness's results, and its `EvaluationTracker`, which can write them.

  Raises:
    ConfigError: the harness cannot build the questions of a task, or a batch does not fit the device.
  """
  from lm_eval import simple_evaluate
  from lm_eval.loggers import EvaluationTracker

  from maxtext_mudd.evaluate import harness

  # The harness would bootstrap in forked processes, which can deadlock because JAX runs threads.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  tracker = EvaluationTracker()
  text_tasks = [harness.TextTask(request.text, lm)] if request.text else []
  model_args = {
    "pretrained": request.checkpoint,
    "config": request.config_file,
    "tokenizer": lm.text_tokenizer.path,
  }
  try:
    results = simple_evaluate(
      model=lm,
      model_args=model_args | request.overrides,
      tasks=[*tasks, *text_tasks],
      num_fewshot=request.num_fewshot,
      batch_size=lm.batch_size,
      limit=request.limit,
      bootstrap_iters=BOOTSTRAP_ITERATIONS,
      evaluation_tracker=tracker,
      task_manager=manager,
    )
  except ConfigError:
    raise
  except Exception as error:
    if failed_in(error, "build_all_requests"):
      raise ConfigError(f"--tasks: the questions of a task cannot be made ({brief(error)}).") from error
    if "RESOURCE_EXHAUSTED" in str(error):
      raise ConfigError(
        f"--batch-size={request.batch_size} does not fit the device; use a smaller one ({brief(error)})."
      ) from error
    raise
  return results, tracker


def _print_results(results: dict[str, Any]) -> None:
  from lm_eval.utils import make_table

  print(make_table(results))
  if "groups" in results:
    print(make_table(results, "groups"))


if __name__ == "__main__":
  main(sys.argv[1:])
