"""SIGINT and SIGTERM, which libraries swallow at times."""

from collections.abc import Iterator
import contextlib
import signal
import threading


class _Notice:
  """A handler, which tells those that it stands for, too."""

  def __init__(self, seen: list[int], before):
    self.seen, self._before = seen, before

  def __call__(self, number, frame):
    self.seen.append(number)
    if isinstance(self._before, _Notice):
      self._before(number, frame)
    raise KeyboardInterrupt


@contextlib.contextmanager
def noticed(seen: list[int]) -> Iterator[None]:
  """Both raise KeyboardInterrupt inside, and are noted down in `seen`; in threads they do what they did before."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}
  if any(isinstance(handler, _Notice) and handler.seen for handler in before.values()):
    raise KeyboardInterrupt  # it was swallowed
  try:
    for number, handler in before.items():
      signal.signal(number, _Notice(seen, handler))
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
