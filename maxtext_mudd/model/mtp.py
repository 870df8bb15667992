"""Multi-token prediction (MTP) that reads a stream of a depth connection, and adds its blocks to the history.

MaxText's MTP block k reads the hidden state of the block before it. With `mudd_mtp: connected` it reads a stream of
DA_{L+k-1} instead. After it, DA_{L+k} mixes all sources, the newest of which is the output of MTP block k. The output
head and the next MTP block read the one stream that it makes. The authors do so in their later training code.
"""

from collections.abc import Iterable
import functools
import re

from flax import nnx
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.layers.multi_token_prediction import MultiTokenPredictionBlock, MultiTokenPredictionLayer

from maxtext_mudd import connections
from maxtext_mudd.blocks.classes import change_class
from maxtext_mudd.connections.connection import ForMtp, MtpInput
from maxtext_mudd.model.layer import connection_rngs


def number_in(path: Iterable[str]) -> int | None:
  """k, if the path of a parameter or of something sown is of MTP block k; None for all others."""
  return next((int(match[1]) for name in path if (match := re.fullmatch(r"mtp_layer_(\d+)", name))), None)


class ConnectedMtpLayer(MultiTokenPredictionLayer):
  """MaxText's MTP layer with an `MtpConnection` after it. It takes and returns an `MtpInput`."""

  def __call__(self, prev_hidden_state: MtpInput, *args, **kwargs) -> MtpInput:
    output = super().__call__(prev_hidden_state.stream, *args, **kwargs)
    return self.connection.extend(prev_hidden_state.history, output)

  @property
  def final_norm(self):
    """The norm before the output head, as a function of an `MtpInput`."""
    norm = super().final_norm
    return lambda of_block: norm(of_block.stream)


class MuddMultiTokenPredictionBlock(MultiTokenPredictionBlock):
  """MaxText's MTP blocks. They are connected where the plan of the model has sites after the last block.

  In decoding nothing reads their predictions, so they are left out. MaxText 0.2.5 would stop with an error there, since
  they have no KV cache.
  """

  def __init__(self, config, mesh, transformer_layer_module, decoder, rngs):
    super().__init__(config, mesh, transformer_layer_module, decoder, rngs)
    blocks = connections.plan(config).mtp_blocks if getattr(config, "mudd", False) else ()
    self.is_connected = bool(blocks)
    for k, block in enumerate(blocks, 1):
      layer = getattr(self, f"mtp_layer_{k}")
      change_class(layer, ConnectedMtpLayer)
      layer.connection = connections.family(config).build_for_mtp(config, block, mesh, connection_rngs(rngs, block))

  @functools.wraps(MultiTokenPredictionBlock.__call__)
  def __call__(self, shared_embedding, main_hidden_state, *args, model_mode, **kwargs):
    if self.is_connected:
      ((_, variable),) = nnx.to_flat_state(nnx.pop(self.decoder, ForMtp))
      main_hidden_state = variable.get_value()
    if model_mode != MODEL_MODE_TRAIN:
      return {}
    return super().__call__(shared_embedding, main_hidden_state, *args, model_mode=model_mode, **kwargs)
