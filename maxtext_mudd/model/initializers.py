"""Initial values of embeddings and kernels by the rule that `mudd_init` names.

Norms, biases and connections keep their stock initial values. A rule gives the distribution of a matrix:

xavier_normal   N(0, 2/(fan_in + fan_out)): the paper
normal          N(0, mudd_init_std²), 0.006 in the authors' released JAX code
pythia          N(0, 2/(5D)), and N(0, (2/(L·√D))²) for matrices that write to the residual stream:
                GPT-NeoX's small_init and wang_init, which Pythia and therefore MUDDPythia use
"""

import math
import zlib

from flax import nnx
import jax
from maxtext.layers.embeddings import Embed

from maxtext_mudd import blocks, connections
from maxtext_mudd.blocks import stacks

_RESIDUAL_WRITERS = ("out", "wo")
_EXPERT_KERNELS = ("wi_0", "wi_1", "wo")


def is_stock(config) -> bool:
  return getattr(config, "mudd_init", "stock") == "stock"


def deviation(config, name: str, size: int) -> float:
  """Standard deviation of one embedding or kernel.

  Args:
    config: names the rule and the sizes; any rule but `stock`.
    name: name of the module or parameter, such as "query" or "wo".
    size: number of entries of the matrix, for one layer and one expert. It is D times another width.
  """
  width = config.emb_dim
  if config.mudd_init == "normal":
    return config.mudd_init_std
  if config.mudd_init == "pythia":
    return 2 / (config.num_decoder_layers * math.sqrt(width)) if name in _RESIDUAL_WRITERS else math.sqrt(0.4 / width)
  return math.sqrt(2 / (width + size / width))


def initialise(decoder: nnx.Module, config, rngs: nnx.Rngs) -> None:
  """Redraws the decoder's embeddings and kernels where `mudd_init` names a rule, each from a random key that follows
  from its path. Then scales the kernels that write to the residual stream, where the family of connections asks for it.
  """
  if not is_stock(config):
    _draw(decoder, config, rngs)
  scale = connections.family(config).output_init_scale(config) if getattr(config, "mudd", False) else 1.0
  if scale != 1.0:
    state = nnx.state(decoder, nnx.Param)
    for path, param in nnx.to_flat_state(state):
      if _module_name(tuple(map(str, path))) in _RESIDUAL_WRITERS:
        param.set_value(scale * param.get_value())
    nnx.update(decoder, state)


def _module_name(path: tuple[str, ...]) -> str | None:
  """The name of the module that an embedding or kernel belongs to; that of a kernel of experts, which has no module.
  None for other parameters, such as biases and all of connections."""
  if "connection" in path:
    return None
  if path[-1] in _EXPERT_KERNELS:
    return path[-1]
  return path[-2] if path[-1] in ("kernel", "embedding") else None


def _draw(decoder: nnx.Module, config, rngs: nnx.Rngs) -> None:
  root = jax.random.fold_in(rngs.params.key[...], zlib.crc32(b"mudd_init"))
  # With `use_qk_norm`, MaxText leaves out the factor 1/sqrt(head_dim), also in blocks that ignore this key.
  scales_query_kernel = blocks.spec(config).scales_query_kernel and not config.use_qk_norm
  state = nnx.state(decoder, nnx.Param)
  for path, param in nnx.to_flat_state(state):
    path = tuple(map(str, path))
    name = _module_name(path)
    if name is None:
      continue
    value = param.get_value()
    copies = config.num_experts if path[-1] in _EXPERT_KERNELS else 1
    stack = stacks.of_path(config, path) if stacks.are_stacked(config) else None
    if stacks.is_of_stages(path):  # of all stages and, in plain models, of all repeats
      copies *= config.pipeline_parallel_layers // stacks.arrays_per_stage(config)
    elif stack is not None:
      copies *= len(stack.blocks)
    std = deviation(config, name, value.size // copies)
    if name == "query" and scales_query_kernel:
      std /= math.sqrt(config.head_dim)
    key = jax.random.fold_in(root, zlib.crc32("/".join(path).encode()))
    param.set_value((std * jax.random.normal(key, value.shape)).astype(value.dtype))
  nnx.update(decoder, state)


class MuddEmbed(Embed):
  """MaxText's embedding, with initial values by the rule of `mudd_init`."""

  def __init__(self, num_embeddings, num_features, config, mesh, **kwargs):
    if not is_stock(config):
      std = deviation(config, "embedding", num_embeddings * num_features)
      kwargs["embedding_init"] = jax.nn.initializers.normal(std)
    super().__init__(num_embeddings, num_features, config, mesh, **kwargs)
