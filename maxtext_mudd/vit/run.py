"""A training run: its folder, its checkpoints, its metrics, and the loop over steps.

    OUTPUT/RUN_NAME/config.yml       every key with its value
                    metrics.jsonl    a line for each log and each evaluation
                    curve.png        loss and accuracy, drawn at each evaluation
                    checkpoints/N    parameters, optimizer and position in the data after N steps

A run of a name that exists is resumed from its newest checkpoint: the same command gives the same numbers, whenever it
was killed. Orbax renames a checkpoint when it is complete; the other files are written beside, and renamed.
"""

import json
import os
import pathlib
import time
from typing import Any

import grain
import numpy as np
import omegaconf
import orbax.checkpoint as ocp
import tqdm

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs.run_lock import RunLock
from maxtext_mudd.vit import config as vit_config
from maxtext_mudd.vit import data
from maxtext_mudd.vit.config import VitConfig
from maxtext_mudd.vit.curve import draw
from maxtext_mudd.vit.step import Program, TrainState, learning_rate, make_mesh, make_program


def train(config: VitConfig) -> dict[str, float]:
  """Trains a model, or resumes its run. Returns the metrics of the last evaluation.

  Raises:
    ConfigError: the run cannot work; before anything is compiled or written.
  """
  if not config.run_name:
    raise ConfigError("run_name is not set; give the run a name: run_name=first.")
  check_folder(config)
  sources = data.check(config)
  mesh = make_mesh(config)
  with RunLock() as lock:
    lock.take(config)
    if not (config.folder / "config.yml").exists():
      _write(config.folder / "config.yml", omegaconf.OmegaConf.to_yaml(vit_config.values(config)))
    program = make_program(config, mesh)
    manager = ocp.CheckpointManager(
      pathlib.Path(config.checkpoint_dir).absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=config.checkpoints_kept),
    )
    with manager:
      return _Run(config, program, manager, *sources).to_end()


def check_folder(config: VitConfig) -> None:
  """Raises ConfigError for a folder that is not of a run, or of one with other keys."""
  folder, file = config.folder, config.folder / "config.yml"
  if not folder.exists():
    return
  if not file.is_file():
    if any(path.name != "run.lock" for path in folder.iterdir()):
      raise ConfigError(f"{folder} exists and is no run of an image classifier; give this run another run_name.")
    return
  earlier = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(file))
  for name, value in vit_config.values(config).items():
    if name not in config.FREE_ON_RESUME and earlier.get(name) != value:
      raise ConfigError(
        f"{folder} is a run with {name}={earlier.get(name)}, and not {name}={value}; give this run another run_name, "
        "or repeat the command of that run to resume it."
      )


class _Run:
  """A run whose folder is locked."""

  def __init__(
    self, config: VitConfig, program: Program, manager: ocp.CheckpointManager, images: Any, eval_images: Any
  ):
    self.config, self.program, self.manager, self.eval_images = config, program, manager, eval_images
    self.batches = data.train_iterator(config, images)
    self.metrics_file = config.folder / "metrics.jsonl"
    epochs = vit_config.epochs(config, len(images))
    tqdm.tqdm.write(
      f"{config.folder}: {program.parameters:,} parameters, {len(images):,} images, {epochs:.1f} epochs of them"
    )

  def to_end(self) -> dict[str, float]:
    """Runs all steps that are not done."""
    config = self.config
    state = self._restored() if self.manager.latest_step() is not None else self.program.init()
    done = int(state.step)
    records = [record for record in read_metrics(self.metrics_file) if record["step"] <= done]
    _write(self.metrics_file, "".join(map(_line, records)))  # without steps that will be repeated
    rate, since = learning_rate(config), time.monotonic()
    last_logged = done
    with tqdm.tqdm(total=config.steps, initial=done, desc=config.run_name, unit="step", disable=None) as bar:
      while done < config.steps:
        state, metrics = self.program.train(state, *self.program.place(next(self.batches)))
        done += 1
        bar.update()
        if done % config.log_interval == 0 or done in (1, config.steps):
          values = {name: float(x) for name, x in metrics.items()}
          if not np.isfinite(values["loss"]):
            raise ConfigError(
              f"the loss of step {done} is {values['loss']}; lower learning_rate={config.learning_rate}."
            )
          speed = (done - last_logged) * config.batch_size / (time.monotonic() - since)
          self._log({"step": done, **values, "learning_rate": float(rate(done - 1)), "images_per_second": speed})
          bar.set_postfix_str(f"loss {values['loss']:.3f}")
          last_logged, since = done, time.monotonic()
        if done % config.eval_interval == 0 or done == config.steps:
          self._evaluate(state, done)
          last_logged, since = done, time.monotonic()
        if done % config.checkpoint_interval == 0 or done == config.steps:
          self._save(state, done)
    self.manager.wait_until_finished()
    if not any("eval_loss" in record for record in read_metrics(self.metrics_file)):
      self._evaluate(state, done)
    return [record for record in read_metrics(self.metrics_file) if "eval_loss" in record][-1]

  def _restored(self) -> TrainState:
    step = self.manager.latest_step()
    items = ocp.args.Composite(
      state=ocp.args.StandardRestore(self.program.abstract_state),
      data=grain.checkpoint.CheckpointRestore(self.batches),
    )
    tqdm.tqdm.write(f"resuming from {self.config.checkpoint_dir}/{step}")
    return self.manager.restore(step, args=items)["state"]

  def _save(self, state: TrainState, step: int) -> None:
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(self.batches))
    self.manager.save(step, args=items)

  def _evaluate(self, state: TrainState, step: int) -> None:
    loss, right, number = 0.0, 0, len(self.eval_images)
    for batch in data.eval_batches(self.config, self.eval_images, self.config.batch_size):
      losses, correct = self.program.evaluate(state.params, *self.program.place(batch))
      loss, right = loss + float(losses), right + int(correct)
    record = {"step": step, "eval_loss": loss / number, "accuracy": right / number}
    self._log(record)
    tqdm.tqdm.write(f"step {step}: eval loss {record['eval_loss']:.4f}, accuracy {100 * record['accuracy']:.2f} %")
    draw({self.config.run_name: read_metrics(self.metrics_file)}, self.config.folder / "curve.png")

  def _log(self, record: dict[str, float]) -> None:
    with open(self.metrics_file, "a") as file:
      file.write(_line(record))


def read_metrics(file: pathlib.Path) -> list[dict[str, float]]:
  """The records of a file of metrics; without the last line if it is incomplete, as after a kill."""
  lines = file.read_text().splitlines(keepends=True) if file.exists() else []
  return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(record: dict[str, float]) -> str:
  return json.dumps(record) + "\n"


def _write(file: pathlib.Path, text: str) -> None:
  """Writes a file whole: a kill leaves the one before."""
  beside = file.with_name(f".{file.name}.partial")
  beside.write_text(text)
  os.replace(beside, file)
