"""A layer of MaxText that runs two decoder layers in a row, as two modules that can be called one by one.

The layer of gemma2 has the modules of a local and of a global decoder layer, whose names end so. Each half is a module
of the same class with the modules of one of the two. Where the stock `__call__` reads a module of the other, a half
gives it a function that adds nothing: norms return their input, attention and feed-forward block return `Nothing`. So
the stock `__call__`, which does not change, computes one decoder layer, and what it takes or returns beside that layer
may be any pytree, such as `Streams`.
"""

from collections.abc import Callable
import functools

from flax import nnx
import jax

from maxtext_mudd.blocks import Cycle
from maxtext_mudd.blocks.classes import change_class


@jax.tree_util.register_static
class Nothing:
  """What a sublayer adds that is not there: `Nothing() + x` is x itself, of whatever type."""

  def __add__(self, x):
    return x


def split(layer: nnx.Module, cycle: Cycle) -> list[str]:
  """Gives a layer of MaxText, or a scanned stack of such layers, its halves in place of their modules.

  Returns:
    the attributes of the halves, in the order in which they run.
  """
  halves = [_half(layer, side, cycle.sides) for side in cycle.sides]
  for name in [name for name in vars(layer) if name.endswith(cycle.sides)]:
    delattr(layer, name)
  names = [f"{cycle.member}_{k}" for k, _ in enumerate(halves)]
  for name, half in zip(names, halves):
    setattr(layer, name, half)
  return names


def _half(layer: nnx.Module, side: str, sides: tuple[str, ...]) -> nnx.Module:
  half = nnx.clone(layer)
  for name in [name for name in vars(half) if name.endswith(sides)]:
    module = getattr(half, name)
    delattr(half, name)
    if name.endswith(side):
      setattr(half, name.removesuffix(f"_{side}"), module)
  change_class(half, _class_of_half(type(half), side, sides))
  return half


@functools.cache
def _class_of_half(layer_class: type[nnx.Module], side: str, sides: tuple[str, ...]) -> type[nnx.Module]:
  class Half(layer_class):
    """Has `self_attention` for `self_attention_local` if it is the local half, and so on."""

    def __getattr__(self, name):
      module, _, of = name.rpartition("_")
      if of == side:
        return getattr(self, module)
      return _without_effect(module) if of in sides else object.__getattribute__(self, name)  # which raises

    def sow(self, *args, **kwargs):
      if side == sides[-1]:  # MaxText records one value for each of its layers, of the output of both halves
        super().sow(*args, **kwargs)

  Half.__name__ = Half.__qualname__ = f"{side.capitalize()}HalfOf{layer_class.__name__}"
  return Half


def _without_effect(module: str) -> Callable:
  """What stands for a module of the other half."""
  if module == "self_attention":
    return lambda *args, **kwargs: (Nothing(), None)
  if module == "mlp":
    return lambda *args, **kwargs: Nothing()
  return lambda inputs, **kwargs: inputs
