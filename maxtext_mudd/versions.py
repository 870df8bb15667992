"""Which MaxText this package knows; imports nothing of it but the version."""

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
