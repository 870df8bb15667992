"""Changing the class of a module that MaxText has built."""

from flax import nnx


def change_class(module: nnx.Module, subclass: type[nnx.Module]) -> None:
  """Makes a module that is built already an instance of `subclass`, by assigning its `__class__`.

  MaxText 0.2.5 builds attention, norms and feed-forward blocks inside its layers, with no argument for their classes.
  Wrapping one of them would put another name into the paths of its parameters. This way it keeps its parameters, their
  paths, initial values and sharding; only methods change.

  Limits: The subclass must add no state, since its `__init__` does not run. JAX compiles again for another class, so a
  subclass that a function makes must come from a cache. `isinstance` holds as before; a comparison of `type(module)`
  with the stock class fails.

  Args:
    module: a submodule of a decoder or of one of its layers.
    subclass: overrides methods of the module's present class, and not `__init__`.

  Raises:
    TypeError: `subclass` is no subclass of the module's class, or has an `__init__` of its own.
  """
  stock = type(module)
  if not issubclass(subclass, stock) or subclass.__init__ is not stock.__init__:
    raise TypeError(
      f"{subclass.__name__} cannot replace the class {stock.__name__} of a module: it must be a subclass of that, "
      "without an __init__ of its own."
    )
  module.__class__ = subclass
