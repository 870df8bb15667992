"""Keys of families whose weights have a static and a dynamic part. Imports neither JAX nor MaxText."""

from pydantic import model_validator

from maxtext_mudd.keys import KeyGroup, key

_WEIGHTED = {"mudd": (True,), "depth_connection": ("dense", "hyper_connections")}


class WeightKeys(KeyGroup):
  """Which parts the weights have."""

  mudd_dynamic: bool = key(True, "Weights computed from the newest block output (Eq. 6).", needs=_WEIGHTED)
  mudd_static: bool = key(True, "Learned static weights a; off: a keeps its initial value.", needs=_WEIGHTED)

  @model_validator(mode="after")
  def _check_weights(self):
    if not (self.mudd_dynamic or self.mudd_static):
      raise ValueError(
        "mudd_dynamic=False with mudd_static=False leaves nothing to learn; turn one on, or set mudd=False."
      )
    return self
