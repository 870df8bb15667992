"""What flows from block to block: the block outputs so far."""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
  """Outputs X_0 (the embedding) to X_i, append-only. Not a tuple: stock layers unpack tuples.

  Attributes:
    sources: what the aggregates mix, one [B,T,D] array each, oldest first; pre-normed where `mudd_pre_norm` is on.
    output: X_i as the block returned it, [B,T,D]; the same array as the last source unless pre-normed.
  """

  sources: tuple[Float[Array, "B T D"], ...]
  output: Float[Array, "B T D"]

  def append(self, source, output) -> "History":
    return History((*self.sources, source), output)
