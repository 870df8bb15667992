"""SIGINT and SIGTERM, which libraries swallow at times, or make other errors of."""

import signal
import threading


class Interrupts:
  """A context in which both raise KeyboardInterrupt, and which leaves with one whatever was made of it.

  It may lie in another. In threads signals do what they did before.
  """

  def __init__(self):
    self._seen = self._ended = False
    self._outer = None

  def check(self) -> None:
    """Raises KeyboardInterrupt where one was swallowed."""
    if self._seen:
      raise KeyboardInterrupt

  def end(self) -> None:
    """Lets what follows happen whatever signals come. Raises KeyboardInterrupt where one came before."""
    self._ended = True
    self.check()
    if self._outer:
      self._outer.end()

  def __call__(self, number, frame) -> None:
    """Handles a signal."""
    if not self._ended:
      self._note()
      raise KeyboardInterrupt

  def _note(self) -> None:
    self._seen = True
    if self._outer:
      self._outer._note()

  def __enter__(self) -> "Interrupts":
    heard = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if heard}
    self._outer = next((handler for handler in before.values() if isinstance(handler, Interrupts)), None)
    if self._outer:
      self._outer.check()
    # What is ignored stays so, as Ctrl-C is by what a script starts in the background.
    self._before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in self._before:
      signal.signal(number, self)
    return self

  def __exit__(self, _, error: BaseException | None, __) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if self._seen and error is not None and not isinstance(error, KeyboardInterrupt):
      raise KeyboardInterrupt from error
