"""MUDD connections (MUDDFormer, arXiv 2502.12170) for stock MaxText.

`from_pretrained` and `from_run` load a model, `logits` and `generate` run it, `inspect` shows what it computes inside.
Training and the other commands are modules: python3 -m maxtext_mudd.train, train_compile, decode, evaluate, analyze,
convert, complexity, cluster, report, corpus, vit.train.
"""

__version__ = "0.1.0"
__all__ = ["from_pretrained", "from_run", "generate", "inspect", "logits"]


def __getattr__(name: str):
  """Imports a public function on first access, so that the commands can refuse mistakes without importing JAX."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from maxtext_mudd import plugin

  plugin.install()
  from maxtext_mudd.inference import generation, inspection, pretrained

  return getattr({"generate": generation, "inspect": inspection}.get(name, pretrained), name)
