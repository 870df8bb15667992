"""Reads MaxText's log messages of a training run, and says in one short line what a person wants to know of them."""

from collections.abc import Callable
import math
import re
import time

from maxtext_mudd.assets import BYTE_TOKENIZER_FOLDER

_LONGEST_SILENCE = 60.0  # seconds


class Progress:
  """How far a run has come.

  Attributes:
    steps: number of steps that the run has when it is complete.
    done: number of completed steps, those before a resumption included; None before the first one.
    status: loss, tokens per second and time left, for a progress bar.
  """

  def __init__(self, config, clock: Callable[[], float] = time.monotonic):
    self.steps = config.steps
    self.done: int | None = None
    self.status = ""
    self._period = max(config.log_period, 1)
    self._devices = config.num_target_devices
    self._in_bits_per_byte = config.tokenizer_path == str(BYTE_TOKENIZER_FOLDER)
    self._clock = clock
    self._start = self._spoken = clock()
    self._first: tuple[int, float] | None = None  # number of completed steps, time
    self._tokens = 0.0  # trained on since the last line of a step
    self._speed = ""
    self._saved: set[str] = set()

  def line(self, message: str) -> str | None:
    """The line for a message of MaxText or Orbax; None if the message is for the log file alone.

    Steps are counted from 1 where MaxText numbers them from 0. A step has a line if it is the first or the last one, if
    `log_period` divides its number, or if there was no line for a minute. Checkpoints keep MaxText's numbers, which
    are the names of their folders.
    """
    if "completed step: " in message or "activation step: " in message:
      return self._step(message)
    if message.startswith("Completed eval after train step "):
      return self._evaluation(message)
    if saved := re.search(r"^Saved a checkpoint at step (\d+)|Finished saving checkpoint .* to `.*/(\d+)`", message):
      step = saved[1] or saved[2]
      if step not in self._saved:
        self._saved.add(step)
        return f"saved checkpoints/{step}"
    elif resumed := re.match(r"restoring from this run's directory step (\d+)", message):
      return f"resuming from checkpoints/{resumed[1]}"
    elif compiled := re.match(r"\[train\] Total estimated memory size: ([\d.]+ GB)", message):
      line = f"compiled after {_duration(self._clock() - self._start)}"
      return line if compiled[1] == "0.0 GB" else f"{line}; a train step takes about {compiled[1]} of memory"
    return None

  def end(self) -> str | None:
    """The line for the end of a run that completed its steps."""
    if self.done != self.steps:
      return None
    return f"finished step {self.done}/{self.steps} after {_duration(self._clock() - self._start)}"

  def _step(self, message: str) -> str | None:
    fields = dict(part.split(": ", 1) for part in message.split(", ") if ": " in part)
    number = fields.get("completed step") or fields["completed profiler activation/deactivation step"]
    now, self.done = self._clock(), int(number) + 1
    if "Tokens/s/device" in fields and self._first:  # not while batches grow
      self._tokens += self._devices * float(fields["Tokens/s/device"]) * float(fields["seconds"])
    self._first = self._first or (self.done, now)
    first, since = self._first
    is_shown = (
      self.done in (first, self.steps) or self.done % self._period == 0 or now - self._spoken >= _LONGEST_SILENCE
    )
    if is_shown:
      # By the clock: MaxText's own speed is of the time that it takes to hand a step over to the device.
      self._speed = f"{self._tokens / (now - self._spoken):,.0f} tokens/s" if self._tokens else ""
      self._tokens, self._spoken = 0.0, now
    parts = [f"loss {fields['loss']}", *([self._speed] if self._speed else [])]
    if self.done > first and self.done < self.steps:
      parts.append(f"{_duration((now - since) / (self.done - first) * (self.steps - self.done))} left")
    self.status = ", ".join(parts)
    return f"step {self.done:>{len(str(self.steps))}}/{self.steps}  " + "  ".join(parts) if is_shown else None

  def _evaluation(self, message: str) -> str:
    fields = dict(part.split("=", 1) for part in message.split(", ") if "=" in part)
    done = int(re.search(r"\d+", message)[0]) + 1
    loss, perplexity = float(fields["loss"]), float(fields["perplexity"])
    if math.isfinite(perplexity):  # both have three decimals, and this one more digits
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
