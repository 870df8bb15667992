"""Fine-tunes a model by MaxText's trainers, `maxtext.trainers.post_train.*`, with MUDD connections.

    python3 -m maxtext_mudd.post_train sft MODEL.yml post_train/sft.yml load_parameters_path=M/items run_name=mine ...

The first argument is the method:

    sft      supervised fine-tuning on conversations; with lora.enable_lora=true, of an adapter
    dpo      direct preference optimization, on pairs of a chosen and a rejected answer
    distill  distillation from a teacher
"""

import dataclasses
import functools
import importlib.util
import sys

from maxtext_mudd import plugin
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import console, data_settings, run_lock
from maxtext_mudd.runs.launch import exit_with, launch


@dataclasses.dataclass(frozen=True)
class Method:
  """A method of fine-tuning.

  Attributes:
    entry_point: the module of MaxText's trainer.
    first_step: the number that this trainer gives the first step of a run.
  """

  entry_point: str
  first_step: int = 1


METHODS = {
  "sft": Method("maxtext.trainers.post_train.sft.train_sft"),
  "dpo": Method("maxtext.trainers.post_train.dpo.train_dpo"),
  "distill": Method("maxtext.trainers.post_train.distillation.train_distill"),
}

_NO_RL = (
  "rl: MaxText's GRPO generates answers with vLLM alone, through the module tpu_inference, and vLLM has no model with "
  "connections; use dpo (docs/post_training.md)."
)


def check_post_training(config, name: str, lock: run_lock.RunLock | None = None, earlier: list | None = None) -> None:
  """Checks a run of a method of `METHODS`, and locks its folder if `lock` is given.

  Args:
    earlier: the configurations that were checked before in this run. This one is appended. Distillation has three.

  Raises:
    ConfigError: the run cannot work on one of the hosts of the job. It is raised on all hosts.
  """
  # These import MaxText, whose version `launch` has checked by now.
  from maxtext_mudd.config import devices
  from maxtext_mudd.runs import data_position, hosts, post_training, preflight, refusals

  refusal = None
  try:
    if not earlier:
      plugin.replace(plugin.DISTILLATION if name == "distill" else plugin.FINE_TUNING)
      refusals.check(config, post_training.settings(config, name))
    if name == "distill":
      post_training.check_distillation(config, earlier)
    if not earlier:
      devices.check_batch(config)
      preflight.check_inputs(config)
      if name != "distill":
        post_training.check_start(config)
      if lock:
        lock.take(config)
      preflight.try_data(config)
  except ConfigError as error:
    refusal = error
  hosts.refuse_together(refusal)
  if not earlier:
    data_position.warn_on_resume(config)
  if earlier is not None:
    earlier.append(config)


def check_installed() -> None:
  """Raises ConfigError if Tunix, on which MaxText's trainers for fine-tuning build, is not installed."""
  for module in ("tunix", "metrax", "clu", "perfetto"):
    if importlib.util.find_spec(module) is None:
      raise ConfigError(
        f"fine-tuning needs the module {module}, which is not installed: python3 -m pip install --no-deps -r "
        "requirements/post.txt."
      )


def run() -> None:
  """Fine-tunes. What the run reads and writes is checked, and its folder locked, before anything is compiled."""
  program, name, *arguments = [*sys.argv, "", ""][: max(len(sys.argv), 2)]
  if name not in METHODS:
    if name in ("-h", "--help"):
      print(__doc__)
      return
    if name == "rl":
      exit_with(_NO_RL)
    exit_with(f"{name or 'no method'} is not a method of fine-tuning; name {', '.join(METHODS)}, before all else.")
  sys.argv = [f"{program} {name}", *arguments]
  method = METHODS[name]
  with run_lock.RunLock() as lock, console.Console(first_step=method.first_step):
    check = functools.partial(check_post_training, name=name, lock=lock, earlier=[])
    launch(method.entry_point, check=check, check_early=check_early, command=f"post_train {name}")


def check_early(config) -> None:
  """Raises ConfigError for what can be seen before MaxText is imported."""
  check_installed()
  data_settings.check(config)


if __name__ == "__main__":
  run()
