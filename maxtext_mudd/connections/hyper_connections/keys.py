"""The keys of Hyper-Connections. Imports neither JAX nor MaxText."""

from typing import Literal

from maxtext_mudd.connections.family_keys import WeightKeys
from maxtext_mudd.connections.keys import key
from maxtext_mudd.connections.multi_stream import StreamsKeys


class HyperKeys(WeightKeys, StreamsKeys):
  """The keys of `depth_connection=hyper_connections`."""

  mudd_hyper_norm: Literal["rms", "layer"] = key(
    "rms",
    "Norm of the streams that α and β are computed from: RMSNorm, or the LayerNorm of the paper's code.",
    needs={"mudd_dynamic": (True,)},
  )
  mudd_hyper_scaled_init: bool = key(
    False, "The kernels of attention outputs and second FFN matrices start √n times as large, as in the paper."
  )
  mudd_hyper_end: Literal["mean", "sum"] = key(
    "mean", "What the streams become behind the last block: their mean, or their sum as in the paper."
  )
