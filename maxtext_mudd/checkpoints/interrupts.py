"""Turns SIGINT and SIGTERM into a KeyboardInterrupt that no library can swallow or replace by another error."""

import signal
import threading


class Interrupts:
  """A context in which SIGINT and SIGTERM raise KeyboardInterrupt.

  If a library catches that and goes on, `check` raises it again. If a library raises another error instead, the end of
  the context raises KeyboardInterrupt. Contexts can be nested. Outside the main thread the context changes nothing,
  because Python delivers signals to the main thread only.
  """

  def __init__(self):
    self._was_interrupted = self._ignores_signals = False
    self._outer = None

  def check(self) -> None:
    """Raises KeyboardInterrupt if a signal has come."""
    if self._was_interrupted:
      raise KeyboardInterrupt

  def ignore_further(self) -> None:
    """Ignores signals from now on, so that what follows is completed.

    Raises:
      KeyboardInterrupt: a signal has come before.
    """
    self._ignores_signals = True
    self.check()
    if self._outer:
      self._outer.ignore_further()

  def __call__(self, number, frame) -> None:
    """Handles a signal."""
    if not self._ignores_signals:
      self._remember()
      raise KeyboardInterrupt

  def _remember(self) -> None:
    self._was_interrupted = True
    if self._outer:
      self._outer._remember()

  def __enter__(self) -> "Interrupts":
    is_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if is_main_thread}
    self._outer = next((handler for handler in handlers.values() if isinstance(handler, Interrupts)), None)
    if self._outer:
      self._outer.check()
    # Ignored signals stay ignored: a shell script ignores Ctrl-C for what it starts in the background.
    self._replaced = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in self._replaced:
      signal.signal(number, self)
    return self

  def __exit__(self, _, error: BaseException | None, __) -> None:
    for number, handler in self._replaced.items():
      signal.signal(number, handler)
    if self._was_interrupted and error is not None and not isinstance(error, KeyboardInterrupt):
      raise KeyboardInterrupt from error
