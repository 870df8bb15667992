"""Runs a stock MaxText entry point with MUDD connections installed; what the launchers share."""

from collections.abc import Callable
import gc
import sys

from absl import app

from maxtext_mudd import plugin


def launch(main: Callable[[list[str]], None], check: Callable | None = None) -> None:
  """Runs `main` as MaxText's own script does.

  Args:
    main: of a stock MaxText module.
    check: called with the configuration as soon as it is read; raises ConfigError for what cannot work.

  A ConfigError ends the process with its one sentence on stderr and status 2.
  """
  plugin.install(plugin.Reading(check=check, on_error=_exit))
  try:
    app.run(main)
  finally:
    # MaxText's data iterators clean up when collected, and cannot any more once the interpreter shuts down.
    gc.collect()


def _exit(error: Exception) -> None:
  print(f"maxtext-mudd: {error}", file=sys.stderr)
  sys.exit(2)
