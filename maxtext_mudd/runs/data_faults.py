"""What is wrong with data that cannot be read."""

from maxtext_mudd import errors


def explain(config, error: Exception) -> str:
  """One sentence, without a final stop, for the exception of a data iterator."""
  return f"the data cannot be read ({errors.brief(error)})"
