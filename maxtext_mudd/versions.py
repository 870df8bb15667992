"""Which MaxText this package knows, and whether there is a compiler for TPUs; imports nothing but MaxText's version."""

import importlib.util
import os

KNOWN = ("0.2.5",)


class UnknownMaxText(ImportError):
  """MaxText is missing, or is not one that this package knows; one sentence that names what to install."""


def check() -> None:
  """Raises UnknownMaxText unless a known version is installed."""
  try:
    import maxtext
  except ModuleNotFoundError:
    raise UnknownMaxText(f"maxtext is not installed; install maxtext=={KNOWN[-1]}.") from None
  if maxtext.__version__ not in KNOWN:
    raise UnknownMaxText(
      f"maxtext {maxtext.__version__} is installed; maxtext-mudd knows {', '.join(KNOWN)}: "
      f"install maxtext=={KNOWN[-1]}."
    )


def missing_libtpu() -> str | None:
  """One sentence if nothing compiles for TPUs here, which JAX says in the middle of a trace."""
  if importlib.util.find_spec("libtpu") or os.path.isfile(os.environ.get("TPU_LIBRARY_PATH", "")):
    return None
  return "libtpu, which compiles for TPUs, is not installed; on Linux: python3 -m pip install -r requirements/tpu.txt."
