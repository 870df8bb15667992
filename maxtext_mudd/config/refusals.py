"""Settings that do not work together, as data. Imports neither JAX nor MaxText."""

from collections.abc import Iterable
import dataclasses


@dataclasses.dataclass(frozen=True)
class Refusal:
  """Two settings that do not work together.

  Attributes:
    is_on: whether the configuration has both.
    setting: the setting that has to change, as "fused_qkv=True".
    other: the setting that stays, as "mudd=True".
    reason: why they do not work together, and what would work, separated by a semicolon.
  """

  is_on: bool
  setting: str
  other: str
  reason: str


def raise_first(refusals: Iterable[Refusal]) -> None:
  """Raises ValueError with one sentence for the first refusal that is on."""
  for refusal in refusals:
    if refusal.is_on:
      raise ValueError(f"{refusal.setting} does not work with {refusal.other}: {refusal.reason}.")
