"""The loss of a MUDD model whose multi-token prediction (MTP) is connected, in plain JAX.

The formulas of blocks and aggregates are those of muddformer.py. Parameters come by MaxText's paths (tests/models.py).
"""

import dataclasses

import jax
import jax.numpy as jnp

from maxtext_mudd.muddformer import Config, aggregate, mixing_weights, rms_norm, transformer_block
from tests.parameters import to_aggregate, to_block, to_muddformer


@dataclasses.dataclass(frozen=True)
class Arch:
  """Blocks, norms, and the MTP blocks.

  Attributes:
    window: number of block outputs that a DA in front of a block, or of the output head, mixes, the embedding besides;
      0: all.
    one_way: whether each DA makes one stream for the next block.
  """

  layers: int = 3
  mtp: int = 1
  scaling: float = 0.3  # of the MTP loss
  pre_norm: bool = False
  post_norm: bool = False
  post_norm_streams: str = "r"
  window: int = 0
  one_way: bool = False


def loss(values: dict, data: dict, arch: Arch):
  """(loss of the model, MTP loss as MaxText adds it) for rows of one document each.

  MTP block k at position t reads the embedding of token t+k and predicts token t+k+1.
  """
  params, tokens, targets = to_muddformer(values), data["inputs"], data["targets"]
  config = Config(layers=arch.layers)

  def source(x, path):
    return rms_norm(x, values[f"{path}/scale"]) if arch.pre_norm else x

  def streams_of(sources, newest, da, names):
    streams = aggregate(sources, mixing_weights(newest, da, config))
    assert len(streams) == len(names)
    if not arch.post_norm:
      return streams
    normed = [
      rms_norm(x, da["post_norm"][c]) if c in f"xm{arch.post_norm_streams}" else x for c, x in zip(names, streams)
    ]
    return [x + newest for x in normed]

  x = params["embedding"][tokens]
  sources, streams = [source(x, "decoder/layers_0/connection/embedding_norm")], [x, x, x, x]
  for i, (block, da) in enumerate(zip(params["blocks"], params["aggregates"]), 1):
    x = transformer_block(*streams, block, config)
    sources.append(source(x, f"decoder/layers_{i - 1}/connection/output_norm"))
    seen = [s for j, s in enumerate(sources) if j == 0 or not arch.window or i - j < arch.window]
    names = ("x" if arch.one_way else "qkvr") if i < arch.layers else "xm" if arch.one_way else "rm"
    streams = streams_of(seen, x, da, names)
    if names == "x":
      streams *= 4
  for_head, for_mtp = streams
  main = cross_entropy(rms_norm(for_head, params["final_norm"]) @ params["unembedding"], targets).mean()

  total, count = 0.0, 0
  for k in range(1, arch.mtp + 1):
    path, prefix = f"mtp_block/mtp_layer_{k}", f"mtp_block/mtp_layer_{k}/mtp_{k}_"
    embedded = rms_norm(params["embedding"][shifted(tokens, k)], values[f"{prefix}embedding_norm/scale"])
    normed = rms_norm(for_mtp, values[f"{prefix}hidden_state_norm/scale"])
    x = jnp.concatenate([embedded, normed], -1) @ values[f"{prefix}projection/kernel"]
    x = transformer_block(x, x, x, x, to_block(values, f"{prefix}transformer_layer"), config)
    sources.append(source(x, f"{path}/connection/output_norm"))
    (for_mtp,) = streams_of(sources, x, to_aggregate(values, f"{path}/connection/final_depth_aggregate"), "m")
    logits = rms_norm(for_mtp, values[f"{prefix}final_norm/scale"]) @ params["unembedding"]
    total += cross_entropy(logits, shifted(targets, k))[:, :-k].sum()
    count += targets[:, k:].size
  mtp = arch.scaling * total / count
  return main + mtp, mtp


def shifted(tokens, k: int):
  """The tokens k positions later, and zeros at the end."""
  return jnp.pad(tokens[:, k:], ((0, 0), (0, k)))


def cross_entropy(logits, targets):
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
