"""Runs a model over sequences of a text, and adds up what a figure measures, so that memory does not grow with them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
import tqdm

from maxtext_mudd.config import devices
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.inference import forward, inspection

LANES = 128  # a block of an attention kernel of TPUs is a multiple of it
Batch = tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]  # tokens, positions, segments


@dataclasses.dataclass(frozen=True)
class Named:
  """An array with a name for each of its axes.

  Attributes:
    dims: names of the axes.
    values: the array; NaN where there is nothing.
    labels: by axis, what its entries stand for, where that is not 0, 1, 2, ...
  """

  dims: tuple[str, ...]
  values: Float[np.ndarray, "..."]
  labels: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)


class Figure:
  """What is measured for one figure, in one pass over a text. It is built from (request, config, tokenizer) of a model.

  Attributes:
    definition: a sentence on what the arrays are.
    functions: by kind, what is kept of an array in the forward pass.
  """

  definition: str
  functions: Mapping[str, Callable[[Array], Any]]

  def sums(self, model: nnx.Module, logits: Float[Array, "B T V"], arrays: dict[str, Any], batch: Batch) -> Any:
    """What one batch adds: a pytree of arrays whose shapes do not depend on the batch. Compiled."""
    raise NotImplementedError

  def added(self, statistics: Any) -> Any:
    """What is added over batches, from `sums` of one batch in float64."""
    return statistics

  def arrays(self, sums: Any) -> dict[str, Named]:
    """The figure's arrays, from the sums over all batches, in float64."""
    raise NotImplementedError

  @staticmethod
  def summary(arrays: dict[str, Named]) -> str:
    """What the figure says of a model, in one line."""
    raise NotImplementedError

  def measure(
    self, model: nnx.Module, data: Sequence[Batch], before_batch: Callable[[], None], name: str
  ) -> dict[str, Named]:
    """The figure's arrays.

    Args:
      before_batch: called before each batch; what it raises ends the measurement.
      name: of the progress bar.
    """
    return self.arrays(totals(self, model, data, before_batch, name))


def sequences(text: str, tokenizer, config, length: int, number: int) -> list[list[int]]:
  """The first sequences of a text: BOS and the next length - 1 tokens, of the last one what is left.

  Args:
    number: the largest number of sequences.

  Raises:
    ConfigError: the sequences are longer than the context of the model, or the text has no tokens.
  """
  if length > config.max_target_length:
    raise ConfigError(f"--length={length} is more than the context, max_target_length={config.max_target_length}.")
  step = length - 1
  tokens = _first_tokens(text, tokenizer, step * number)
  if not tokens:
    raise ConfigError("--text has no tokens, or white space alone; name another text.")
  return [[tokenizer.prefix_id, *tokens[start : start + step]] for start in range(0, len(tokens), step)]


def _first_tokens(text: str, tokenizer, number: int) -> list[int]:
  """The first tokens of a text, without encoding all of a long one. Where a part of it ends, its last tokens may be
  others than in the whole text, so the part has twice as many tokens as are used."""
  size = 16 * number
  while len(tokens := tokenizer.encode(text[:size], bos=False)) < 2 * number and size < len(text):
    size *= 2
  return tokens[:number]


def batches(rows: Sequence[Sequence[int]], config, length: int, batch_size: int) -> Iterator[Batch]:
  """Puts sequences into batches. Short sequences and the last batch are padded by segment 0, and so are lengths above
  128, to a multiple of it, since attention kernels of TPUs take no others."""
  parts = devices.batch_parts(config)
  batch_size = -(-min(batch_size, len(rows)) // parts) * parts
  if length > LANES:
    length = min(-(-length // LANES) * LANES, config.max_target_length)
  for start in range(0, len(rows), batch_size):
    of_batch = np.zeros((batch_size, length), np.int32)
    segments = np.zeros_like(of_batch)
    for k, row in enumerate(rows[start : start + batch_size]):
      of_batch[k, : len(row)] = row
      segments[k, : len(row)] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), of_batch.shape)
    yield of_batch, positions, segments


def totals(
  figure: Figure, model: nnx.Module, data: Sequence[Batch], before_batch: Callable[[], None], name: str
) -> Any:
  """The sums of a figure over all batches, in float64.

  Args:
    before_batch: called before each batch; what it raises ends the measurement.
    name: of the progress bar.
  """

  @forward.pure
  def sums(model, *batch):
    logits, arrays = inspection.observe(model, batch, figure.functions)
    of_tokens = jnp.where(batch[2][..., None] > 0, logits, 0)
    return figure.sums(model, logits, arrays, batch), of_tokens.sum()

  total = None
  for batch in tqdm.tqdm(data, desc=name):
    before_batch()
    of_figure, of_logits = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums(model, *batch)))
    check_finite((of_figure, of_logits))
    of_batch = figure.added(of_figure)
    total = of_batch if total is None else jax.tree.map(np.add, total, of_batch)
  return total


def check_finite(values: Any) -> None:
  """Raises ConfigError for NaN and infinity among the arrays of a pytree."""
  if not all(np.isfinite(x).all() for x in jax.tree.leaves(values)):
    raise ConfigError("the model computes values that are not finite; use a checkpoint from before its run diverged.")
