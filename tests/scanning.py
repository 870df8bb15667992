"""Models of scanned layers and of single ones: their cases, random values, losses and gradients, compared."""

from flax import nnx
import jax
from maxtext.trainers.pre_train import train
import numpy as np

from maxtext_mudd.checkpoints import layout
from tests import models
from tests.blocks import BLOCKS, OTHERS, SINGLE
from tests.placements import BLOCKS as IRREGULAR_BLOCKS
from tests.placements import IRREGULAR, OF_EXTRA

# Single and scanned layers add in another order. In float32 they may differ by RELATIVE of the largest logit and of the
# norm of all gradients together, and by OF_TENSOR of the largest entry of one gradient. A model that magnifies rounding
# more, as by a sum that cancels, may differ by so many times what moving all parameters to neighbouring numbers does.
RELATIVE, OF_TENSOR = 1e-6, 4e-6
OF_ROUNDING, OF_ROUNDING_TENSOR = 2, 10  # at most 0.8 and 3.2 were seen, in five of the cases
ZERO = 1e-7  # of the norm of all gradients together: what rounding leaves of a gradient that is zero
SMALL = {"base_num_decoder_layers": 3}
BOTH_NORMS = {"mudd_pre_norm": True, "mudd_post_norm": True}
CONNECTED_MTP = {"mudd_mtp": "connected", "mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3}

EXTRA = {"mudd_extra_embeddings": 4, "mudd_embedding_groups": 2}
PLACEMENTS = {"base_num_decoder_layers": IRREGULAR_BLOCKS, "mudd_placements": IRREGULAR}
OF_SUBLAYERS = {
  "hyper-connections": {"depth_connection": "hyper_connections"},
  "mHC": {"depth_connection": "mhc"},
  "AttnRes": {"depth_connection": "attnres", "mudd_attnres_block": 2},
  "DCA": {"depth_connection": "dca"},
}
DCA_SUM = "DCA with the sum of middle sources, groups"
CASES = {
  "MUDD": SMALL,
  "both norms": {"base_num_decoder_layers": 4, **BOTH_NORMS},
  "2x2, and norms of block 1": {
    "base_num_decoder_layers": 5,
    "mudd_source_dilation": 2,
    "mudd_block_period": 2,
    "mudd_first_block_norms": "separate",
  },
  "2x2, both norms": {"base_num_decoder_layers": 5, "mudd_source_dilation": 2, "mudd_block_period": 2, **BOTH_NORMS},
  "window, one way": {"base_num_decoder_layers": 4, "mudd_ways": 1, "mudd_window": 2},
  "one way, norms of block 1": {**SMALL, "mudd_ways": 1, "mudd_first_block_norms": "separate"},
  "two streams": {**SMALL, "mudd_dense_streams": "qv", "mudd_weight_norm_scale": True},
  "residual stream, in the upper half": {
    "base_num_decoder_layers": 4,
    "mudd_dense_streams": "r",
    "mudd_depth_start": 0.5,
  },
  "capped weights, fused": {**SMALL, "mudd_weight_cap": 0.3, "mudd_kernel": "pallas_interpret"},
  "scaled weights, 2x2": {
    "base_num_decoder_layers": 4,
    "mudd_source_dilation": 2,
    "mudd_block_period": 2,
    "mudd_weight_scale": True,
  },
  "placements": PLACEMENTS,
  "placements, both norms": {**PLACEMENTS, **BOTH_NORMS, "mudd_post_norm_streams": "qkvr"},
  "placements, post-norm, groups": {
    **PLACEMENTS,
    "mudd_post_norm": True,
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
  },
  "placements, pre-norm": {**PLACEMENTS, "mudd_pre_norm": True},
  "placements, scaled weights": {**PLACEMENTS, "mudd_weight_scale": True, "mudd_weight_norm_scale": True},
  "placements, static": {
    **PLACEMENTS,
    "mudd_placements": [{"block": 2, "sources": "all", "streams": "v"}, {"block": 4, "sources": "all", "streams": "r"}],
    "mudd_dynamic": False,
  },
  "placements, fused": {**PLACEMENTS, **BOTH_NORMS, "mudd_kernel": "pallas_interpret"},
  "extra embeddings": {**SMALL, **EXTRA},
  "extra embeddings, 2x2, both norms": {
    **EXTRA,
    "base_num_decoder_layers": 5,
    "mudd_source_dilation": 2,
    "mudd_block_period": 2,
    **BOTH_NORMS,
  },
  "extra embeddings, fused, FFN groups": {
    **EXTRA,
    "base_num_decoder_layers": 4,
    "mudd_kernel": "pallas_interpret",
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
  },
  "extra embeddings, placements": {
    "base_num_decoder_layers": 4,
    "mudd_extra_embeddings": 3,
    "mudd_placements": OF_EXTRA,
    "mudd_pre_norm": True,
  },
  "static": {**SMALL, "mudd_dynamic": False},
  "dynamic": {**SMALL, "mudd_static": False},
  "dynamic, both norms": {**SMALL, "mudd_static": False, **BOTH_NORMS},
  "pre-norm": {"base_num_decoder_layers": 4, "mudd_block_period": 3, "mudd_pre_norm": True},
  "one block": {"base_num_decoder_layers": 1},
  "a buffer of two parts": {"base_num_decoder_layers": 9, **BOTH_NORMS},
  "groups": {
    "base_num_decoder_layers": 5,
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
    **BOTH_NORMS,
  },
  "plain, groups": {
    "base_num_decoder_layers": 4,
    "depth_connection": "residual",
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
  },
  "hyper-connections": {"base_num_decoder_layers": 4, "depth_connection": "hyper_connections"},
  "hyper-connections, static part fixed": {
    "base_num_decoder_layers": 3,
    "depth_connection": "hyper_connections",
    "mudd_expansion_rate": 3,
    "mudd_static": False,
  },
  "hyper-connections, groups": {
    "base_num_decoder_layers": 4,
    "depth_connection": "hyper_connections",
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
    "decoder_block": "gpt3",
    **BLOCKS["gpt3"][0],
  },
  "mHC": {"base_num_decoder_layers": 3, "depth_connection": "mhc"},
  "mHC of permutations, groups": {
    "base_num_decoder_layers": 4,
    "depth_connection": "mhc",
    "mudd_expansion_rate": 3,
    "mudd_mhc_mixing": "permutations",
    "mudd_mhc_end": "sum",
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
  },
  "AttnRes": {"base_num_decoder_layers": 3, "depth_connection": "attnres"},
  "AttnRes of blocks of 2": {"base_num_decoder_layers": 4, "depth_connection": "attnres", "mudd_attnres_block": 2},
  "AttnRes of blocks of 3": {"base_num_decoder_layers": 4, "depth_connection": "attnres", "mudd_attnres_block": 3},
  "AttnRes of blocks of 4, fused, groups": {
    "base_num_decoder_layers": 4,
    "depth_connection": "attnres",
    "mudd_attnres_block": 4,
    "mudd_kernel": "pallas_interpret",
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
  },
  "AttnRes of blocks of 3, of heads, with a value route": {
    "base_num_decoder_layers": 4,
    "depth_connection": "attnres",
    "mudd_attnres_block": 3,
    "mudd_attnres_heads": 4,
    "mudd_attnres_value_route": True,
  },
  "AttnRes with a value route, fused": {
    "base_num_decoder_layers": 3,
    "depth_connection": "attnres",
    "mudd_attnres_block": 2,
    "mudd_attnres_value_route": True,
    "mudd_kernel": "pallas_interpret",
  },
  "DCA": {"base_num_decoder_layers": 3, "depth_connection": "dca"},
  "DCA, fused": {"base_num_decoder_layers": 3, "depth_connection": "dca", "mudd_kernel": "pallas_interpret"},
  "DCA with a sum of middle sources, fused": {
    "base_num_decoder_layers": 4,
    "depth_connection": "dca",
    "mudd_dca_sources": "middle_sum",
    "mudd_dca_k": 1,
    "mudd_kernel": "pallas_interpret",
  },
  "GRN-v1, first and last": {
    "base_num_decoder_layers": 5,
    "depth_connection": "dca",
    "mudd_dca_weights": "v1",
    "mudd_dca_sources": "first_and_last",
    "mudd_dca_k": 1,
  },
  DCA_SUM: {
    "base_num_decoder_layers": 5,
    "depth_connection": "dca",
    "mudd_dca_sources": "middle_sum",
    "mudd_dca_k": 2,
    "mudd_ffn_reallocation": True,
    "mudd_ffn_groups": 2,
    "mudd_ffn_round_to": 8,
  },
  "fused": {**SMALL, **BOTH_NORMS, "mudd_kernel": "pallas_interpret"},
  "fused, 2x2": {
    "base_num_decoder_layers": 4,
    "mudd_source_dilation": 2,
    "mudd_block_period": 2,
    **BOTH_NORMS,
    "mudd_kernel": "pallas_interpret",
  },
  "blocks first in parameters": {**SMALL, **BOTH_NORMS, "param_scan_axis": 0},
  "multi-token prediction": {**SMALL, **BOTH_NORMS, "mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1},
  **{
    f"{family}, multi-token prediction": {
      **SMALL,
      "depth_connection": family,
      "mtp_num_layers": 1,
      "mtp_loss_scaling_factor": 0.1,
    }
    for family in ("attnres", "dca", "mhc")
  },
  "multi-token prediction, connected": {**SMALL, **BOTH_NORMS, **CONNECTED_MTP},
  "two MTP blocks, connected, placements": {**PLACEMENTS, **CONNECTED_MTP, "mtp_num_layers": 2},
  "multi-token prediction, connected, fused": {
    **SMALL,
    **CONNECTED_MTP,
    "mudd_ways": 1,
    "mudd_window": 2,
    "mudd_kernel": "pallas_interpret",
  },
  "multi-token prediction, connected, extra embeddings": {**SMALL, **CONNECTED_MTP, **EXTRA, **BOTH_NORMS},
  "multi-token prediction, connected, static": {**SMALL, **CONNECTED_MTP, "mudd_dynamic": False},
  "multi-token prediction, connected, pairs of layers": {
    "decoder_block": "gemma2",
    **OTHERS["gemma2"],
    **BOTH_NORMS,
    **CONNECTED_MTP,
  },
  "hyper-connections, pairs of layers": {
    "decoder_block": "gemma2",
    **OTHERS["gemma2"],
    "depth_connection": "hyper_connections",
  },
  "DCA, pairs of layers": {"decoder_block": "gemma2", **OTHERS["gemma2"], "depth_connection": "dca"},
  "tiled vocabulary": {**SMALL, **BOTH_NORMS, "num_vocab_tiling": 4},
  **{name: {**SMALL, **BOTH_NORMS, "decoder_block": name, **keys} for name, (keys, _) in BLOCKS.items()},
  **{
    name: {**SMALL, **BOTH_NORMS, "decoder_block": name, **keys} for name, keys in OTHERS.items() if name not in SINGLE
  },
  **{
    f"{family}, {block}": {"decoder_block": block, **OTHERS[block], **keys}
    for family, keys in OF_SUBLAYERS.items()
    for block in ("gemma3", "gpt_oss", "llama4", "deepseek", "qwen3_5")
  },
}


def run(cfg, *parameters):
  """For each set of parameters, (logits, loss, what MaxText returns with it, gradients by path) of the model."""
  model = models.build(cfg)
  graph, _, rest = nnx.split(model, nnx.Param, ...)
  data = models.batch(cfg)

  @jax.jit
  def gradients_of(params):
    def loss(params):
      return train.loss_fn(nnx.merge(graph, params, rest, copy=True), cfg, dict(data), None, None)

    return jax.value_and_grad(loss, has_aux=True)(params)

  results = []
  for values in parameters:
    models.set_parameters(model, values)
    (value, aux), gradients = gradients_of(nnx.state(model, nnx.Param))
    logits = np.asarray(models.jitted_logits(model, data)) if cfg.num_vocab_tiling == 1 else np.zeros(1)  # makes none
    results.append((logits, float(value), aux, by_path(gradients)))
  return results


def by_path(gradients):
  return {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(gradients)}


def neighbours(values):
  """Every parameter moved to the next number above or below it, at random; zeros stay, as padding has to."""
  rng = np.random.default_rng(5)
  ends = {path: rng.choice(np.array([-np.inf, np.inf], x.dtype), x.shape) for path, x in values.items()}
  return {path: np.where(x == 0, x, np.nextafter(x, ends[path])) for path, x in values.items()}


def entries_of_blocks(cfg, parameters) -> dict[str, np.ndarray]:
  """Which entries of parameters are not padding, by path."""
  zeros = {path: np.zeros(x.get_value().shape) for path, x in parameters.items()}
  of_single_layers = {path: np.ones_like(x) for path, x in layout.unstack(zeros, cfg).items()}
  return {path: x > 0 for path, x in layout.stack(of_single_layers, cfg).items()}


def random_values(cfg):
  """Small enough for a well-conditioned model: with larger ones float32 rounding alone comes to more than 1e-6."""
  model = models.build(cfg)
  start = {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}
  values = models.randomise(model)
  for path, x in values.items():
    if path.endswith(("kernel", "w1", "w2", "embedding", "w_alpha", "w_beta")):
      values[path] = x / 2
    elif path.endswith("/a"):
      values[path] = start[path] + (x - start[path]) / 4
    elif path.endswith(("static_alpha", "static_beta")):
      values[path] = start[path] + x / 10
    elif "/phi" in path:
      values[path] = x / 16
    elif path.endswith(("alpha_scale", "beta_scale")):
      values[path] = x / 10
  return values


def largest(x):
  return np.abs(x).max()


# Without rotary embedding, what is added to all keys alike changes no attention weight.
UNFELT = {"gpt3": ("key/bias", "norm/k/bias")}


def norm_of(gradients):
  return np.sqrt(sum(np.square(x).sum() for x in gradients.values()))


def check_gradients(found, expected, rounded, unfelt: tuple[str, ...] = (), floor: float = 0.0):
  """Compares gradients.

  Args:
    rounded: gradients of the model of `expected` at neighbouring parameters.
    unfelt: ends of the paths whose gradients are zero.
    floor: an error that any tensor may have, of the norm.
  """
  errors, rounding = ({path: tree[path] - x for path, x in expected.items()} for tree in (found, rounded))
  norm = norm_of(expected)
  assert norm_of(errors) <= max(RELATIVE * norm, OF_ROUNDING * norm_of(rounding))
  zero = {path for path in expected if path.endswith(unfelt)} if unfelt else set()
  assert bool(zero) == bool(unfelt)
  for path, x in errors.items():
    if path in zero:
      assert max(largest(found[path]), largest(expected[path])) <= ZERO * norm, path
    else:
      of_rounding = OF_ROUNDING_TENSOR * largest(rounding[path])
      assert largest(x) <= max(OF_TENSOR * largest(expected[path]), of_rounding, floor * norm), path
