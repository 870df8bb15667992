"""One depth-wise aggregate with static or dynamic weights (DenseFormer, DDFormer, MUDD)."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from maxtext_mudd import kernels
from maxtext_mudd.connections.base import Site
from maxtext_mudd.connections.mesh import source_sharding
from maxtext_mudd.connections.mudd import sites
from maxtext_mudd.connections.norms import rms_norm

POST_NORM_INIT = 1e-3  # scale of the post-norm at the start (paper, Eq. 10)
_OF_MLP = ("w1", "w2", "weight_norm_scale", "weight_scale")  # the parameters that make dynamic weights from X_i


def share_mlps(decoder: nnx.Module) -> None:
  """Gives aggregates whose sites name the same MLP its parameters, those of the first of them. NNX has such a parameter
  once, under the first of its paths in alphabetical order; its gradient is the sum over the aggregates."""
  aggregates = [x for _, x in nnx.iter_modules(decoder) if isinstance(x, DepthAggregate) and x.site.mlp]
  first = {}
  for aggregate in sorted(aggregates, key=lambda x: x.site.block):
    owner = first.setdefault(aggregate.site.mlp, aggregate)
    for name in _OF_MLP:
      if hasattr(owner, name):
        setattr(aggregate, name, getattr(owner, name))


class DepthAggregate(nnx.Module):
  """One DA (paper, Eqs. 5, 6 and 10): from the sources to the streams of the next block.

  Parameters, in `weight_dtype`: `w1` [D,K] from N(0, 1/D), `w2` [K,C,N] zero, `a` [C,N] one at the newest source. `a`
  is zero with pre- and post-norm, which add X_i after the sum, and with the post-norm alone if `mudd_static_start` is
  "zero". In these cases, and without norms, the model starts as the plain Transformer. With one of the norms and `a`
  as released, neither this model nor the released code does. Norm scales [D] where `mudd_weight_norm_scale` or
  `mudd_post_norm` ask for them; `weight_scale` [C,N] one where `mudd_weight_scale` is on. Cap and scale of dynamic
  weights are practice of the authors since the paper.
  """

  def __init__(self, config, site: Site, mesh: jax.sharding.Mesh, rngs: nnx.Rngs):
    self.config = config
    self.site = site
    self.mesh = mesh
    ways, sources = site.ways, len(site.sources)
    dtype = config.weight_dtype
    self.keeps_newest = not (config.mudd_pre_norm or config.mudd_post_norm)
    if config.mudd_dynamic:
      init = jax.nn.initializers.normal(stddev=config.emb_dim**-0.5)
      shape = (config.emb_dim, site.hidden)
      self.w1 = nnx.Param(init(rngs.params(), shape, dtype), out_sharding=("embed", None))
      self.w2 = nnx.Param(jnp.zeros((site.hidden, ways, sources), dtype), out_sharding=(None, None, None))
      if config.mudd_weight_norm_scale:
        self.weight_norm_scale = nnx.Param(jnp.ones((config.emb_dim,), dtype), out_sharding=("norm",))
      if config.mudd_weight_scale:
        self.weight_scale = nnx.Param(jnp.ones((ways, sources), dtype), out_sharding=(None, None))
    if config.mudd_static:
      self.a = nnx.Param(self._initial_static(dtype), out_sharding=(None, None))
    if config.mudd_post_norm:
      for stream in site.streams:
        if sites.is_post_normed(config, stream):
          norm = rms_norm(config, rngs, scale_init=jax.nn.initializers.constant(POST_NORM_INIT))
          setattr(self, f"post_norm_{stream}", norm)

  def _initial_static(self, dtype, column=-1) -> Float[Array, "C N"]:
    a = jnp.zeros((self.site.ways, len(self.site.sources)), dtype)
    return a if sites.starts_at_zero(self.config) else a.at[:, column].set(1)

  def weights(self, output: Float[Array, "B T D"], column: int | Array, visible=None) -> kernels.Weights:
    """See `base.Aggregate`. The scale of the norm before W1 is folded into W1."""
    config = self.config
    a = self.a[...] if config.mudd_static else self._initial_static(config.weight_dtype, column)
    if not config.mudd_dynamic:
      return a
    w1 = self.w1[...]
    if config.mudd_weight_norm_scale:
      w1 = self.weight_norm_scale[...][:, None] * w1
    has_scale = config.mudd_weight_scale
    return kernels.WeightMLP(
      self._by_width(w1),
      self.w2[...],
      a,
      output,
      self.weight_scale[...] if has_scale else None,
      cap=1.0 if has_scale else config.mudd_weight_cap or None,
      activation=config.mudd_activation,
      epsilon=config.normalization_layer_epsilon,
    )

  def _by_width(self, w1: Float[Array, "D K"]) -> Float[Array, "D K"]:
    """W1, sharded over D as sources are. Otherwise the compiler would gather X_i, which is many times larger."""
    layout = source_sharding(self.config, self.mesh, (1, 1, w1.shape[0]))
    if layout is None or len(layout.spec) < 3 or layout.spec[2] is None:
      return w1
    return jax.lax.with_sharding_constraint(w1, NamedSharding(self.mesh, P(layout.spec[2], None)))

  def streams(self, sums: list[Float[Array, "B T D"]], output: Float[Array, "B T D"]) -> list[Float[Array, "B T D"]]:
    """The sums themselves, or with `mudd_post_norm` X_i plus each sum, post-normed where the stream has a norm."""
    if not self.config.mudd_post_norm:
      return list(sums)
    streams = []
    for stream, x in zip(self.site.streams, sums):
      if sites.is_post_normed(self.config, stream):
        x = getattr(self, f"post_norm_{stream}")(x)
      streams.append(x + output)
    return streams
