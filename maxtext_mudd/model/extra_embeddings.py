"""Further tables of token embeddings, which give depth connections more sources."""

from flax import nnx
import jax
from jaxtyping import Array, Float, Int

from maxtext_mudd.model.initializers import MuddEmbed
from maxtext_mudd.model.layer import connection_rngs


class ExtraEmbeddings(nnx.Module):
  """m tables beside the token embedder. Each is initialised, sharded and cast as the token embedder's.

  Parameters: `table_k/embedding` [V,D] for k = 1 to m, that of source -k.
  """

  def __init__(self, number: int, config, mesh: jax.sharding.Mesh, rngs: nnx.Rngs):
    self.number = number
    for k in range(1, number + 1):
      table = MuddEmbed(
        config.vocab_size,
        config.emb_dim,
        config,
        mesh,
        dtype=config.dtype,
        embedding_init=jax.nn.initializers.normal(stddev=1.0),  # as MaxText's Transformer draws the token embedder's
        rngs=connection_rngs(rngs, -k),
      )
      setattr(self, f"table_{k}", table)

  def __call__(self, tokens: Int[Array, "B T"], model_mode: str) -> tuple[Float[Array, "B T D"], ...]:
    """The sources -1 to -m."""
    return tuple(getattr(self, f"table_{k}")(tokens, model_mode) for k in range(1, self.number + 1))
