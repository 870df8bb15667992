"""How keys are declared: what each needs to be read, and that one which is not read keeps its default."""

from pydantic import TypeAdapter, ValidationError
import pytest

from maxtext_mudd import connections
from maxtext_mudd.config.keys import MuddKeys
from maxtext_mudd.connections.keys import KeyGroup, Refusal, key, raise_first


class Example(KeyGroup):
  switch: bool = key(False, "Turns the others on.")
  rule: str = key("a", "Always read.")
  number: int = key(1, "Read by two of the rules.", needs={"switch": (True,), "rule": ("b", "c")}, ge=0)


@pytest.mark.parametrize(
  ("values", "sentence"),
  [
    ({"number": 2}, "number=2 does nothing with switch=False; leave it at 1, or set switch=True."),
    ({"number": 2, "switch": True}, "number=2 does nothing with rule=a; leave it at 1, or set rule=b or c."),
  ],
)
def test_a_key_that_does_nothing(values, sentence):
  with pytest.raises(ValidationError) as error:
    Example(**values)
  assert error.value.errors()[0]["msg"] == f"Value error, {sentence}"


def test_a_key_that_is_read():
  assert Example(number=2, switch=True, rule="c").number == 2
  assert Example(number=1).number == 1  # the default does nothing, and changes nothing
  with pytest.raises(ValidationError, match="greater than or equal to 0"):
    Example(number=-1)


@pytest.mark.parametrize("name", MuddKeys.model_fields)
def test_what_a_key_needs_can_be_set(name):
  """Each needed key exists, and takes the values that are needed."""
  needed = MuddKeys.needs_of(name)
  assert MuddKeys.model_fields[name].description
  for other, values in needed.items():
    assert other != name
    for value in values:
      TypeAdapter(MuddKeys.model_fields[other].annotation).validate_python(value, strict=True)
    if other == "depth_connection":
      assert set(values) <= set(connections.FAMILIES)


def test_the_first_refusal_is_raised():
  off, first, second = (Refusal(a > 0, f"a={a}", "b=2", "reason; set a=0") for a in range(3))
  raise_first([off])
  with pytest.raises(ValueError) as error:
    raise_first([off, first, second])
  assert str(error.value) == "a=1 does not work with b=2: reason; set a=0."
