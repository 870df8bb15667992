"""Keys that several families share. Imports neither JAX nor MaxText."""

from collections.abc import Iterator
from typing import Literal

from pydantic import model_validator

from maxtext_mudd.connections.keys import KeyGroup, Refusal, key


class FamilyKeys(KeyGroup):
  """Base of the keys of families. A key needs `mudd`, and a family whose `Keys` inherit the group that declares it."""

  @classmethod
  def needs_of(cls, name: str) -> dict[str, tuple]:
    from maxtext_mudd.connections import FAMILIES

    group = next(x for x in cls.__mro__ if name in vars(x).get("__annotations__", ()))
    readers = tuple(reader for reader, family in FAMILIES.items() if issubclass(family.Keys, group))
    of_family = {"mudd": (True,), "depth_connection": readers} if issubclass(group, FamilyKeys) and readers else {}
    return of_family | super().needs_of(name)


class WeightKeys(FamilyKeys):
  """Which parts the weights have."""

  mudd_dynamic: bool = key(True, "Weights computed from the newest block output (Eq. 6).")
  mudd_static: bool = key(True, "Learned static weights a; off: a keeps its initial value.")

  @model_validator(mode="after")
  def _check_weights(self):
    if not (self.mudd_dynamic or self.mudd_static):
      raise ValueError(
        "mudd_dynamic=False with mudd_static=False leaves nothing to learn; turn one on, or set mudd=False."
      )
    return self


class HistoryKeys(FamilyKeys):
  """How the outputs of earlier blocks are mixed."""

  mudd_kernel: Literal["auto", "xla", "pallas", "pallas_interpret"] = key(
    "auto", "Depth-wise aggregation: fused on TPU (pallas) and plain elsewhere (xla), or as named."
  )


def kernel_refusals(config) -> Iterator[Refusal]:
  """What `mudd_kernel` does not work with. `config` is a `MuddConfig` with `HistoryKeys`."""
  from maxtext_mudd.kernels import DTYPES  # imports JAX

  kernel, dtype = f"mudd_kernel={config.mudd_kernel}", config.dtype.value
  yield Refusal(
    config.mudd_kernel == "pallas" and config.hardware != "tpu",
    f"hardware={config.hardware}",
    kernel,
    "it is compiled for TPUs; use mudd_kernel=auto",
  )
  yield Refusal(
    config.mudd_kernel.startswith("pallas") and dtype not in DTYPES,
    f"dtype={dtype}",
    kernel,
    f"it takes {' or '.join(DTYPES)}; use one of these, or mudd_kernel=xla",
  )


def sublayer_refusals(config) -> Iterator[Refusal]:
  """Settings that do not work with families that make an input for each sublayer: their layers return a pytree, not one
  [B,T,D] array."""
  family = f"depth_connection={config.depth_connection}"
  yield Refusal(
    config.enable_dropout and config.dropout_rate > 0,
    f"dropout_rate={config.dropout_rate}",
    family,
    "MaxText drops parts of one residual stream, which this family does not have; set dropout_rate=0",
  )
