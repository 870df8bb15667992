"""How configuration keys are declared, grouped and refused.

Imports neither JAX nor MaxText, so that a command line is checked before these are imported.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

from pydantic import BaseModel, Field, model_validator

_NEEDS = "needs"


def key(default: Any, description: str, *, needs: Mapping[str, tuple] | None = None, **constraints: Any) -> Any:
  """Declares one key in a `KeyGroup`.

  Args:
    default: the key's value where nothing sets it.
    description: what the key means; one or two sentences.
    needs: other keys, each with the values that it must have for this key to be read; none by default.
    constraints: arguments of `pydantic.Field`, such as `ge` and `lt`.
  """
  return Field(default, description=description, json_schema_extra={_NEEDS: dict(needs or {})}, **constraints)


class KeyGroup(BaseModel):
  """Base of the groups of keys. A key that does nothing with the other keys' values must keep its default: otherwise an
  ablation would train the plain model without a warning.

  A group's keys may need keys of another group, so only a class that inherits all groups (`config.keys.MuddKeys`) can
  be instantiated.
  """

  @classmethod
  def needs_of(cls, name: str) -> dict[str, tuple]:
    """Other keys, each with the values that it must have for the key `name` to be read."""
    extra = cls.model_fields[name].json_schema_extra
    return extra.get(_NEEDS, {}) if isinstance(extra, dict) else {}

  @model_validator(mode="after")
  def _check_that_changed_keys_are_read(self):
    for name, field in type(self).model_fields.items():
      value = getattr(self, name)
      if value == field.default:
        continue
      for other, values in self.needs_of(name).items():
        if getattr(self, other) not in values:
          raise ValueError(
            f"{name}={_short(value)} does nothing with {other}={_short(getattr(self, other))}; leave it at "
            f"{field.default}, or set {other}={' or '.join(map(str, values))}."
          )
    return self


def _short(value: Any) -> str:
  """A value in a sentence, cut off where it is a long table."""
  text = str(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


@dataclasses.dataclass(frozen=True)
class Refusal:
  """Two settings that do not work together.

  Attributes:
    applies: whether the configuration has both settings.
    setting: the setting that has to change, as "fused_qkv=True".
    other: the setting that stays, as "mudd=True".
    reason: why they do not work together, and what would work, separated by a semicolon.
  """

  applies: bool
  setting: str
  other: str
  reason: str


def raise_first(refusals: Iterable[Refusal]) -> None:
  """Raises ValueError with one sentence for the first refusal that is on."""
  for refusal in refusals:
    if refusal.applies:
      raise ValueError(f"{refusal.setting} does not work with {refusal.other}: {refusal.reason}.")
