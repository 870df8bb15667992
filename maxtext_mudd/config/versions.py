"""Checks that the installed MaxText is a version that this package knows, and that a compiler for TPUs is installed.

It imports neither JAX nor a module of MaxText.
"""

import importlib.util
import os

KNOWN = ("0.2.5",)


class UnknownMaxText(ImportError):
  """MaxText is missing or has changed. The message is one sentence that names the version to install."""


def check() -> None:
  """Raises UnknownMaxText unless a known version is installed."""
  try:
    import maxtext
  except ModuleNotFoundError:
    raise UnknownMaxText(f"maxtext is not installed; install maxtext=={KNOWN[-1]}.") from None
  if maxtext.__version__ not in KNOWN:
    raise UnknownMaxText(
      f"maxtext {maxtext.__version__} is installed, and maxtext-mudd knows {', '.join(KNOWN)} only; "
      f"install maxtext=={KNOWN[-1]}."
    )


def missing_libtpu() -> str | None:
  """A sentence if no compiler for TPUs is installed, otherwise None. JAX would only say it in the middle of a trace."""
  if importlib.util.find_spec("libtpu") or os.path.isfile(os.environ.get("TPU_LIBRARY_PATH", "")):
    return None
  return "libtpu, which compiles for TPUs, is not installed; on Linux: python3 -m pip install -r requirements/tpu.txt."
