"""Splits a layer of MaxText that computes two blocks in a row into two modules, one for each block.

The layer of gemma2 computes a local block and then a global one. Its modules are named `*_local` and `*_global`.
`split` replaces them by two modules, `half_0` and `half_1`. Each half runs the stock `__call__` of the layer, in which
the modules of the other half do nothing: norms return their input, attention and feed-forward block return `Nothing`.
So the input of the half may be `Streams`, in either half.
"""

from collections.abc import Callable
import functools

from flax import nnx
import jax

from maxtext_mudd.blocks import Cycle
from maxtext_mudd.blocks.classes import change_class


@jax.tree_util.register_static
class Nothing:
  """The output of a sublayer of the other half: `Nothing() + x` is x itself, of whatever type."""

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
      module, _, suffix = name.rpartition("_")
      if suffix == side:
        return getattr(self, module)
      return _without_effect(module) if suffix in sides else object.__getattribute__(self, name)  # which raises

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
