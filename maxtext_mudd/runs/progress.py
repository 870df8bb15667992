"""Turns MaxText's log messages of a training run into the few short lines that the console shows.

`Progress.line` takes one message and returns the line for it, or None: a step with its loss and speed, an evaluation,
a saved or restored checkpoint, or the end of compilation.
"""

from collections.abc import Callable
import math
import re
import time

from maxtext_mudd.assets import BYTE_TOKENIZER_FOLDER

_MAX_SECONDS_WITHOUT_LINE = 60.0


class Progress:
  """How many steps of a run are done, at what loss and speed.

  Attributes:
    steps: the number of steps of the complete run.
    done: the number of steps done so far, including those before the run resumed; None before the first message.
    status: loss, tokens per second and time left, for a progress bar.
  """

  def __init__(self, config, clock: Callable[[], float] = time.monotonic, first_step: int = 0):
    """
    Args:
      config: MaxText's configuration.
      clock: returns the current time in seconds.
      first_step: the number that MaxText's trainer gives the first step of a run.
    """
    self._first_number = first_step
    self._is_distillation = bool(getattr(config, "teacher_overrides", None))
    self.steps = config.steps
    self.done: int | None = None
    self.status = ""
    self._period = max(config.log_period, 1)
    self._devices = config.num_target_devices
    # With DPO the loss is not that of a token.
    self._in_bits_per_byte = config.tokenizer_path == str(BYTE_TOKENIZER_FOLDER) and not config.use_dpo
    self._clock = clock
    self._start_time = self._last_line_time = clock()
    self._first_step: tuple[int, float] | None = None  # the number of steps done at the first message, and its time
    self._tokens = 0.0  # the tokens trained on since the last line of a step
    self._speed = ""
    self._saved_steps: set[str] = set()

  def line(self, message: str) -> str | None:
    """The line for a message of MaxText or Orbax; None if the console does not show the message.

    Steps are counted from 1, while MaxText's pre-training numbers them from 0. A step has a line if it is the first or
    the last one, if `log_period` divides its number, or if there was no line of a step for a minute. Checkpoints keep
    MaxText's numbers, which are the names of their folders.
    """
    if "completed step: " in message or "activation step: " in message:
      return self._step(message)
    if self._is_distillation and (step := re.match(r"Train step (\d+) training loss: ([\d.]+)", message)):
      return self._step(f"completed step: {step[1]}, loss: {float(step[2]):.3f}")  # MaxText's line has no loss
    if message.startswith("Completed eval after train step "):
      return self._evaluation(message)
    if saved := re.search(r"^Saved a checkpoint at step (\d+)|Finished saving checkpoint .* to `.*/(\d+)`", message):
      step = saved[1] or saved[2]
      if step not in self._saved_steps:
        self._saved_steps.add(step)
        return f"saved checkpoints/{step}"
    elif resumed := re.match(r"(?:restoring from this run's directory|Restored params from) step:? (\d+)", message):
      return f"resuming from checkpoints/{resumed[1]}"
    elif compiled := re.match(r"\[train\] Total estimated memory size: ([\d.]+ GB)", message):
      line = f"compiled after {_duration(self._clock() - self._start_time)}"
      return line if compiled[1] == "0.0 GB" else f"{line}; a train step takes about {compiled[1]} of memory"
    return None

  def end(self) -> str | None:
    """The line for the end of a run; None if some steps are not done."""
    if self.done != self.steps:
      return None
    return f"finished step {self.done}/{self.steps} after {_duration(self._clock() - self._start_time)}"

  def _step(self, message: str) -> str | None:
    fields = dict(part.split(": ", 1) for part in message.split(", ") if ": " in part)
    number = fields.get("completed step") or fields["completed profiler activation/deactivation step"]
    now, self.done = self._clock(), int(number) + 1 - self._first_number
    # MaxText does not log this field while the batch size ramps up. The first step includes compilation.
    if "Tokens/s/device" in fields and self._first_step:
      self._tokens += self._devices * float(fields["Tokens/s/device"]) * float(fields["seconds"])
    self._first_step = self._first_step or (self.done, now)
    first, first_time = self._first_step
    seconds_without_line = now - self._last_line_time
    is_shown = (
      self.done in (first, self.steps)
      or self.done % self._period == 0
      or seconds_without_line >= _MAX_SECONDS_WITHOUT_LINE
    )
    if is_shown:
      # MaxText's own speed only measures how long it takes to hand a step over to the device.
      self._speed = f"{self._tokens / seconds_without_line:,.0f} tokens/s" if self._tokens else ""
      self._tokens, self._last_line_time = 0.0, now
    parts = [f"loss {fields['loss']}", *([self._speed] if self._speed else [])]
    if self.done > first and self.done < self.steps:
      parts.append(f"{_duration((now - first_time) / (self.done - first) * (self.steps - self.done))} left")
    self.status = ", ".join(parts)
    return f"step {self.done:>{len(str(self.steps))}}/{self.steps}  " + "  ".join(parts) if is_shown else None

  def _evaluation(self, message: str) -> str:
    fields = dict(part.split("=", 1) for part in message.split(", ") if "=" in part)
    done = int(re.search(r"\d+", message)[0]) + 1 - self._first_number
    loss, perplexity = float(fields["loss"]), float(fields["perplexity"])
    # MaxText prints both with three decimals, so the perplexity has more digits. Tunix' perplexity is the mean of all
    # evaluations so far.
    if math.isfinite(perplexity) and abs(math.log(perplexity) - loss) <= 1.1e-3:
      loss = math.log(perplexity)
    if self._in_bits_per_byte:
      return f"eval after step {done}: {loss / math.log(2):.3f} bits per byte"
    return f"eval after step {done}: loss {loss:.3f}"


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes:02} min"
  return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
