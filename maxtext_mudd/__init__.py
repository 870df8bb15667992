"""MUDD connections (MUDDFormer, arXiv 2502.12170) for stock MaxText."""

__version__ = "0.1.0"
__all__ = ["from_pretrained", "from_run", "generate", "logits"]


def __getattr__(name: str):
  """Not imported before it is asked for: the commands answer mistakes without JAX."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from maxtext_mudd import plugin

  plugin.install()
  from maxtext_mudd.inference import generation, pretrained

  return getattr(generation if name == "generate" else pretrained, name)
