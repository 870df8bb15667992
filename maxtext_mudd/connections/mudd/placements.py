"""The table of `mudd_placements`: which blocks DAs follow, what each mixes and which streams it makes. Pure Python.

A row of the table stands for one DA, or for several that differ in their blocks alone. It maps these columns to values:

  block     The block that the DA follows. A number from 1 on; L, the last block; L-N, N blocks before it; a range of
            these such as 1..L-1, also with a step, as in 1..L-1 step 2; or a list of all these.
  sources   What the DA mixes: all; last:N, the last N block outputs, without the embedding; every:K, each K-th source,
            counted back from the newest to the embedding; numbers and ranges as above, 0 for the embedding and -1, -2,
            ... for extra embeddings; or a list, for the union of its entries. The newest source, the output of
            `block`, has to be among them.
  streams   Letters of qkvr, or x for one stream that serves as all four. The DA after block L makes r or x.
  hidden    Optional: K, the hidden width of the weight MLP. By default the rule of `mudd_hidden_expansion` gives it.
  mlp       Optional: a name. DAs with the same name share one weight MLP: W1, W2, the scale of the norm before W1, and
            s of `mudd_weight_scale`. They need the same streams, K and number of sources. Static weights and post-norms
            remain those of each DA.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re
from typing import Any

import yaml

from maxtext_mudd import assets
from maxtext_mudd.connections.base import STREAMS

_COLUMNS = ("block", "sources", "streams", "hidden", "mlp")
_POSITION = r"-?\d{1,6}|L(?:-\d{1,6})?"
_RANGE = re.compile(rf"(?P<first>{_POSITION})(?:\.\.(?P<last>{_POSITION})(?: step (?P<step>[1-9]\d*))?)?")
_RULE = re.compile(r"all|(?P<rule>last|every):(?P<number>[1-9]\d*)")


@dataclasses.dataclass(frozen=True)
class Placement:
  """One DA.

  Attributes:
    block: i, the block that it follows.
    sources: the sources that it mixes, oldest first.
    streams: the streams that it makes, in the order of "qkvr", or "x".
    hidden: K; None: by the rule of `mudd_hidden_expansion`.
    mlp: name of the weight MLP that it shares with other DAs; None: with none.
  """

  block: int
  sources: tuple[int, ...]
  streams: str
  hidden: int | None = None
  mlp: str | None = None


def read(name: str) -> list:
  """The rows of a table in a YAML file: a path, or the name of a file among this package's configurations.

  Raises:
    ValueError: there is no such file, or it does not hold a list with at least one row.
  """
  paths = (pathlib.Path(name), assets.CONFIGURATIONS / name)
  path = next((path for path in paths if os.path.isfile(path)), None)  # also False for names the system does not allow
  if path is None:
    raise ValueError(
      "there is no such file here or in this package; use the path of a YAML file with rows, or the list itself"
    )
  try:
    rows = yaml.safe_load(path.read_text())
  except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
    raise ValueError(f"the file cannot be read ({' '.join(str(error).split())})") from error
  if not isinstance(rows, list) or not rows:
    raise ValueError("the file holds no list of rows, such as - {block: L, sources: all, streams: r}")
  return rows


def check(rows: Sequence[Any]) -> None:
  """Raises ValueError, in one sentence, for a row that does not follow the grammar, whatever the size of the model."""
  for number, row in enumerate(rows, 1):
    try:
      _check_row(row)
    except ValueError as error:
      raise ValueError(f"mudd_placements: row {number} {error}.") from None


def expand(rows: Sequence[Any], num_blocks: int, extra_embeddings: int = 0) -> list[Placement]:
  """The DAs of a model with L = `num_blocks`, sorted by block, from rows that `check` accepts.

  Args:
    extra_embeddings: m; the sources -1 to -m exist.

  Raises:
    ValueError: a row names a block or a source that does not exist there, two rows place the same DA, a DA lacks its
      newest source, or DA_L makes another stream than r or x.
  """
  rows_by_block: dict[int, int] = {}
  placements = []
  for number, row in enumerate(rows, 1):
    for block in _numbers(_terms(row["block"]), num_blocks):
      if block in rows_by_block:
        raise ValueError(
          f"mudd_placements: rows {rows_by_block[block]} and {number} both place DA_{block}; name each block once."
        )
      rows_by_block[block] = number
      placements.append(_placement(row, number, block, num_blocks, -extra_embeddings))
    if number not in rows_by_block.values():
      raise ValueError(
        f"mudd_placements: row {number} has block: {row['block']}, which is no block of a model with L={num_blocks}; "
        "use positions from 1 to L, the lower one first."
      )
  return sorted(placements, key=lambda placement: placement.block)


def span(numbers: Sequence[int]) -> str:
  """Rising numbers as the grammar has them, ranges for three and more: "0, 4..7, 9..13 step 2"."""
  numbers, parts = list(numbers), []
  while numbers:
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    length = next((n for n, x in enumerate(numbers) if x != numbers[0] + n * step), len(numbers))
    if length > 2:
      parts.append(f"{numbers[0]}..{numbers[length - 1]}{f' step {step}' if step > 1 else ''}")
    else:
      length = 1
      parts.append(str(numbers[0]))
    numbers = numbers[length:]
  return ", ".join(parts)


def _check_row(row: Any) -> None:
  """Raises ValueError with what follows the number of the row."""
  if not isinstance(row, dict):
    raise ValueError(f"is {row!r}; write a mapping, such as {{block: L, sources: all, streams: r}}")
  for column in row:
    if column not in _COLUMNS:
      raise ValueError(f"has the column {column!r}, which does not exist; use {', '.join(_COLUMNS)}")
  for column in _COLUMNS[:3]:
    if column not in row:
      raise ValueError(f"has no {column}; add it, as in {{block: L, sources: all, streams: r}}")
  for column, forms in (("block", (_RANGE,)), ("sources", (_RANGE, _RULE))):
    for term in _terms(row[column]):
      if isinstance(term, bool) or not any(form.fullmatch(str(term)) for form in forms):
        rules = ", all, last:8, every:2" if _RULE in forms else ""
        raise ValueError(
          f"has {column}: {row[column]!r}; use a number, L, L-1, 1..L-1, 1..L-1 step 2{rules}, or a list of these"
        )
    if not _terms(row[column]):
      raise ValueError(f"has an empty list of {column}; name at least one")
  streams, hidden = row["streams"], row.get("hidden", 1)
  is_some = isinstance(streams, str) and 0 < len(streams) == len(set(streams) & set(STREAMS))
  if not is_some and streams != "x":
    raise ValueError(f"has streams: {streams!r}; use some of the letters q, k, v and r, each at most once, or x")
  if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
    raise ValueError(f"has hidden: {hidden!r}; use a width of 1 or more, or leave it out")
  if "mlp" in row and not (isinstance(row["mlp"], str) and row["mlp"]):
    raise ValueError(f"has mlp: {row['mlp']!r}; use a name, such as late, or leave it out")


def _placement(row: dict, number: int, block: int, num_blocks: int, oldest: int) -> Placement:
  """DA_block, as its row describes it, in a model with sources from `oldest` on."""
  at = f"mudd_placements: row {number}"
  if not 1 <= block <= num_blocks:
    raise ValueError(f"{at} places DA_{block}, and the model has L={num_blocks} blocks; use blocks from 1 to L.")
  sources = _sources(row["sources"], block, num_blocks, oldest)
  missing = [source for source in sources if not oldest <= source <= block]
  if missing:
    raise ValueError(
      f"{at} gives DA_{block} the source X_{missing[0]}, which does not exist there; use sources from {oldest} to "
      f"{block}."
    )
  if block not in sources:
    raise ValueError(
      f"{at} gives DA_{block} the sources [{span(sources)}], without X_{block}, its newest one; add last:1."
    )
  streams = "".join(stream for stream in f"{STREAMS}x" if stream in row["streams"])
  if block == num_blocks and streams not in ("r", "x"):
    raise ValueError(
      f"{at} gives DA_{block}, which follows the last block, the streams {streams}; it makes the residual stream only, "
      "so place it in another row, with streams: r."
    )
  return Placement(block, sources, streams, row.get("hidden"), row.get("mlp"))


def _sources(column: Any, block: int, num_blocks: int, oldest: int) -> tuple[int, ...]:
  """The union of what the terms of a row name, before it is checked."""
  sources = set()
  for term in _terms(column):
    rule = _RULE.fullmatch(str(term))
    if rule is None:
      sources |= {*_numbers([term], num_blocks)}
    elif rule["rule"] == "last":
      sources |= {*range(max(1, block + 1 - int(rule["number"])), block + 1)}
    elif rule["rule"] == "every":
      sources |= {*range(block, -1, -int(rule["number"]))}
    else:
      sources |= {*range(oldest, block + 1)}
  return tuple(sorted(sources))


def _terms(column: Any) -> list:
  return column if isinstance(column, list) else [column]


def _numbers(terms: Sequence[int | str], num_blocks: int) -> list[int]:
  """The numbers that positions and ranges name.

  Raises:
    ValueError: L-N is below 0. Negative sources are extra embeddings, which L-N does not name.
  """

  def number(position: str) -> int:
    if not position.startswith("L"):
      return int(position)
    before = int(position[2:] or 0)
    if before > num_blocks:
      raise ValueError(
        f"mudd_placements: {position} is below 0 in a model with L={num_blocks} blocks; use L-{num_blocks} to L."
      )
    return num_blocks - before

  numbers = []
  for term in terms:
    match = _RANGE.fullmatch(str(term))
    first = number(match["first"])
    numbers += range(first, number(match["last"] or match["first"]) + 1, int(match["step"] or 1))
  return numbers
